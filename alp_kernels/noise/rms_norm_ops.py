"""perturb_rms_norm as an operator: what a compiled graph calls. Arguments and tensors as in ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine import pick
from ..reference import Norm
from ..stream import check_stream
from . import ops

ops.library.define(
    "perturb_rms_norm(Tensor hidden, Tensor weight, Tensor log_sigma, Tensor at, Tensor place, Tensor? row_ids, float eps, "
    "float offset, str scale, str rounding, str? engine) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=ops.TAGS,
)
ops.library.define(
    "perturb_rms_norm_backward(Tensor du, Tensor dy, Tensor u, Tensor weight, Tensor sigma, Tensor rstd, Tensor rms, Tensor at, "
    "Tensor place, Tensor? row_ids, float eps, float offset, bool needs_dweight, bool needs_dsigma, str? engine)"
    " -> (Tensor, Tensor, Tensor)",
    tags=ops.TAGS,
)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    log_sigma: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    eps: float,
    offset: float,
    scale: str,
    rounding: str,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u and y like hidden, sigma (), rstd (N,) and, where scale="rms", rms (N,), else (0,)."""
    stream, num_rows = ops.stream_of(at, int(place[1]), row_ids), hidden.numel() // hidden.shape[-1]
    check_stream("perturb_rms_norm", stream, num_rows, hidden.device)
    sigma = log_sigma.detach().reshape(()).exp()
    rows, norm = hidden.detach().reshape(num_rows, -1).contiguous(), Norm(weight.detach().contiguous(), eps, offset)
    u, y, rstd, rms = pick(engine, hidden.device).perturb_rms_norm_fwd(rows, sigma, stream, scale, rounding, norm)
    rms = rstd.new_empty(0) if rms is None else rms
    return u.view(hidden.shape), y.view(hidden.shape), sigma, rstd, rms


def _forward_fake(hidden: Tensor, weight: Tensor, log_sigma: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    num_rows, scale = hidden.numel() // hidden.shape[-1], rest[5]
    u, y = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    rstd = hidden.new_empty(num_rows, dtype=ops.real(hidden))
    return u, y, log_sigma.new_empty(()), rstd, rstd.new_empty(num_rows if scale == "rms" else 0)


def _backward(
    du: Tensor,
    dy: Tensor,
    u: Tensor,
    weight: Tensor,
    sigma: Tensor,
    rstd: Tensor,
    rms: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    eps: float,
    offset: float,
    needs_dweight: bool,
    needs_dsigma: bool,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh like u, dweight (D,) and dlog_sigma (), each (0,) where it is not needed."""
    dh, dsigma, dweight = pick(engine, u.device).perturb_rms_norm_bwd(
        *(x.reshape(-1, u.shape[-1]).contiguous() for x in (du, dy, u)),
        rstd,
        rms if len(rms) else None,
        ops.stream_of(at, int(place[1]), row_ids),
        Norm(weight.contiguous(), eps, offset),
        needs_dsigma,
        needs_dweight,
    )
    dlog_sigma = sigma.new_empty(0) if dsigma is None else (sigma * dsigma).to(sigma.dtype)
    return dh.view(u.shape), weight.new_empty(0) if dweight is None else dweight, dlog_sigma


def _backward_fake(
    du: Tensor, dy: Tensor, u: Tensor, weight: Tensor, sigma: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_dweight, needs_dsigma = rest[7:9]
    dweight = weight.new_empty(weight.shape if needs_dweight else (0,))
    return u.new_empty(u.shape), dweight, sigma.new_empty(() if needs_dsigma else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, log_sigma, at, place, row_ids, eps, offset, _, _, engine = inputs
    u, _, sigma, rstd, rms = output
    ctx.mark_non_differentiable(sigma, rstd, rms)
    ctx.save_for_backward(u, weight, sigma, rstd, rms, at, place, row_ids)
    ctx.numbers, ctx.engine, ctx.sigma_shape = (eps, offset), engine, log_sigma.shape


def _gradient(ctx: Any, du: Tensor, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    _, needs_dweight, needs_dsigma = ctx.needs_input_grad[:3]
    dh, dweight, dlog_sigma = torch.ops.alp_kernels.perturb_rms_norm_backward(
        du, dy, *ctx.saved_tensors, *ctx.numbers, needs_dweight, needs_dsigma, ctx.engine
    )
    dlog_sigma = dlog_sigma.reshape(ctx.sigma_shape) if needs_dsigma else None
    return dh, dweight if needs_dweight else None, dlog_sigma, *[None] * 8


ops.register("perturb_rms_norm", _forward, _forward_fake, setup=_setup, gradient=_gradient)
ops.register("perturb_rms_norm_backward", _backward, _backward_fake)
