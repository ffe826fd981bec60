"""Custom operators for the perturbation in compiled graphs.

Values that change from step to step come in small int64 CPU tensors, because torch.compile specialises a graph on Python
integers:

    at     (5,) per forward: listener's number, seed, step, row_start, the forward's number
    place  (2,) per layer: position in log_sigma, layer coordinate
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dtypes import real
from ..engine import Engine, pick
from ..operators import UNSAFE_IN_CUDA_GRAPHS, Operator, integers
from ..reference import Norm
from ..stream import Coordinates, Stream, check_stream

NUM_FIELDS = 5
NO_LISTENER = 0


class Listener(Protocol):
    """Counts the layers that a compiled graph perturbs."""

    def note(
        self, number: int, row_start: int, position: int, hidden: Tensor, u: Tensor, sigma: Tensor, engine: Engine
    ) -> None: ...


listeners: weakref.WeakValueDictionary[int, Listener] = weakref.WeakValueDictionary()
"""Listeners by their number, the first entry of `at`."""


def stream_of(at: Tensor, layer: int, row_ids: Tensor | None) -> Stream:
    _, seed, step, row_start, _ = at.tolist()
    return Stream(seed % (1 << 64), step, layer, row_start, row_ids)


# ------------------------------------------------------------------ coordinates of a call without a listener


class _Given(NamedTuple):
    step: Tensor
    row_start: Tensor
    seed: int
    layer: int


class AtPlace(NamedTuple):
    at: Tensor
    place: Tensor


def _coordinates(given: _Given) -> AtPlace:
    at = integers(NO_LISTENER, given.seed, int(given.step), int(given.row_start), 0)
    return AtPlace(at, integers(0, given.layer))


def _coordinates_fake(given: _Given) -> AtPlace:
    return AtPlace(*(torch.empty(size, dtype=torch.int64, device="cpu") for size in (NUM_FIELDS, 2)))


_coordinates_operator = Operator(
    "coordinates", (_Given,), AtPlace, _coordinates, _coordinates_fake, tags=UNSAFE_IN_CUDA_GRAPHS
)


def in_tensors(coordinates: Coordinates) -> AtPlace:
    """Returns `at` and `place`; step and row_start may be tensors, which are read only when the graph runs."""
    step, row_start = (
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device="cpu")
        for x in (coordinates.step, coordinates.row_start)
    )
    seed = coordinates.seed - (1 << 64) if coordinates.seed >= 1 << 63 else coordinates.seed
    return _coordinates_operator(_Given(step, row_start, seed, coordinates.layer))


# ------------------------------------------------------------------ u = h + sigma * eps


class PerturbInputs(NamedTuple):
    hidden: Tensor  # (..., D)
    log_sigma: Tensor  # (L,)
    at: Tensor
    place: Tensor
    row_ids: Tensor | None  # (N,)
    scale: str
    rounding: str
    engine: str | None


class Perturbed(NamedTuple):
    u: Tensor  # like hidden
    sigma: Tensor  # ()
    rms: Tensor  # (N,) where scale="rms", else (0,)


class _PerturbBackward(NamedTuple):
    du: Tensor
    sigma: Tensor
    rms: Tensor
    at: Tensor
    place: Tensor
    row_ids: Tensor | None
    num_sigmas: int
    engine: str | None


class _LogSigmaGradient(NamedTuple):
    dlog_sigma: Tensor  # (num_sigmas,), zero except at the layer's position: sigma * sum(du * rms * eps)


def _num_rows(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _perturb(x: PerturbInputs) -> Perturbed:
    hidden, position = x.hidden.detach(), int(x.place[0])
    stream = stream_of(x.at, int(x.place[1]), x.row_ids)
    check_stream("perturb", stream, _num_rows(hidden), hidden.device)
    sigma = x.log_sigma.detach()[position].exp()
    engine = pick(x.engine, hidden.device)
    u, rms = engine.perturb_fwd(hidden.contiguous(), sigma, stream, x.scale, x.rounding)
    if (listener := listeners.get(int(x.at[0]))) is not None:
        listener.note(int(x.at[4]), stream.row_start, position, hidden, u, sigma, engine)
    return Perturbed(u, sigma, torch.empty(0, dtype=real(hidden), device=hidden.device) if rms is None else rms)


def _perturb_fake(x: PerturbInputs) -> Perturbed:
    rms = x.hidden.new_empty(_num_rows(x.hidden) if x.scale == "rms" else 0, dtype=real(x.hidden))
    return Perturbed(x.hidden.new_empty(x.hidden.shape), x.log_sigma.new_empty(()), rms)


def _perturb_backward(x: _PerturbBackward) -> _LogSigmaGradient:
    stream = stream_of(x.at, int(x.place[1]), x.row_ids)
    dsigma = pick(x.engine, x.du.device).perturb_bwd(x.du.contiguous(), stream, x.rms if len(x.rms) else None)
    dlog_sigma = x.sigma.new_zeros(x.num_sigmas)
    dlog_sigma[int(x.place[0])] = x.sigma * dsigma
    return _LogSigmaGradient(dlog_sigma)


def _perturb_backward_fake(x: _PerturbBackward) -> _LogSigmaGradient:
    return _LogSigmaGradient(x.sigma.new_empty(x.num_sigmas))


def _perturb_setup(ctx: Any, x: PerturbInputs, out: Perturbed) -> None:
    ctx.mark_non_differentiable(out.sigma, out.rms)
    ctx.save_for_backward(out.sigma, out.rms, x.at, x.place, x.row_ids)
    ctx.num_sigmas, ctx.engine = len(x.log_sigma), x.engine


def _perturb_gradient(ctx: Any, grads: Perturbed) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {"hidden": grads.u}
    if ctx.needs_input_grad[1]:
        sigma, rms, at, place, row_ids = ctx.saved_tensors
        given = _PerturbBackward(grads.u, sigma, rms, at, place, row_ids, ctx.num_sigmas, ctx.engine)
        found["log_sigma"] = _perturb_backward_operator(given).dlog_sigma
    return found


perturb_operator = Operator(
    "perturb", (PerturbInputs,), Perturbed, _perturb, _perturb_fake,
    setup=_perturb_setup, gradient=_perturb_gradient, tags=UNSAFE_IN_CUDA_GRAPHS,
)  # fmt: skip
_perturb_backward_operator = Operator(
    "perturb_backward", (_PerturbBackward,), _LogSigmaGradient, _perturb_backward, _perturb_backward_fake,
    tags=UNSAFE_IN_CUDA_GRAPHS,
)  # fmt: skip


# ------------------------------------------------------------------ u and y = RMSNorm(u)


class NormInputs(NamedTuple):
    hidden: Tensor
    weight: Tensor  # (D,)
    log_sigma: Tensor  # () or (1,)
    at: Tensor
    place: Tensor
    row_ids: Tensor | None
    eps: float
    offset: float
    scale: str
    rounding: str
    engine: str | None


class Normed(NamedTuple):
    u: Tensor  # like hidden
    y: Tensor  # like hidden
    sigma: Tensor  # ()
    rstd: Tensor  # (N,)
    rms: Tensor  # (N,) where scale="rms", else (0,)


class _NormBackward(NamedTuple):
    du: Tensor
    dy: Tensor
    u: Tensor
    weight: Tensor
    sigma: Tensor
    rstd: Tensor
    rms: Tensor
    at: Tensor
    place: Tensor
    row_ids: Tensor | None
    eps: float
    offset: float
    needs_dweight: bool
    needs_dsigma: bool
    engine: str | None


class _NormGradients(NamedTuple):
    dh: Tensor  # like u
    dweight: Tensor  # (D,), or (0,) if not needed
    dlog_sigma: Tensor  # (), or (0,) if not needed


def _norm(x: NormInputs) -> Normed:
    stream, num_rows = stream_of(x.at, int(x.place[1]), x.row_ids), _num_rows(x.hidden)
    check_stream("perturb_rms_norm", stream, num_rows, x.hidden.device)
    sigma = x.log_sigma.detach().reshape(()).exp()
    rows, norm = (
        x.hidden.detach().reshape(num_rows, -1).contiguous(),
        Norm(x.weight.detach().contiguous(), x.eps, x.offset),
    )
    engine = pick(x.engine, x.hidden.device)
    u, y, rstd, rms = engine.perturb_rms_norm_fwd(rows, sigma, stream, x.scale, x.rounding, norm)
    rms = rstd.new_empty(0) if rms is None else rms
    return Normed(u.view(x.hidden.shape), y.view(x.hidden.shape), sigma, rstd, rms)


def _norm_fake(x: NormInputs) -> Normed:
    u, y = x.hidden.new_empty(x.hidden.shape), x.hidden.new_empty(x.hidden.shape)
    rstd = x.hidden.new_empty(_num_rows(x.hidden), dtype=real(x.hidden))
    return Normed(u, y, x.log_sigma.new_empty(()), rstd, rstd.new_empty(len(rstd) if x.scale == "rms" else 0))


def _norm_backward(x: _NormBackward) -> _NormGradients:
    du, dy, u = (v.reshape(-1, x.u.shape[-1]).contiguous() for v in (x.du, x.dy, x.u))
    dh, dsigma, dweight = pick(x.engine, x.u.device).perturb_rms_norm_bwd(
        du,
        dy,
        u,
        x.rstd,
        x.rms if len(x.rms) else None,
        stream_of(x.at, int(x.place[1]), x.row_ids),
        Norm(x.weight.contiguous(), x.eps, x.offset),
        x.needs_dsigma,
        x.needs_dweight,
    )
    dlog_sigma = x.sigma.new_empty(0) if dsigma is None else (x.sigma * dsigma).to(x.sigma.dtype)
    return _NormGradients(dh.view(x.u.shape), x.weight.new_empty(0) if dweight is None else dweight, dlog_sigma)


def _norm_backward_fake(x: _NormBackward) -> _NormGradients:
    dweight = x.weight.new_empty(x.weight.shape if x.needs_dweight else (0,))
    return _NormGradients(x.u.new_empty(x.u.shape), dweight, x.sigma.new_empty(() if x.needs_dsigma else (0,)))


def _norm_setup(ctx: Any, x: NormInputs, out: Normed) -> None:
    ctx.mark_non_differentiable(out.sigma, out.rstd, out.rms)
    ctx.save_for_backward(out.u, x.weight, out.sigma, out.rstd, out.rms, x.at, x.place, x.row_ids)
    ctx.eps, ctx.offset, ctx.engine, ctx.sigma_shape = x.eps, x.offset, x.engine, x.log_sigma.shape


def _norm_gradient(ctx: Any, grads: Normed) -> dict[str, Tensor | None]:
    _, needs_dweight, needs_dsigma = ctx.needs_input_grad[:3]
    u, weight, sigma, rstd, rms, at, place, row_ids = ctx.saved_tensors
    given = _NormBackward(
        grads.u, grads.y, u, weight, sigma, rstd, rms, at, place, row_ids,
        ctx.eps, ctx.offset, needs_dweight, needs_dsigma, ctx.engine,
    )  # fmt: skip
    out = _norm_backward_operator(given)
    return {
        "hidden": out.dh,
        "weight": out.dweight if needs_dweight else None,
        "log_sigma": out.dlog_sigma.reshape(ctx.sigma_shape) if needs_dsigma else None,
    }


perturb_rms_norm_operator = Operator(
    "perturb_rms_norm", (NormInputs,), Normed, _norm, _norm_fake,
    setup=_norm_setup, gradient=_norm_gradient, tags=UNSAFE_IN_CUDA_GRAPHS,
)  # fmt: skip
_norm_backward_operator = Operator(
    "perturb_rms_norm_backward", (_NormBackward,), _NormGradients, _norm_backward, _norm_backward_fake,
    tags=UNSAFE_IN_CUDA_GRAPHS,
)  # fmt: skip
