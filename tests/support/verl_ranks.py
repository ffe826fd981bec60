"""One update by verl's engine in two gloo processes; rank 0 writes the result. Run by test_verl.py and test_verl_sigma.py.

python -m tests.support.verl_ranks MODEL OUT fsdp|fsdp2 [SETTINGS, as JSON]
"""

from __future__ import annotations

import json
import multiprocessing
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from tests.support import verl_cpu

verl_cpu.use_cpu()

import alp_kernels.integrations.verl_engine  # noqa: E402, F401 (registers the engine)


def work(rank: int, path: str, out: str, strategy: str, settings: str = "null") -> None:
    if strategy == "fsdp":
        verl_cpu.let_fsdp1_run(pytest.MonkeyPatch())
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{out}.init")
    engine = verl_cpu.make_engine(path, strategy=strategy, settings=json.loads(settings))
    batch = verl_cpu.make_batch(B=2, seed=rank)
    if engine.alp.needs_match:
        batch = verl_cpu.near_policy(path, verl_cpu.make_batch(B=8, seed=rank), seed=rank)
    with engine.train_mode():
        output = engine.train_batch(batch, verl_cpu.make_loss("alp_sequence"))
    if strategy == "fsdp":  # whose export moves the weights to a GPU
        with FullyShardedDataParallel.state_dict_type(engine.module, StateDictType.FULL_STATE_DICT):
            state = engine.module.state_dict()
    else:
        state = {name: value.detach().clone() for name, value in engine.get_per_tensor_param()[0]}
    seen = [torch.zeros_like(engine.alp.log_sigma.data) for _ in range(2)]
    dist.all_gather(seen, engine.alp.log_sigma.data)
    assert torch.equal(*seen), "sigma differs between the ranks"
    metrics = {name: float(value.aggregate()) for name, value in output["metrics"].items() if name.startswith("alp/")}
    of_ranks: list[dict[str, float]] = [{}, {}]
    dist.all_gather_object(of_ranks, metrics)
    if rank == 0:
        torch.save({"log_sigma": seen[0], "state": state, "metrics": of_ranks}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")  # importing verl takes most of the time: import once, then fork
    workers = [fork.Process(target=work, args=(rank, *sys.argv[1:5])) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode) for worker in workers))
