"""Roofline: the bytes and FLOP of each op, the machine's rates, and the least time that follows.

Bytes and FLOP are those of the algorithm, not of a kernel: every input is read once, every result is written once, and
values that need not be in memory (noise, logits) are not counted. The ceilings are measured in the same run: bandwidth
with a copy, FLOP rate with a large matrix product in the case's dtype. The least time is bytes over bandwidth or FLOP
over FLOP rate, whichever is larger.
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
    """h read, u written: 2 N D numbers. u = h + sigma * eps: 2 N D FLOP; generating eps is not counted."""
    size = case.rows * case.channels
    return Cost(2 * size * case.dtype.itemsize, 2 * size)


def perturb_backward(case: PerturbCase) -> Cost:
    """du read: N D numbers (dh is du itself). sum(du * eps): 2 N D FLOP."""
    size = case.rows * case.channels
    return Cost(size * case.dtype.itemsize, 2 * size)


def perturb_rms_norm_forward(case: PerturbCase) -> Cost:
    """h read, u and y written: 3 N D numbers; weight, rstd: D + N. FLOP for each of N D: u 2, sum of u^2 2, y 2."""
    size = case.rows * case.channels
    return Cost((3 * size + case.channels) * case.dtype.itemsize + 4 * case.rows, 6 * size)


def perturb_rms_norm_backward(case: PerturbCase) -> Cost:
    """du, dy and u read, dh written: 4 N D numbers; weight, dweight, rstd: 2 D + N.

    FLOP for each of N D, 12 in all: x, g, the sum of g * x, dh (4), sum of dh * eps (2), sum of dy * x (2).
    """
    size = case.rows * case.channels
    return Cost((4 * size + 2 * case.channels) * case.dtype.itemsize + 4 * case.rows, 12 * size)


def rms_norm_forward(case: PerturbCase) -> Cost:
    """h read, y written: 2 N D numbers; weight, rstd: D + N. 4 FLOP for each of N D."""
    size = case.rows * case.channels
    return Cost((2 * size + case.channels) * case.dtype.itemsize + 4 * case.rows, 4 * size)


def rms_norm_backward(case: PerturbCase) -> Cost:
    """dy and h read, dh written: 3 N D numbers; weight, dweight, rstd: 2 D + N. 9 FLOP for each of N D."""
    size = case.rows * case.channels
    return Cost((3 * size + 2 * case.channels) * case.dtype.itemsize + 4 * case.rows, 9 * size)


def head(case: HeadCase) -> Cost:
    """Forward and backward: three products of n x V x D, with n rows in the loss, 6 n V D FLOP.

    hidden (n D numbers) and weight read, their gradients written: (n + N + 2 V) D numbers. Logits need not be in memory.
    """
    numbers = (case.live + case.rows + 2 * case.vocab) * case.channels
    return Cost(numbers * case.dtype.itemsize, 6 * case.live * case.vocab * case.channels)


@dataclass(frozen=True)
class Ceilings:
    """The rates this machine reached in this run."""

    bytes_per_s: float  # of a copy, read and written bytes together
    flop_per_s: float  # of a matrix product in the case's dtype

    def least_ms(self, cost: Cost) -> float:
        return 1e3 * max(cost.bytes / self.bytes_per_s, cost.flop / self.flop_per_s)

    def is_bytes(self, cost: Cost) -> bool:
        """Whether bytes, not FLOP, set the least time."""
        return cost.bytes / self.bytes_per_s >= cost.flop / self.flop_per_s


def copy_bytes_per_s(device: torch.device, smoke: bool = False) -> float:
    """Return the bandwidth of a copy, counting read and written bytes.

    A GPU copies 1 GiB; its cache is overwritten before each run. A CPU copies 16 MiB, so source and target can stay in
    the last-level cache, as a small case can from run to run. An op larger than that cache stays far below this ceiling.
    """
    half = 2**16 if smoke else 2**24 if device.type == "cpu" else 2**30
    source = torch.zeros(half, dtype=torch.int8, device=device)
    target = torch.ones_like(source)
    return 2 * half / _seconds(device, smoke, lambda: target.copy_(source))


def product_flop_per_s(device: torch.device, dtype: torch.dtype, smoke: bool = False) -> float:
    """Return the FLOP rate of a square matrix product, 2 n^3 FLOP, into preallocated memory."""
    n = 64 if smoke else 3072 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _seconds(device, smoke, lambda: torch.mm(a, b, out=out))


def _seconds(device: torch.device, smoke: bool, function: Callable[[], Any]) -> float:
    """Return the fastest of at least four runs in at least 0.3 s: other load on the machine can only slow a run."""
    clock = Clock(device)
    while len(clock.ms) < 4 or (sum(clock.ms) < 300 and not smoke):
        clock.run(function)
    return min(clock.ms) / 1e3
