"""DDP, FSDP1 and FSDP2 around a decoder with ALP, on two and four gloo ranks, make the update of one process."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from alp_kernels import attach, gather_sequence, gather_weight
from tests.support import processes, resumed, split, wrapped
from tests.support.bounds import BOUND, assert_same_update
from tests.support.compare import assert_within_budget
from tests.support.wrapped import Case

pytestmark = pytest.mark.slow


def bfloat16_bound(size: int) -> float:
    """Bound on the difference of two gradients, relative to the norm.

    bfloat16 keeps 8 bits, so each of `size` shares, and the gradient of one process, is rounded by up to 2^-9 of its norm.
    Shares of different sequences are about orthogonal: each has the sum's norm over sqrt(size), so together they add
    sqrt(size). The forward rounds the same values as in one process.
    """
    return (1 + size**0.5) * 2.0**-9


WRAPS = ("ddp", "fsdp2", "fsdp1-orig", "fsdp1-flat")
REFUSED = Case("fsdp1-orig", loss="hidden")
TWO = [
    *(Case(w, loss=loss) for w, loss in itertools.product(WRAPS, ("inside", "logits", "hidden"))),
    *(Case(w, "after") for w in WRAPS),
    *(Case(w, checkpoint=c) for w, c in itertools.product(WRAPS, ("hf", "hf-reentrant"))),
    # the hooked layers are inside the wrapper, or are the wrapper itself
    *(
        Case(w, a, checkpoint=c)
        for w, a, c in itertools.product(WRAPS, ("before", "after"), ("wrapper", "wrapper-reentrant"))
    ),
    *(Case(w, tied=True) for w in WRAPS),
    *(Case(w, micro_batches=2) for w in WRAPS),
    *(Case("fsdp2", loss="hidden", head=h, checkpoint=c) for h in ("unshard", "gather") for c in ("none", "hf")),
    Case("fsdp2-sum"),
    Case("fsdp2-sum", loss="hidden", head="gather"),
]
TWO = [c for c in TWO if (c.wrap, c.loss) != (REFUSED.wrap, REFUSED.loss)]
FOUR = [
    *(Case(w, checkpoint=c) for w, c in zip(WRAPS, ("hf", "wrapper", "hf-reentrant", "none"), strict=True)),
    *(Case(w, loss="logits") for w in WRAPS),
    Case("fsdp2", loss="hidden", head="unshard"),
    Case("fsdp2", loss="hidden", head="gather"),
]
SINGLE = [Case(w, dtype=torch.float32) for w in WRAPS]
BFLOAT16 = [
    Case(w, dtype=torch.float32, policy=torch.bfloat16, checkpoint=c, loss=loss)
    for w in WRAPS
    for c, loss in (("none", "inside"), ("hf", "logits"))
]
BFLOAT16 += [
    Case("fsdp2", dtype=torch.float32, policy=torch.bfloat16, loss="hidden", head=head)
    for head in ("unshard", "gather")
]
RESUMED = [Case("fsdp2"), Case("ddp"), Case("fsdp1-orig"), Case("fsdp1-flat")]
LAYOUTS = {2: TWO, 4: FOUR}


def work(folder: str) -> dict[str, Any]:
    """Return all results of one rank."""
    size = dist.get_world_size()
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    out: dict[str, Any] = {"case": {case: wrapped.one_update(case) for case in [*LAYOUTS[size], *SINGLE]}}
    out["bfloat16"] = {case: (wrapped.one_update(case), wrapped.one_update(case, alone)) for case in BFLOAT16}
    out["halves"] = split.averaged_halves()
    out["weight"] = {average: split.gathered_weight(average) for average in (False, True)}
    out["sequence"] = {
        preset: split.context_parallel_update(True, preset) for preset in ("alp-token", "alp-sequence", "alp-cum-token")
    }
    try:
        wrapped.one_update(REFUSED)
    except ValueError as error:
        out["refused"] = str(error)
    handle = attach(wrapped.wrapped_model(Case()))
    fully_shard(handle, mesh=DeviceMesh.from_group(dist.group.WORLD, "cpu"))
    try:
        handle.sum_gradient()
    except RuntimeError as error:
        out["sharded handle"] = str(error)
    if size == 2:
        resumed.begin(RESUMED, f"{folder}/2")
    else:
        out["resumed"] = resumed.go_on(RESUMED, f"{folder}/2")
        resumed.begin(RESUMED, f"{folder}/4")
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The results of two ranks and of four; the four resume from the two's checkpoints."""
    return {size: processes.run(work, size, str(folder)) for size in (2, 4)}


