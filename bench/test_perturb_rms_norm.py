"""u = h + sigma * eps and y = RMSNorm(u), in one kernel and in two, compared with the norm alone.

The limit is copies of h: forward moves three tensors of its size (h, u, y), backward four (du, dy, u, dh). "no noise"
marks variants that compute only the norm of h; their roofline counts only the bytes of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alp_kernels import perturb_rms_norm

from . import perturb, roofline
from .cases import PerturbCase, perturb_cases
from .contest import Contest, Group, Turn, Variant, compile_unavailable, engine_unavailable, package_unavailable
from .perturb import COORDINATES, SIGMA, Check, check_copy, check_noise, check_ours, copy

REFERENCE = "eager: h + sigma * randn_like(h), RMSNorm"
LIMIT = "copy of h (limit)"
EPS = 1e-6


class Inputs(NamedTuple):
    h: Tensor  # (N, D)
    weight: Tensor  # (D,)
    log_sigma: Tensor  # () float32
    du: Tensor  # (N, D)
    dy: Tensor  # (N, D)


Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor]]
"""Maps h, weight and log_sigma to u (None without noise) and y."""


def make_inputs(device: torch.device, case: PerturbCase) -> Inputs:
    h, log_sigma, du = perturb.make_inputs(device, case)
    generator = torch.Generator(device).manual_seed(1)
    weight = 1 + 0.1 * torch.randn(case.channels, generator=generator, device=device)
    dy = torch.randn(h.shape, generator=generator, device=device).to(case.dtype)
    return Inputs(h, weight.to(case.dtype).requires_grad_(), log_sigma, du, dy)


# ------------------------------------------------------------------ the variants


def rms_norm(u: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as decoders compute it: in float32, rounded before the multiplication by weight."""
    wide = u.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(u.dtype)


