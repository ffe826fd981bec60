"""What an algorithm must move and compute, and what this machine can: the least time an op could take.

Bytes and FLOP are counted from the algorithm, not from a kernel: every input is read once, every result written once,
and what need not be in memory (noise, logits) is not counted. The ceilings are measured in the same run: bytes by a
copy, FLOP by a large matrix product in the case's dtype. The least time is the larger of the two quotients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cases import HeadCase, PerturbCase
from .measure import Clock


@dataclass(frozen=True)
class Cost:
    bytes: int  # read and written
    flop: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flop + other.flop)


def perturb_forward(case: PerturbCase) -> Cost:
    """h read, u written: 2 N D numbers. u = h + sigma * eps: 2 N D FLOP; making eps is not counted."""
    size = case.rows * case.channels
    return Cost(2 * size * case.dtype.itemsize, 2 * size)


def perturb_backward(case: PerturbCase) -> Cost:
    """du read: N D numbers (dh is du itself). sum(du * eps): 2 N D FLOP."""
    size = case.rows * case.channels
    return Cost(size * case.dtype.itemsize, 2 * size)


def perturb_rms_norm_forward(case: PerturbCase) -> Cost:
    """h read, u and y written: 3 N D numbers; weight, rstd: D + N of them. 2 FLOP for u, 2 for its square, 2 for y."""
    size = case.rows * case.channels
    return Cost((3 * size + case.channels) * case.dtype.itemsize + 4 * case.rows, 6 * size)


def perturb_rms_norm_backward(case: PerturbCase) -> Cost:
    """du, dy and u read, dh written: 4 N D numbers; weight, dweight, rstd: 2 D + N.

    FLOP for each of N D: x, g, g * x summed, dh (4), sum of dh * eps (2), sum of dy * x (2): 12.
    """
    size = case.rows * case.channels
    return Cost((4 * size + 2 * case.channels) * case.dtype.itemsize + 4 * case.rows, 12 * size)


def rms_norm_forward(case: PerturbCase) -> Cost:
    """h read, y written: 2 N D numbers; weight, rstd: D + N. 4 FLOP each."""
    size = case.rows * case.channels
    return Cost((2 * size + case.channels) * case.dtype.itemsize + 4 * case.rows, 4 * size)


def rms_norm_backward(case: PerturbCase) -> Cost:
    """dy and h read, dh written: 3 N D numbers; weight, dweight, rstd: 2 D + N. 9 FLOP each."""
    size = case.rows * case.channels
    return Cost((3 * size + 2 * case.channels) * case.dtype.itemsize + 4 * case.rows, 9 * size)


def head(case: HeadCase) -> Cost:
    """Forward and backward: three products of n x V x D with n rows in the loss, 6 n V D FLOP.

    hidden (n D of it) and weight read, their gradients written: (n + N + 2 V) D numbers. Logits need not be in memory.
    """
    numbers = (case.live + case.rows + 2 * case.vocab) * case.channels
    return Cost(numbers * case.dtype.itemsize, 6 * case.live * case.vocab * case.channels)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run."""

    bytes_per_s: float  # of a copy, read and written bytes together
    flop_per_s: float  # of a matrix product in the case's dtype

    def least_ms(self, cost: Cost) -> float:
        return 1e3 * max(cost.bytes / self.bytes_per_s, cost.flop / self.flop_per_s)

    def is_bytes(self, cost: Cost) -> bool:
        """Whether bytes, not FLOP, set the least time."""
        return cost.bytes / self.bytes_per_s >= cost.flop / self.flop_per_s


def copy_bytes_per_s(device: torch.device, smoke: bool = False) -> float:
    """Bandwidth of a copy, read and written bytes together: 1 GiB on a GPU, whose cache is overwritten before each run.

    16 MiB on a CPU, whose last cache then holds source and target, as it may hold a case from one run to the next: an op
    larger than that cache stays far from this ceiling.
    """
    half = 2**16 if smoke else 2**24 if device.type == "cpu" else 2**30
    source = torch.zeros(half, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return 2 * half / _seconds(device, smoke, lambda: target.copy_(source))


def product_flop_per_s(device: torch.device, dtype: torch.dtype, smoke: bool = False) -> float:
    """Rate of a square matrix product, 2 n^3 FLOP, into memory that is already there."""
    n = 64 if smoke else 3072 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _seconds(device, smoke, lambda: torch.mm(a, b, out=out))


def _seconds(device: torch.device, smoke: bool, function: Callable[[], Any]) -> float:
    """The fastest of the runs of 0.3 s, four at least: whatever else the machine does only slows them down."""
    clock = Clock(device)
    while len(clock.ms) < 4 or (sum(clock.ms) < 300 and not smoke):
        clock.run(function)
    return min(clock.ms) / 1e3
