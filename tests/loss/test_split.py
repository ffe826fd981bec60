"""Split over two and four gloo ranks, the vocabulary's head has the unsplit loss, log-probabilities and gradients."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import processes, split
from tests.support.bounds import BOUND, assert_same_update
from tests.support.compare import assert_within_budget
from tests.support.split import HeadCase

EXACT: list[tuple[HeadCase, str | None]] = [
    *((HeadCase(options=o, dtensor=d), None) for o, d in itertools.product((False, True), repeat=2)),
    (HeadCase(options=True, chunk_bytes=1500), None),
    (HeadCase(certain=True), None),
    *(
        (HeadCase(options=True, chunk_bytes=c), p)
        for c in (None, 2500)
        for p in ("alp-token", "alp-sequence", "alp-cum-token")
    ),
    (HeadCase(dtensor=True), "alp-sequence"),
    *((HeadCase(options=o, support=True), p) for o in (False, True) for p in (None, "alp-token", "alp-sequence")),
]
BUDGETED = [
    (HeadCase(dtype, options=o), p)
    for dtype in (torch.float32, torch.bfloat16)
    for o, p in ((False, None), (True, "alp-token"))
] + [(HeadCase(torch.bfloat16, options=True, support=True), "alp-token")]
CERTAIN = (HeadCase(torch.float32, certain=True), None)
WIDENED: list[tuple[HeadCase, str | None]] = [
    (HeadCase(torch.bfloat16, options=True, widened=torch.float32), None),
    (HeadCase(torch.bfloat16, options=True, widened="tf32", chunk_bytes=1500), "alp-token"),
]
CASES = [*EXACT, *BUDGETED, CERTAIN, *WIDENED]
UPDATES = {
    "fused": {"fused": True},
    "logprob": {"fused": False},
    "numbered rows": {"fused": True, "numbered": True},
    "noise that differs": {"fused": True, "numbered": True, "data_rank": None},
}


def work() -> dict[str, Any]:
    out: dict[str, Any] = {"heads": split.head_cases(CASES), "refusals": split.refusals()}
    out["compiled"] = split.compiled_differences()
    for name, how in UPDATES.items():
        try:
            out[name] = split.tensor_parallel_update(True, **how)
        except ValueError as error:
            out[name] = str(error)
    return out


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, Any]]]:
    return {size: processes.run(work, size) for size in (2, 4)}


def joined(ranks: list[dict[str, Any]], case: tuple[HeadCase, str | None]) -> dict[str, Tensor]:
    """Join the ranks' shards of gradients, and assert that the rest is the same on all ranks."""
    parts = [rank["heads"][CASES.index(case)] for rank in ranks]
    out = {}
    for name, value in parts[0].items():
        if isinstance(value, Tensor):
            is_shard = name in ("dweight", "dbias")
            assert is_shard or all(torch.equal(part[name], value) for part in parts), name
            out[name] = torch.cat([part[name] for part in parts]) if is_shard else value
    assert all(part["repeats"] for part in parts), "a second backward returned other gradients"
    assert all(part.get("stats") == parts[0].get("stats") for part in parts)
    return out


@functools.cache
def whole(head: HeadCase, preset: str | None) -> dict[str, Any]:
    return split.head_case(head, preset, is_split=False)


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_gives_the_unsplit_head(size: int, case: Any, ranks: dict[int, Any]) -> None:
    actual, expected = joined(ranks[size], case), whole(*case)
    for name, value in actual.items():
        assert (value - expected[name]).abs().max() <= BOUND * expected[name].abs().max(), name
    if case[1] is not None:
        for key, figure in expected["stats"].items():
            assert ranks[size][0]["heads"][EXACT.index(case)]["stats"][key] == pytest.approx(figure, rel=1e-9), key


