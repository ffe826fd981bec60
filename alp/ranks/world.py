"""Data-parallel ranks under torchrun: each rank's prompts, and reductions over ranks. One process is a world of size 1.

Gradients are summed explicitly, once per optimiser step. Losses are divided by the whole batch's counts, so the sum
over ranks is the one-process gradient, however the tokens are split. (DDP would average, and hook every micro-batch.)
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import UserError


class World:
    """This process's place among the ranks that torchrun started."""

    def __init__(self, device: str | None) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.device(name)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def share(self, num_items: int, num_parts: int) -> list[int]:
        """This rank's items of each of the `num_parts` equal parts of range(num_items), part by part."""
        per_part, per_rank = num_items // num_parts, num_items // num_parts // self.size
        starts = [part * per_part + self.rank * per_rank for part in range(num_parts)]
        return [start + i for start in starts for i in range(per_rank)]

    def sum(self, values: list[float]) -> list[float]:
        """Sum a few numbers over the ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(total.tolist())

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the ranks, one all-reduce per dtype; FSDP sums sharded ones itself."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for p in parameters:
            if isinstance(p, DTensor):
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype.setdefault(p.dtype, []).append(p.grad)
        for grads in by_dtype.values():
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat)
            for g, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
                g.copy_(part.view_as(g))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def peak_mib(self) -> float:
        """Peak memory of this rank: what torch allocated on its GPU, else the process's resident set; MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def random_state(device: torch.device) -> list[Tensor]:
    """Torch's random state of this rank: the CPU's, and its GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1].cpu(), device)
