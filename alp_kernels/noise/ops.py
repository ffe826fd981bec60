"""The perturbation as PyTorch operators: what a compiled graph calls in place of the autograd functions.

torch.compile knows of an operator its schema, its fake implementation and its derivative; what runs inside stays Python, so
engines are called as in eager mode. Eager code does not come here: a call through the dispatcher costs more than the
autograd function (docs/compile.md).

Numbers that change from step to step come in small int64 tensors on the CPU, not as Python integers, which a graph would
be specialised on:

    at     (5,) of one forward: its handle's number, seed, step, row_start, its own number
    place  (2,) of one layer: its position in log_sigma, its layer coordinate
    order  (2,) of one handle: its number, and how often it was written; its mutation keeps `begin` and `finish` in order
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..engine import pick
from ..stream import Stream, check_stream

if TYPE_CHECKING:
    from ..layers.perturbation import Perturbation

NUM_FIELDS = 5

# cudagraph_unsafe: a recorded graph would repeat the coordinates it was recorded with
TAGS = (torch.Tag.cudagraph_unsafe,)
library = torch.library.Library("alp_kernels", "FRAGMENT")
handles: weakref.WeakValueDictionary[int, Perturbation] = weakref.WeakValueDictionary()
numbers = itertools.count(1)
NO_HANDLE = 0


def register(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> None:
    """Give the operator `name`, defined before, what it runs, its fake and, with `gradient`, its derivative."""
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alp_kernels::{name}", fake, lib=library)
    if gradient is not None:
        torch.library.register_autograd(f"alp_kernels::{name}", gradient, setup_context=setup, lib=library)


def integers(*values: int) -> Tensor:
    """An int64 tensor on the CPU; values of 64 bits wrap, as seeds need. From a buffer: torch.tensor() is five times slower."""
    return torch.frombuffer(array("Q", [value % (1 << 64) for value in values]), dtype=torch.int64)


def real(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def stream_of(at: Tensor, layer: int, row_ids: Tensor | None) -> Stream:
    _, seed, step, row_start, _ = at.tolist()
    return Stream(seed % (1 << 64), step, layer, row_start, row_ids)


# ------------------------------------------------------------------ coordinates of a call of perturb()

library.define("coordinates(Tensor step, Tensor row_start, SymInt seed, SymInt layer) -> (Tensor, Tensor)", tags=TAGS)


def _coordinates(step: Tensor, row_start: Tensor, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    return integers(NO_HANDLE, seed, int(step), int(row_start), 0), integers(0, layer)


def _coordinates_fake(step: Tensor, row_start: Tensor, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(NUM_FIELDS, dtype=torch.int64, device="cpu"),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


# ------------------------------------------------------------------ u = h + sigma * eps

library.define(
    "perturb(Tensor hidden, Tensor log_sigma, Tensor at, Tensor place, Tensor? row_ids, str scale, str rounding, str? engine)"
    " -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
library.define(
    "perturb_backward(Tensor du, Tensor sigma, Tensor rms, Tensor at, Tensor place, Tensor? row_ids, SymInt num_sigmas, "
    "str? engine) -> Tensor",
    tags=TAGS,
)


def _perturb(
    hidden: Tensor,
    log_sigma: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    scale: str,
    rounding: str,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (..., D), log_sigma (L,), row_ids (N,): u like hidden, sigma () and, where scale="rms", rms (N,), else (0,)."""
    stream, num_rows = stream_of(at, int(place[1]), row_ids), hidden.numel() // hidden.shape[-1]
    check_stream("perturb", stream, num_rows, hidden.device)
    sigma = log_sigma.detach()[int(place[0])].exp()
    chosen = pick(engine, hidden.device)
    u, rms = chosen.perturb_fwd(hidden.detach().contiguous(), sigma, stream, scale, rounding)
    if (handle := handles.get(int(at[0]))) is not None:
        handle.note(int(at[4]), stream.row_start, int(place[0]), hidden.detach(), u, sigma, chosen)
    return u, sigma, rms if rms is not None else torch.empty(0, dtype=real(hidden), device=hidden.device)