def eager(h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    u = perturb.eager(h, log_sigma)
    return u, rms_norm(u, weight)


@functools.cache
def _compiled() -> Way:
    return torch.compile(eager, dynamic=False)


def compiled(h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[Tensor | None, Tensor]:
    return _compiled()(h, weight, log_sigma)


def in_one(engine: str, h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    return perturb_rms_norm(h, weight, log_sigma, eps=EPS, engine=engine, **COORDINATES)


def in_two(engine: str, h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    u = perturb.ours(engine)(h, log_sigma)
    return u, torch.nn.functional.rms_norm(u, weight.shape, weight, EPS)


def eager_alone(h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[None, Tensor]:
    return None, rms_norm(h, weight)


def liger_alone(h: Tensor, weight: Tensor, log_sigma: Tensor) -> tuple[None, Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    in_place = False  # in place, backward would overwrite dy, which the next run needs; the bytes moved are the same
    return None, LigerRMSNormFunction.apply(h, weight, EPS, 0.0, "llama", in_place)


def liger_unavailable(device: torch.device) -> str | None:
    if device.type == "cpu":
        return "liger-kernel RMSNorm: needs a GPU"
    return package_unavailable("liger-kernel", "liger_kernel", wanted="0.8.")(device)


# ------------------------------------------------------------------ what is timed, and its check


def forward(way: Way, inputs: Inputs) -> Callable[[], tuple[Tensor | None, Tensor]]:
    def run() -> tuple[Tensor | None, Tensor]:
        with torch.no_grad():
            return way(inputs.h, inputs.weight, inputs.log_sigma)

    return run


def forward_backward(way: Way, inputs: Inputs) -> Callable[[], tuple[Tensor | None, ...]]:
    """Returns u, y, dh, dweight and, with noise, dlog_sigma."""

    def run() -> tuple[Tensor | None, ...]:
        u, y = way(inputs.h, inputs.weight, inputs.log_sigma)
        if u is None:
            return u, y, *torch.autograd.grad(y, (inputs.h, inputs.weight), inputs.dy)
        wanted = (inputs.h, inputs.weight, inputs.log_sigma)
        return u, y, *torch.autograd.grad((u, y), wanted, (inputs.du, inputs.dy))

    return run


def check(noise: Check, inputs: Inputs, returned: tuple[Tensor | None, ...]) -> None:
    """Check u with `noise`, and y and the gradients against float64 formulas of the returned u.

    Bounds are relative to a norm: 3 machine epsilons for a 16-bit dtype; 1e-5 for float32, the rounding of long sums.
    """
    u, y, *gradients = returned
    bound = 1e-5 if inputs.h.dtype == torch.float32 else 3 * torch.finfo(inputs.h.dtype).eps
    h, weight, dy = (x.detach().double() for x in (inputs.h, inputs.weight, inputs.dy))
    if u is not None:
        noise(inputs.h, u)
    work = h if u is None else u.detach().double()
    rstd = (work.square().mean(1, keepdim=True) + EPS).rsqrt()
    x = work * rstd
    close("y", y, x * weight, bound)
    if not gradients:
        return
    dx = dy * weight
    dh = rstd * (dx - x * (dx * x).mean(1, keepdim=True))
    if u is not None:
        dh = dh + inputs.du.double()
        # u - h is the noise after rounding, so the bound is a tenth of the size of a random sum
        dlog_sigma, spread = (dh * (work - h)).sum(), SIGMA * dh.norm()
        error = abs(float(gradients[2]) - float(dlog_sigma))
        assert error < 0.1 * float(spread), f"dlog_sigma is {float(gradients[2])}, not {float(dlog_sigma)}"
    close("dh", gradients[0], dh, bound)
    close("dweight", gradients[1], (dy * x).sum(0), bound)


def close(name: str, found: Tensor | None, right: Tensor, bound: float) -> None:
    assert found is not None
    error = float((found.detach().double() - right).norm() / right.norm())
    assert error < bound, f"{name} is off by {error:.1e} of its norm"


# ------------------------------------------------------------------ groups


def variants(case: PerturbCase, with_backward: bool) -> Iterator[Variant]:
    alone = roofline.rms_norm_forward(case)
    if with_backward:
        alone += roofline.rms_norm_backward(case)
    ways: list[tuple[str, Way, Check, dict[str, Any]]] = []
    for engine in ("triton", "native", "reference"):
        options = {"unavailable": engine_unavailable(engine)}
        ways.append((f"alp_kernels {engine}, one op", functools.partial(in_one, engine), check_ours, options))
        if engine != "reference":
            name = f"alp_kernels {engine}, then torch rms_norm"
            ways.append((name, functools.partial(in_two, engine), check_ours, options))
    options = {"cost": alone, "unavailable": liger_unavailable}
    ways += [
        ("liger-kernel RMSNorm alone (no noise)", liger_alone, check_noise, options),
        (REFERENCE, eager, check_noise, {}),
        ("eager RMSNorm alone (no noise)", eager_alone, check_noise, {"cost": alone}),
        ("torch.compile of that", compiled, check_noise, {"unavailable": compile_unavailable}),
    ]
    yield Variant(LIMIT, copy, check_copy, cost=roofline.perturb_forward(case))
    for name, way, noise, options in ways:
        run = functools.partial(forward_backward if with_backward else forward, way)
        yield Variant(name, run, functools.partial(check, noise), **options)


def cost(case: PerturbCase, with_backward: bool) -> roofline.Cost:
    forward = roofline.perturb_rms_norm_forward(case)
    return forward + roofline.perturb_rms_norm_backward(case) if with_backward else forward


def groups(device: torch.device, smoke: bool) -> list[Group]:
    return [
        Group(
            op="perturb + RMSNorm forward + backward" if with_backward else "perturb + RMSNorm forward",
            case=case,
            inputs=functools.partial(make_inputs, case=case),
            variants=tuple(variants(case, with_backward)),
            reference=REFERENCE,
            limit=LIMIT,
            limit_scale=3.5 if with_backward else 1.5,
            limit_text=f"{'3.5' if with_backward else '1.5'} copies of h, {case.mib:.0f} MiB, in this run",
            num_passes=3,
            cost=cost(case, with_backward),
            wants=None if case.default else "all_cases",
        )
        for case in perturb_cases(device, smoke)
        for with_backward in (False, True)
    ]


def test_perturb_rms_norm(turn: Turn, contest: Contest, benchmark: Any) -> None:
    contest.play(turn, benchmark)
