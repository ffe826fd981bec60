"""Adds noise to a layer's hidden states: in eager code, as an operator of a compiled graph, or on fake tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..engine import pick
from ..noise.operators import PerturbInputs, perturb_operator
from ..noise.perturb import Draw, Perturb, check_perturb, perturb
from ..operators import in_graph
from ..stream import Coordinates, Stream
from .forwards import Draws, Forward, Forwards
from .positions import streams_of


class Noisy(Protocol):
    """What the hooks use of the handle."""

    layers: tuple[int, ...]
    log_sigma: Tensor
    seed: int
    scale: str
    rounding: str
    engine: str | None
    forwards: Forwards

    @property
    def was_opened(self) -> bool:
        """Whether the scope was ever open, in this process or in the run that saved the loaded state."""


def add(handle: Noisy, position: int, layer: int, hidden: Tensor, forward: Forward) -> Tensor:
    """Return u = hidden + noise, for the layer at `position` of log_sigma, in `forward`."""
    if in_graph(hidden):
        return _add_to_fake(handle, position, layer, hidden, forward)
    device, log_sigma = hidden.device, forward.log_sigma
    alike = hidden.shape, hidden.dtype, device
    if alike not in forward.draws:
        forward.draws[alike] = _draws(handle, forward, hidden)
    streams, draws = forward.draws[alike]
    draw = draws[position]
    if log_sigma.device != device:
        log_sigma = log_sigma.to(device)
    rows = hidden if streams is None else streams.fold(hidden)
    u: Tensor = Perturb.apply(rows, log_sigma, draw)
    handle.forwards.note(forward.number, forward.row_start, position, rows, u, draw.sigma, draw.engine)
    return u if streams is None else streams.unfold(u, hidden)


def _draws(handle: Noisy, forward: Forward, hidden: Tensor) -> Draws:
    """Return the `Draws` of hidden states of this shape, dtype and device; checks them as `perturb` does."""
    device, num_rows, streams = hidden.device, hidden.numel() // max(hidden.shape[-1], 1), None
    log_sigma, row_ids = forward.log_sigma.detach().to(device), forward.row_ids  # layers may be on several devices
    check_perturb("perturb", hidden, log_sigma[0], handle.scale, handle.rounding)
    if row_ids is not None:
        streams = streams_of(hidden, row_ids)
        if streams is not None:
            num_rows = row_ids.numel()
        if row_ids.is_meta:
            raise ValueError("perturbed: row_ids is on the meta device and holds no values")
        row_ids = row_ids.to(device)
    seed, step, start, engine = handle.seed, forward.step, forward.row_start, pick(handle.engine, device)
    at = None if forward.pointer is None else forward.pointer.to(device)
    row_ids = Coordinates(seed, step, handle.layers[0], row_ids, start).stream("perturbed", num_rows, device).row_ids
    by_layer = [
        Draw(engine, Stream(seed, step, layer, start, row_ids, at), sigma, position, handle.scale, handle.rounding)
        for position, (layer, sigma) in enumerate(zip(handle.layers, log_sigma.exp().unbind(), strict=True))
    ]
    return Draws(streams, by_layer)


def _add_to_fake(handle: Noisy, position: int, layer: int, hidden: Tensor, forward: Forward) -> Tensor:
    """Return u for fake and meta tensors, which have a shape but no values."""
    if forward.row_ids is not None:
        streams_of(hidden, forward.row_ids)  # raises if their shapes do not fit
    scope = handle.forwards.scope
    scope.num_perturbed += 1
    scope.ran.add(position)
    return perturb(
        hidden,
        handle.log_sigma[position].to(hidden.device),
        seed=handle.seed,
        step=forward.step,
        layer=layer,
        row_start=forward.row_start,
        scale=handle.scale,
        rounding=handle.rounding,
        engine=handle.engine,
    )


def add_in_graph(handle: Noisy, place: Tensor, hidden: Tensor) -> Tensor:
    """Return u through an operator of a compiled graph. place (2,): the layer's position and coordinate."""
    at, row_ids = handle.forwards.coordinates_in_graph(), handle.forwards.switch.row_ids
    streams = None if row_ids is None else streams_of(hidden, row_ids)
    rows = hidden if streams is None else streams.fold(hidden)
    ids = None if row_ids is None else row_ids.reshape(-1).to(hidden.device)
    log_sigma = handle.log_sigma.to(hidden.device)
    inputs = PerturbInputs(rows, log_sigma, at, place, ids, handle.scale, handle.rounding, handle.engine)
    u = perturb_operator(inputs).u
    return u if streams is None else streams.unfold(u, hidden)