def _perturb_fake(
    hidden: Tensor,
    log_sigma: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    scale: str,
    rounding: str,
    engine: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = hidden.numel() // hidden.shape[-1] if scale == "rms" else 0
    return hidden.new_empty(hidden.shape), log_sigma.new_empty(()), hidden.new_empty(num_rows, dtype=real(hidden))


def _perturb_backward(
    du: Tensor,
    sigma: Tensor,
    rms: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    num_sigmas: int,
    engine: str | None,
) -> Tensor:
    """dlog_sigma (num_sigmas,), zero but for the layer's own: sigma * sum(du * rms * eps)."""
    stream = stream_of(at, int(place[1]), row_ids)
    dsigma = pick(engine, du.device).perturb_bwd(du.contiguous(), stream, rms if len(rms) else None)
    dlog_sigma = sigma.new_zeros(num_sigmas)
    dlog_sigma[int(place[0])] = sigma * dsigma
    return dlog_sigma


def _perturb_backward_fake(
    du: Tensor,
    sigma: Tensor,
    rms: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    num_sigmas: int,
    engine: str | None,
) -> Tensor:
    return sigma.new_empty(num_sigmas)


def _perturb_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, log_sigma, at, place, row_ids, _, _, engine = inputs
    _, sigma, rms = output
    ctx.mark_non_differentiable(sigma, rms)
    ctx.save_for_backward(sigma, rms, at, place, row_ids)
    ctx.num_sigmas, ctx.engine = len(log_sigma), engine


def _perturb_grad(ctx: Any, du: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dlog_sigma = None
    if ctx.needs_input_grad[1]:
        dlog_sigma = torch.ops.alp_kernels.perturb_backward(du, *ctx.saved_tensors, ctx.num_sigmas, ctx.engine)
    return du, dlog_sigma, *[None] * 6


# ------------------------------------------------------------------ a decoder's forward

library.define("begin(Tensor(a!) order) -> Tensor", tags=TAGS)
library.define("finish(Tensor(a!) order, Tensor output) -> ()", tags=TAGS)


def _begin(order: Tensor) -> Tensor:
    """The coordinates of the forward that starts, (5,)."""
    order[1] += 1
    handle = handles.get(int(order[0]))
    if handle is None:
        raise RuntimeError("perturbed: the handle of this compiled model is gone; keep it while its scope is open")
    return handle.begin_compiled()


def _begin_fake(order: Tensor) -> Tensor:
    return torch.empty(NUM_FIELDS, dtype=torch.int64, device="cpu")


def _finish(order: Tensor, output: Tensor) -> None:
    """`output` is only there so that this comes after the layers that made it."""
    order[1] += 1
    if (handle := handles.get(int(order[0]))) is not None:
        handle.finish_compiled()


def _finish_fake(order: Tensor, output: Tensor) -> None:
    return None


register("coordinates", _coordinates, _coordinates_fake)
register("perturb", _perturb, _perturb_fake, setup=_perturb_setup, gradient=_perturb_grad)
register("perturb_backward", _perturb_backward, _perturb_backward_fake)
register("begin", _begin, _begin_fake)
register("finish", _finish, _finish_fake)


def serves(tensor: Tensor) -> bool:
    """Whether `tensor` belongs to a graph that is being made: torch.compile, torch.export, fake and meta tensors."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta


def coordinates(step: int | Tensor, row_start: int | Tensor, seed: int, layer: int) -> tuple[Tensor, Tensor]:
    """`at` and `place` for a call without a handle."""
    step, row_start = (
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int64, device="cpu") for x in (step, row_start)
    )
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    made: tuple[Tensor, Tensor] = torch.ops.alp_kernels.coordinates(step, row_start, seed, layer)
    return made


def perturb_at(
    hidden: Tensor,
    log_sigma: Tensor,
    at: Tensor,
    place: Tensor,
    row_ids: Tensor | None,
    scale: str,
    rounding: str,
    engine: str | None,
) -> Tensor:
    """The operator `perturb`: differentiable in hidden and log_sigma (L,)."""
    u: Tensor = torch.ops.alp_kernels.perturb(hidden, log_sigma, at, place, row_ids, scale, rounding, engine)[0]
    return u
