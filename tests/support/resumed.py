"""Steps of a sharded update, saved and loaded with torch.distributed.checkpoint; for test_parallel.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from alp_kernels import Perturbation, attach
from tests.support import wrapped
from tests.support.wrapped import Case


class Run:
    """A model, its perturbation and its optimiser, over all ranks or in one process."""

    def __init__(self, case: Case) -> None:
        self.case = case
        model = wrapped.wrapped_model(case)
        self.policy = wrapped.Policy(model)
        self.handle: Perturbation = attach(model, sigma=0.05)
        self.module = wrapped.wrapped(self.policy, case, None)
        groups = [{"params": self.module.parameters()}, self.handle.param_group(lr=0.05)]
        self.optimiser = torch.optim.AdamW(groups, lr=0.01)
        # one tree for the checkpoint: get_state_dict names the optimiser's parameters by it
        self.tree = nn.ModuleDict({"policy": self.module, "noise": self.handle})

    def step(self, number: int) -> None:
        alone = self.case.wrap == "none"
        rank, size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        part = wrapped.split(wrapped.make_batch(), rank, size)
        self.optimiser.zero_grad()
        with self.handle.perturbed(step=number, row_ids=part["row_ids"]):
            (size * self.module(part, "inside").loss).backward()
        self.handle.sum_gradient(average=True)
        self.optimiser.step()

    def state(self) -> dict[str, Any]:
        model, optimiser = get_state_dict(self.tree, self.optimiser)
        return {"model": model, "optimiser": optimiser}

    def save(self, folder: str) -> None:
        dcp.save(self.state(), checkpoint_id=folder)

    def load(self, folder: str) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.tree, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])

    def weights(self) -> dict[str, Tensor]:
        out = {"log_sigma": self.handle.log_sigma.detach().clone()}
        if self.case.wrap.startswith("fsdp1"):
            with FullyShardedDataParallel.summon_full_params(self.module):
                return out | {wrapped.clean_name(n): p.detach().clone() for n, p in self.module.named_parameters()}
        for name, p in self.module.named_parameters():
            out[wrapped.clean_name(name)] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        return out


def begin(cases: list[Case], folder: str) -> None:
    """Take two steps of each case and save a checkpoint."""
    for case in cases:
        run = Run(case)
        run.step(0)
        run.step(1)
        run.save(f"{folder}/{case}")


def go_on(cases: list[Case], folder: str, source: str | None = None) -> list[dict[str, Any]]:
    """Load a checkpoint, take a third step and return the weights; `source` names the case that saved it."""
    out = []
    for case in cases:
        run = Run(case)
        run.handle.seed = 77  # the checkpoint's seed and position must come back
        run.load(f"{folder}/{source or case}")
        position = run.handle.get_extra_state()
        run.step(2)
        out.append({"weights": run.weights(), "position": position})
    return out