@functools.cache
def one_process_of(dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    return wrapped.one_update(Case(dtype=dtype, tied=tied))


def one_process(case: Case) -> dict[str, Any]:
    """The same update with the bare model: plain autograd through the whole batch."""
    return one_process_of(case.dtype, case.tied)


@pytest.mark.parametrize(("size", "case"), [(n, c) for n, cases in LAYOUTS.items() for c in cases], ids=str)
def test_wrapped_ranks_make_the_gradients_of_one_process(size: int, case: Case, ranks: dict[int, Any]) -> None:
    one = one_process(case)
    assert all(float(g.abs().max()) > 1e-5 for n, g in one["gradient"].items() if not n.endswith("k_proj.bias"))
    for rank in ranks[size]:
        assert_same_update(rank["case"][case], one)
    assert sum(rank["case"][case]["loss"] for rank in ranks[size]) == pytest.approx(float(one["loss"]), rel=1e-12)


@pytest.mark.parametrize(("size", "case"), list(itertools.product((2, 4), SINGLE)), ids=str)
def test_float32_gradients_of_ranks_are_as_exact_as_those_of_one_process(
    size: int, case: Case, ranks: dict[int, Any]
) -> None:
    one, exact = one_process(case), one_process(dataclasses.replace(case, dtype=torch.float64))
    for rank in ranks[size]:
        for name, value in exact["gradient"].items():
            if not name.endswith("k_proj.bias"):  # 0 up to rounding: shifting all keys changes no softmax
                actual, ordinary = rank["case"][case]["gradient"][name], one["gradient"][name]
                assert_within_budget(actual, ordinary, value, torch.float32, name)


@pytest.mark.parametrize(("size", "case"), list(itertools.product((2, 4), BFLOAT16)), ids=str)
def test_bfloat16_policies_differ_from_one_process_by_the_rounding_of_shares(
    size: int, case: Case, ranks: dict[int, Any]
) -> None:
    exact = one_process(case)
    for rank in ranks[size]:
        many, one = rank["bfloat16"][case]
        assert many["gradient"]["log_sigma"].dtype == torch.float32
        for name, value in one["gradient"].items():
            assert many["gradient"][name].dtype == torch.float32
            if not name.endswith("k_proj.bias"):
                assert (many["gradient"][name] - value).norm() <= bfloat16_bound(size) * value.norm(), name
        assert not torch.equal(one["gradient"]["norm.weight"], exact["gradient"]["norm.weight"]), "no mixed precision"


@pytest.mark.parametrize("size", [2, 4])
def test_a_flat_shard_of_the_head_is_refused_with_what_to_do(size: int, ranks: dict[int, Any]) -> None:
    for rank in ranks[size]:
        assert "one rank's flat shard (FSDP1, ZeRO-3)" in rank["refused"]
        assert "compute the loss inside the wrapped forward" in rank["refused"]


def test_a_sharded_log_sigma_is_not_summed_twice(ranks: dict[int, Any]) -> None:
    assert all("keep the handle out of the wrapped module" in rank["sharded handle"] for rank in ranks[2])


@pytest.mark.parametrize(("size", "average"), list(itertools.product((2, 4), (False, True))))
def test_a_gathered_weight_gets_the_sum_or_mean_of_the_ranks_gradients(
    size: int, average: bool, ranks: dict[int, Any]
) -> None:
    for dtype, bound in (
        (torch.float64, BOUND),
        (torch.bfloat16, 2.0**-8),
    ):  # 16-bit shares are summed, then rounded once
        expected = sum(split.weight_gradient(dtype, rank).double() for rank in range(size)) / (size if average else 1)
        whole = torch.cat([rank["weight"][average][str(dtype)] for rank in ranks[size]])
        assert whole.dtype == dtype and whole.shape == expected.shape
        assert ((whole - expected).abs() <= bound * expected.abs() + 1e-15).all()


@pytest.mark.parametrize("size", [2, 4])
def test_an_averaged_float16_gradient_stays_in_range(size: int, ranks: dict[int, Any]) -> None:
    assert all((rank["halves"] == 40000).all() for rank in ranks[size])


@pytest.mark.parametrize("preset", ["alp-token", "alp-sequence", "alp-cum-token"])
@pytest.mark.parametrize("size", [2, 4])
def test_slices_of_sequences_sum_to_the_gradients_of_whole_ones(size: int, preset: str, ranks: dict[int, Any]) -> None:
    one = split.context_parallel_update(False, preset)
    for rank in ranks[size]:
        assert_same_update(rank["sequence"][preset], one)
        assert float(rank["sequence"][preset]["loss"]) == pytest.approx(float(one["loss"]), rel=1e-12)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    run = resumed.Run(Case())
    for number in range(3):
        run.step(number)
    return run.weights()


# AdamW divides a gradient by its size: a gradient of 0 that summation leaves at 1e-17 becomes 1e-9 of a step
RESUME_BOUND = 1e-10


def assert_resumed(actual: dict[str, Any], expected: dict[str, Tensor]) -> None:
    assert actual["position"]["seed"] == 0 and actual["position"]["step"] == 1
    for name, value in expected.items():
        bound = 1e-6 if name == "log_sigma" else RESUME_BOUND
        assert (actual["weights"][name] - value).abs().max() <= bound, name


@pytest.mark.parametrize("position", range(len(RESUMED)), ids=[str(c) for c in RESUMED])
def test_four_ranks_go_on_from_the_checkpoint_of_two(
    position: int, ranks: dict[int, Any], uninterrupted: dict[str, Tensor]
) -> None:
    for rank in ranks[4]:
        assert_resumed(rank["resumed"][position], uninterrupted)


@pytest.mark.parametrize("source", [str(c) for c in RESUMED])
@pytest.mark.usefixtures("ranks")
def test_one_process_goes_on_from_the_checkpoint_of_four(
    source: str, folder: Path, uninterrupted: dict[str, Tensor]
) -> None:
    (alone,) = resumed.go_on([Case()], f"{folder}/4", source)
    assert_resumed(alone, uninterrupted)


def test_the_fsdp2_example_trains_saves_and_goes_on(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "fsdp2.py"
    first, second = processes.run_script(example, 2, tmp_path)
    assert [line.split(":")[0] for line in first.splitlines()[:3]] == ["step 0", "step 1", "step 2"]
    assert "loaded, one step more" in first.splitlines()[3] and second == ""


def test_one_process_gathers_nothing_and_sums_nothing() -> None:
    x = torch.ones(2, 3)
    assert gather_weight(x) is x and gather_sequence(x) is x
