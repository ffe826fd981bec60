"""Two gloo ranks with FSDP2 or DDP take the same step as one process: gradients, norm, noise, weights, state."""

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from alp.config import TrainConfig
from alp.errors import UserError
from alp.ranks.world import World
from alp.train import train
from tests.support import sharded
from tests.support.compare import likely_order_bound
from tests.support.sharded import CASES, RANKS

BOUND = likely_order_bound(sharded.ROUNDINGS, torch.float32)  # relative to each tensor's largest element


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each rank's results for every case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(sharded.work, args=(str(folder), port), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = BOUND) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert (actual[name] - value).abs().max() <= bound * value.abs().max() + 1e-9, name


EXACT = [name for name, case in CASES.items() if case.compute_dtype is None]


@pytest.mark.parametrize("name", EXACT)
def test_sharded_ranks_make_the_gradient_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    one = sharded.one_step(CASES[name], World("cpu"), sharded=False)
    assert max(float(g.abs().max()) for g in one["gradient"].values()) > 0.01
    for rank in ranks:
        assert_close(rank[name]["gradient"], one["gradient"])
        assert rank[name]["grad_norm"] == pytest.approx(float(one["grad_norm"]), rel=1e-5)
    total = sum(float(rank[name]["loss"]) for rank in ranks)
    assert total == pytest.approx(float(one["loss"]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_each_row_meets_the_noise_of_one_process(name: str, ranks: list[dict[str, Any]]) -> None:
    one = sharded.one_step(CASES[name], World("cpu"), sharded=False)
    assert torch.equal(torch.cat([rank[name]["noisy_input"] for rank in ranks]), one["noisy_input"])
    torch.testing.assert_close(torch.cat([rank[name]["clean"] for rank in ranks]), one["clean"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_sampler_saved_copy_and_every_rank_hold_the_same_whole_weights(name: str, ranks: list[dict[str, Any]]) -> None:
    first, case = ranks[0][name], CASES[name]
    assert first["whole"].keys() == first["weight"].keys()
    for key, value in first["weight"].items():
        assert torch.equal(first["whole"][key], value) and torch.equal(ranks[1][name]["weight"][key], value)
    assert first["sampler"].keys() == ranks[1][name]["sampler"].keys()
    for key, value in first["sampler"].items():
        assert torch.equal(ranks[1][name]["sampler"][key], value)
    if case.path != "int8":
        assert first["sampler"].keys() >= first["served"].keys()
        for key, value in first["served"].items():
            assert torch.equal(first["sampler"][key], value.to(first["sampler"][key].dtype)), key
    if "log_sigma" in first:
        assert torch.equal(first["log_sigma"], ranks[1][name]["log_sigma"])
    assert all(rank[name]["restored"] for rank in ranks)


def test_a_clipped_gradient_has_the_norm_asked_for(ranks: list[dict[str, Any]]) -> None:
    gradient = ranks[0]["clipped"]["gradient"]
    norm = torch.stack([g.norm() for name, g in gradient.items() if name != "log_sigma"]).norm()
    assert float(norm) == pytest.approx(CASES["clipped"].update["grad_clip"], rel=1e-3)
    assert float(ranks[0]["clipped"]["grad_norm"]) > 1


def test_bfloat16_compute_keeps_float32_weights_gradients_and_sigma(ranks: list[dict[str, Any]]) -> None:
    case = CASES["bfloat16"]
    one = sharded.one_step(dataclasses.replace(case, compute_dtype=None), World("cpu"), sharded=False)
    for rank in ranks:
        out = rank["bfloat16"]
        assert out["dtypes"] == {torch.float32} and out["log_sigma"].dtype == torch.float32
        assert out["noisy_input"].dtype == torch.bfloat16
        assert torch.equal(out["clean"], out["clean_of_plain"]), "the copy that is evaluated computes otherwise"
        for name, value in one["gradient"].items():  # bfloat16 rounds by 2^-9, in three layers
            assert (out["gradient"][name] - value).norm() <= 0.1 * value.norm(), name


def test_accumulating_without_communication_changes_no_gradient(ranks: list[dict[str, Any]]) -> None:
    one = sharded.accumulate(World("cpu"))
    for rank in ranks:
        assert_close(rank["accumulated"]["gradient"], one["gradient"])


def test_what_one_process_cannot_shard_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one process does not shard"):
        train(TrainConfig(runs=tmp_path, parallel="fsdp", compute_dtype="bfloat16"))
    with pytest.raises(UserError, match="compute_dtype='bfloat16'; it needs parallel='fsdp'"):
        TrainConfig(compute_dtype="bfloat16")
