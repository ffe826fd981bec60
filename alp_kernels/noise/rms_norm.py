"""u = h + sigma * eps and y = RMSNorm(u) in one pass: a decoder layer's perturbed input and its attention's input.

Backward: g = dy (offset + weight); x = u rstd;  dh = du + rstd (g - x mean(g x));  dlog_sigma = sigma * sum(dh * eps);
dweight = sum_n dy x.   Derivation: docs/math.md, section 1
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_number, check_rate, check_tensor
from ..dtypes import DTYPES
from ..engine import check_name, pick
from ..operators import gate
from ..reference import Norm
from ..stream import Coordinates
from .operators import NormInputs, in_tensors, perturb_rms_norm_operator
from .perturb import Draw, check_perturb, check_rows


class PerturbRMSNorm(torch.autograd.Function):
    """Saves u (which the residual stream keeps alive anyway), weight, sigma, the row ids and one or two numbers per row."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, log_sigma: Tensor, eps: float, offset: float, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        norm = Norm(weight.detach().contiguous(), eps, offset)
        rows = h.reshape(-1, h.shape[-1]).contiguous()
        u, y, rstd, rms = draw.engine.perturb_rms_norm_fwd(
            rows, draw.sigma, draw.stream, draw.scale, draw.rounding, norm
        )
        u = u.view(h.shape)
        ctx.save_for_backward(u, rstd, rms, norm.weight)
        ctx.draw, ctx.sigma_shape, ctx.eps, ctx.offset = draw, log_sigma.shape, eps, offset
        return u, y.view(h.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, du: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        (u, rstd, rms, weight), draw = ctx.saved_tensors, ctx.draw
        _, needs_dweight, needs_dsigma = ctx.needs_input_grad[:3]
        du_rows, dy_rows, u_rows = (x.reshape(-1, u.shape[-1]).contiguous() for x in (du, dy, u))
        norm = Norm(weight, ctx.eps, ctx.offset)
        dh, dsigma, dweight = draw.engine.perturb_rms_norm_bwd(
            du_rows, dy_rows, u_rows, rstd, rms, draw.stream, norm, needs_dsigma, needs_dweight
        )
        sigma = draw.sigma
        dlog_sigma = None if dsigma is None else (sigma * dsigma).reshape(ctx.sigma_shape).to(sigma.dtype)
        return dh.view(u.shape), dweight, dlog_sigma, None, None, None


def perturb_rms_norm(
    hidden: Tensor,
    weight: Tensor,
    log_sigma: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    layer: int,
    row_ids: Tensor | None = None,
    row_start: int | Tensor = 0,
    eps: float = 1e-6,
    offset: float = 0.0,
    scale: str = "absolute",
    rounding: str = "nearest",
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`perturb` and the RMSNorm that follows it, in one pass over `hidden`, for custom decoder layers.

    Args:
        hidden, log_sigma, seed, step, layer, row_ids, row_start, scale, rounding, engine: as in `perturb`.
        weight: (D,) weight of the norm, float32 or a 16-bit dtype (float64 only if hidden is float64); differentiable.
        eps: added to the mean square. offset: added to the weight; 1 for Gemma's (1 + weight).

    Returns:
        (u, y), both like `hidden`: u is bitwise equal to `perturb`'s; y = u / sqrt(mean(u^2) + eps) * (offset + weight) is
        computed in float32 from the stored u and rounded once.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before any kernel runs. EngineUnavailable: see engine.pick.
    """
    where = "perturb_rms_norm"
    check_tensor(where, "weight", weight)
    check_perturb(where, hidden, log_sigma, scale, rounding)
    if weight.dtype not in DTYPES or (weight.dtype == torch.float64) > (hidden.dtype == torch.float64):
        raise TypeError(
            f"{where}: weight is {weight.dtype}; it needs float32, 16 bits, or float64 if hidden ({hidden.dtype}) is float64"
        )
    if weight.shape != hidden.shape[-1:]:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; hidden {tuple(hidden.shape)} needs ({hidden.shape[-1]},)"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{where}: weight is on {weight.device}; it needs hidden's device, {hidden.device}")
    check_rate(where, "eps", eps)
    check_number(where, "offset", offset)
    check_name(engine, f"{where}: engine")
    coordinates = Coordinates(seed, step, layer, row_ids, row_start).check(where)
    check_rows(where, hidden, row_ids)
    options = _Options(float(eps), float(offset), scale, rounding, engine)
    return _perturb_rms_norm(hidden, weight, log_sigma, coordinates, options)


class _Options(NamedTuple):
    eps: float
    offset: float
    scale: str
    rounding: str
    engine: str | None


def _in_graph(
    hidden: Tensor, weight: Tensor, log_sigma: Tensor, coordinates: Coordinates, options: _Options
) -> tuple[Tensor, Tensor]:
    ids = None if coordinates.row_ids is None else coordinates.row_ids.reshape(-1)
    at, place = in_tensors(coordinates)
    out = perturb_rms_norm_operator(NormInputs(hidden, weight, log_sigma, at, place, ids, *options))
    return out.u, out.y


@gate(graph=_in_graph)
def _perturb_rms_norm(
    hidden: Tensor, weight: Tensor, log_sigma: Tensor, coordinates: Coordinates, options: _Options
) -> tuple[Tensor, Tensor]:
    eps, offset, scale, rounding, engine = options
    stream = coordinates.stream("perturb_rms_norm", hidden.numel() // hidden.shape[-1], hidden.device)
    sigma = log_sigma.detach().reshape(()).exp()
    draw = Draw(pick(engine, hidden.device), stream, sigma, 0, scale, rounding)
    u, y = PerturbRMSNorm.apply(hidden, weight, log_sigma, eps, offset, draw)
    return u, y
