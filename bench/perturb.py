"""Variants of u = h + sigma * eps, the functions that are timed, and their checks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alp_kernels import normal, perturb
from alp_kernels.stream import NORMAL_BOUND

from .cases import PerturbCase

SIGMA = 0.1  # large, so that bfloat16 rounding does not hide the noise from the checks; times do not depend on it
COORDINATES: dict[str, Any] = {"seed": 1, "step": 2, "layer": 3}


class Inputs(NamedTuple):
    h: Tensor  # (N, D)
    log_sigma: Tensor  # () float32
    du: Tensor  # (N, D)


Way = Callable[[Tensor, Tensor], Tensor]
"""Maps h and log_sigma to u."""
Check = Callable[[Tensor, Tensor], None]
"""Takes h and u; raises an AssertionError if u is not h plus the right noise."""


def make_inputs(device: torch.device, case: PerturbCase) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    h, du = (torch.randn(case.rows, case.channels, generator=generator, device=device).to(case.dtype) for _ in range(2))
    return Inputs(h.requires_grad_(), torch.tensor(math.log(SIGMA), device=device, requires_grad=True), du)


# ------------------------------------------------------------------ the variants


def eager(h: Tensor, log_sigma: Tensor) -> Tensor:
    return h + log_sigma.exp().to(h.dtype) * torch.randn_like(h)


@functools.cache
def _compiled() -> Way:
    return torch.compile(eager, dynamic=False)


def compiled(h: Tensor, log_sigma: Tensor) -> Tensor:
    return _compiled()(h, log_sigma)


def released(h: Tensor, log_sigma: Tensor) -> Tensor:
    """Perturb as ALP's published code does: each call seeds a generator from a tensor; backward redraws the noise."""

    def inject(h: Tensor, log_sigma: Tensor, seed: Tensor) -> Tensor:
        generator = torch.Generator(h.device).manual_seed(int(seed))
        eps = torch.randn(h.shape, generator=generator, device=h.device, dtype=h.dtype)
        return h + log_sigma.exp().to(h.dtype) * eps

    seed = torch.tensor(17, device=h.device)
    if not torch.is_grad_enabled():
        return inject(h, log_sigma, seed)
    u: Tensor = checkpoint(inject, h, log_sigma, seed, use_reentrant=False)
    return u


def ours(engine: str) -> Way:
    return functools.partial(perturb, engine=engine, **COORDINATES)


# ------------------------------------------------------------------ what is timed, and its check


def forward(way: Way, inputs: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return way(inputs.h, inputs.log_sigma)

    return run


def forward_backward(way: Way, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        u = way(inputs.h, inputs.log_sigma)
        return u, *torch.autograd.grad(u, (inputs.h, inputs.log_sigma), inputs.du)

    return run


def copy(inputs: Any) -> Callable[[], Tensor]:
    source = inputs.h.detach()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def check_copy(inputs: Any, copied: Tensor) -> None:
    assert torch.equal(copied, inputs.h)


def check_noise(h: Tensor, u: Tensor) -> None:
    """Check that u - h is Gaussian noise of size sigma, by its first, second and fourth moments."""
    assert u.shape == h.shape and u.dtype == h.dtype
    noise = (u.detach().double() - h.detach().double()) / SIGMA
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        found, bound = float(noise.pow(power).mean()), 6 * math.sqrt(variance / noise.numel()) + 0.01 * moment
        assert abs(found - moment) < bound, f"mean of eps^{power} is {found}, not {moment} +- {bound}"


def check_ours(h: Tensor, u: Tensor) -> None:
    """Check that u is h plus the noise of the reference engine."""
    h = h.detach()
    eps = normal(*h.shape, **COORDINATES, device=h.device, engine="reference")
    atol = 2 * SIGMA * NORMAL_BOUND
    torch.testing.assert_close(
        u.detach(), (h.float() + SIGMA * eps).to(h.dtype), rtol=torch.finfo(h.dtype).eps, atol=atol
    )


def check_forward(check: Check, inputs: Inputs, u: Tensor) -> None:
    check(inputs.h, u)


def check_gradients(check: Check, way: Way, inputs: Inputs, returned: tuple[Tensor, ...]) -> None:
    u, dh, _ = returned
    check(inputs.h, u)
    assert torch.equal(dh, inputs.du)
    # with du = eps, sum(du * eps) is the sum of eps^2, about N * D; at small sizes unseeded noise would miss the bound at times
    torch.manual_seed(0)
    u = way(inputs.h, inputs.log_sigma)
    eps = (u - inputs.h).detach() / SIGMA
    (dlog_sigma,) = torch.autograd.grad(u, inputs.log_sigma, eps)
    assert abs(float(dlog_sigma) / (SIGMA * eps.numel()) - 1) < 0.02, float(dlog_sigma)
