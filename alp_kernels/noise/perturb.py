"""u = h + sigma * eps(seed, step, layer, row, channel): the input of one decoder layer, perturbed.

Backward: dh = du; dlog_sigma = sigma * sum(du * eps).   Derivation: docs/math.md, section 1
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_tensor
from ..dtypes import DTYPES, real
from ..engine import Engine, check_name, pick
from ..operators import gate
from ..stream import Coordinates, Stream, is_shaped, misshaped
from .operators import PerturbInputs, in_tensors, perturb_operator

SCALES = ("absolute", "rms")
ROUNDINGS = ("nearest", "stochastic")


class Draw(NamedTuple):
    """How a call draws its noise."""

    engine: Engine
    stream: Stream
    sigma: Tensor  # ()
    position: int  # index of sigma's logarithm in log_sigma
    scale: str
    rounding: str


class Perturb(torch.autograd.Function):
    """Saves sigma, the row ids and, for scale="rms", one number per row, but no tensor of the size of `h`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, log_sigma: Tensor, draw: Draw) -> Tensor:
        u, rms = draw.engine.perturb_fwd(h.contiguous(), draw.sigma, draw.stream, draw.scale, draw.rounding)
        if rms is not None:
            ctx.save_for_backward(rms)
        ctx.draw, ctx.sigma_shape = draw, log_sigma.shape
        return u

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        dlog_sigma = None
        if ctx.needs_input_grad[1]:
            (rms,), draw = ctx.saved_tensors or (None,), ctx.draw
            dsigma = draw.engine.perturb_bwd(du.contiguous(), draw.stream, rms)
            dlog_sigma = draw.sigma.new_zeros(ctx.sigma_shape)
            torch.mul(draw.sigma, dsigma, out=dlog_sigma.view(-1)[draw.position])
        return du, dlog_sigma, None


def perturb(
    hidden: Tensor,
    log_sigma: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    layer: int,
    row_ids: Tensor | None = None,
    row_start: int | Tensor = 0,
    scale: str = "absolute",
    rounding: str = "nearest",
    engine: str | None = None,
) -> Tensor:
    """Add Gaussian noise of size exp(log_sigma) to `hidden` (ALP, arXiv 2603.19470: delta_l ~ N(0, sigma_l^2 I)).

    Args:
        hidden: (..., D), float32, bfloat16, float16 or float64; any strides. Its leading axes flatten to N rows.
        log_sigma: () or (1,) float32 (or float64 if hidden is float64), the natural logarithm of sigma; differentiable.
        seed, step, layer: coordinates of the noise (64, 32 and 15 bits). Use one step value per optimiser step. In compiled
            code pass step and row_start as one-element int64 CPU tensors; new Python ints cause a recompile.
        row_ids: hidden's leading shape, or (N,) in the order of hidden's rows; int64 below 2^48: each row's global id. With
            them, packing, padding, batch order and micro-batch split change no bit. Without them, rows are row_start,
            row_start + 1, ...; a second call in the same step (another micro-batch) then needs a row_start past the first
            call's rows, or it repeats their noise.
        scale: "absolute", or "rms": sigma is in units of each row's root mean square (a constant for the gradient).
        rounding: "nearest" or "stochastic" (unbiased), applied when the float32 sum is stored in a 16-bit dtype.
        engine: "triton", "native", "reference" or None for the automatic choice.

    Returns:
        u, like `hidden`. Backward regenerates the noise, so nothing of hidden's size is saved.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before any kernel runs. EngineUnavailable: see engine.pick.
    """
    check_perturb("perturb", hidden, log_sigma, scale, rounding)
    check_name(engine, "perturb: engine")
    coordinates = Coordinates(seed, step, layer, row_ids, row_start).check("perturb")
    check_rows("perturb", hidden, row_ids)
    return _perturb(hidden, log_sigma, coordinates, scale, rounding, engine)


def _perturb_in_graph(
    hidden: Tensor, log_sigma: Tensor, coordinates: Coordinates, scale: str, rounding: str, engine: str | None
) -> Tensor:
    ids = None if coordinates.row_ids is None else coordinates.row_ids.reshape(-1)
    where = in_tensors(coordinates)
    return perturb_operator(PerturbInputs(hidden, log_sigma.reshape(1), *where, ids, scale, rounding, engine)).u


@gate(graph=_perturb_in_graph)
def _perturb(
    hidden: Tensor, log_sigma: Tensor, coordinates: Coordinates, scale: str, rounding: str, engine: str | None
) -> Tensor:
    stream = coordinates.stream("perturb", hidden.numel() // hidden.shape[-1], hidden.device)
    sigma = log_sigma.detach().reshape(()).exp()
    return Perturb.apply(hidden, log_sigma, Draw(pick(engine, hidden.device), stream, sigma, 0, scale, rounding))


def check_rows(where: str, hidden: Tensor, row_ids: Tensor | None) -> None:
    """Raise if row_ids is neither flat nor shaped like hidden's rows. The stream's check compares the number of rows."""
    if row_ids is not None and row_ids.dim() != 1 and not is_shaped(row_ids, hidden.shape[:-1]):
        raise misshaped(where, row_ids, hidden.shape[:-1], f"hidden {tuple(hidden.shape)} needs")


def check_perturb(where: str, hidden: Tensor, log_sigma: Tensor, scale: str, rounding: str) -> None:
    """Raise if an argument does not fit `perturb`; messages begin with `where`."""
    for name, value in (("hidden", hidden), ("log_sigma", log_sigma)):
        check_tensor(where, name, value)
    if hidden.dtype not in DTYPES:
        raise TypeError(f"{where}: hidden is {hidden.dtype}; it needs one of {', '.join(map(str, DTYPES))}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{where}: hidden has shape {tuple(hidden.shape)}; it needs (..., D) with D >= 1")
    sigma_dtype = real(hidden)
    if log_sigma.dtype not in (torch.float32, sigma_dtype):
        raise TypeError(
            f"{where}: log_sigma is {log_sigma.dtype}; it needs {sigma_dtype} (bfloat16 moves sigma by 6 %)"
        )
    if log_sigma.numel() != 1:
        raise ValueError(f"{where}: log_sigma has shape {tuple(log_sigma.shape)}; it needs () or (1,)")
    if log_sigma.device != hidden.device:
        raise ValueError(f"{where}: log_sigma is on {log_sigma.device}; it needs hidden's device, {hidden.device}")
    check_choice(where, "scale", scale, SCALES)
    check_choice(where, "rounding", rounding, ROUNDINGS)