@pytest.mark.parametrize("case", BUDGETED, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_errors_stay_within_twice_those_of_the_unsplit_head(size: int, case: Any, ranks: dict[int, Any]) -> None:
    head, preset = case
    actual, ordinary = joined(ranks[size], case), whole(head, preset)
    exact = split.head_case(head, preset, is_split=False, exact=True)
    for name, value in actual.items():
        assert value.dtype == ordinary[name].dtype
        # logp, entropy and loss are float32 for 16-bit inputs, but come from rounded logits: budget of the inputs' dtype
        assert_within_budget(value, ordinary[name], exact[name], head.dtype, name)


@pytest.mark.parametrize("case", WIDENED, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_a_float32_head_over_16_bit_shards_has_float32s_errors(size: int, case: Any, ranks: dict[int, Any]) -> None:
    head, preset = case
    actual, ordinary = joined(ranks[size], case), whole(head, preset)
    exact = split.head_case(head, preset, is_split=False, exact=True)
    for name, value in actual.items():
        assert value.dtype == ordinary[name].dtype
        # each rank rounds its part of the states' gradient; the rest is rounded once, if at all
        assert_within_budget(
            value, ordinary[name], exact[name], head.dtype if name == "dhidden" else torch.float32, name
        )


@pytest.mark.parametrize("size", [2, 4])
def test_near_certain_tokens_keep_their_digits(size: int, ranks: dict[int, Any]) -> None:
    actual, exact = joined(ranks[size], CERTAIN)["logp"], split.head_case(*CERTAIN, is_split=False, exact=True)["logp"]
    live = exact != 0
    assert live.sum() == 11 and -1e-6 < exact[live].min() < 0
    # float32 logits near 100 have errors of about 2^-17, which become relative errors of their exponentials
    assert ((actual[live] - exact[live]) / exact[live]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["fused", "logprob", "numbered rows"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_tensor_parallel_decoder_makes_the_gradients_of_a_whole_one(
    size: int, name: str, ranks: dict[int, Any]
) -> None:
    one = split.tensor_parallel_update(False, **UPDATES[name])
    for rank in ranks[size]:
        assert_same_update(rank[name], one)
        assert float(rank[name]["loss"]) == pytest.approx(float(one["loss"]), rel=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_mistakes_are_said_on_every_rank(size: int, ranks: dict[int, Any]) -> None:
    for rank in ranks[size]:
        said = rank["refusals"]
        assert "must be contiguous and start at 0" in said["gap"]
        assert "all ranks of the group gave the same 61 rows" in said["whole head"]
        assert "targets range from" in said["target"] and "vocabulary of 61" in said["target"]
        assert "the group must be the tensor-parallel one" in said["batch"]
        assert "hidden differs by" in said["hidden"]
        assert "weight has shape" in said["columns"]
        assert "weight is a DTensor, one rank's shard of it; give gather_weight(weight)" in said["sharded head"]
        assert "it needs (Shard(0),) on a mesh of one dimension" in said["split columns"]
        assert "VocabSplit's group and start must be None" in said["placed twice"]
        assert "logit_noise was given with a split vocabulary" in said["noise"]
        assert "temperature are not the same on the ranks" in said["temperature"]
        for name in ("advantages", "rollout_logp", "objective", "num_tokens", "support"):
            assert f"fused_alp_loss: {name} is not the same on the ranks of the group" in said[name]
        assert "support.tokens range from" in said["kept token"] and "the vocabulary is [0, 61)" in said["kept token"]
        for name in ("other arguments", "one dtype"):
            assert "the ranks of the group were given different arguments of the loss" in said[name]
        assert "linear_logprob: dtype is not the same on the ranks of the group" in said["dtypes"]


@pytest.mark.parametrize("size", [2, 4])
def test_a_split_head_in_compiled_code_is_the_eager_one(size: int, ranks: dict[int, Any]) -> None:
    """The head breaks the graph, because Dynamo does not trace its collective calls."""
    for rank in ranks[size]:
        assert rank["compiled"] == {"fused": 0.0, "logprob": 0.0}
        assert "give perturbed(row_ids=...), or attach(data_rank=...)" in rank["noise that differs"]
