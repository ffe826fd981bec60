"""Tracks which forward of its decoder a layer is in, also when backward recomputes the layer.

Gradient checkpointing runs a layer twice. If the checkpoint is inside the hooks, the noise is added once. If it is outside,
the second run happens in backward, perhaps after other forwards, and needs the noise of its own forward. A hook on the
decoder's output gradient records which forward backward is in. Autograd runs this hook before it reaches the layers, and it
finishes one forward's part of the graph before it starts an earlier forward's part.

torch.compile traces the hooks once; their Python does not run afterwards. So coordinates are tensors, and the operator does
the counting (`note`). Compiled code checks one Python value at each call, `Switch.is_on`, so the clean and the perturbed
forward have separate graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..noise.perturb import Draw
from ..operators import integers
from ..protocol import Engine
from .operators import begin, finish, register
from .positions import Streams
from .realised import Realised
from .rows import Rows

_OUTSIDE = "ran outside its decoder's forward, so its rows cannot be numbered; give row_ids"
_NOT_COMPILED = (
    "perturbed: attach(capturable=True) is for CUDA graphs and does not work with torch.compile; leave capturable out"
)


class Source(Protocol):
    """What a forward reads of the handle."""

    log_sigma: Tensor
    seed: int


class Draws(NamedTuple):
    """How the layers' noise is drawn for one kind of hidden states."""

    streams: Streams | None
    by_layer: list[Draw]


class Forward(NamedTuple):
    """One perturbed forward pass through the layers."""

    number: int
    step: int
    row_start: int
    row_ids: Tensor | None
    pointer: Tensor | None  # (2,) step and row_start on the device, if the handle is capturable
    at: Tensor  # coordinates for compiled layers: noise/operators.py
    log_sigma: Tensor  # the handle's own
    ran: set[int]  # layers that have run
    draws: dict[tuple[torch.Size, torch.dtype, torch.device], Draws]  # by kind of hidden states


class Scope:
    """The open scope, or the last one. Not an nn.Module: there an assignment takes as long as a PyTorch addition."""

    is_open = False
    row_ids: Tensor | None = None
    num_perturbed = 0

    def __init__(self) -> None:
        self.ran: set[int] = set()  # positions of the layers perturbed in the scope

    def open(self, row_ids: Tensor | None) -> None:
        self.is_open, self.row_ids, self.num_perturbed = True, row_ids, 0
        self.ran.clear()

    def close(self) -> None:
        self.is_open, self.row_ids = False, None


class Switch:
    """Whether noise is on in compiled code: as in the scope; in backward, as in the forward that is recomputed."""

    is_on = False
    # Rows without row_ids: None outside a decoder's forward; traced code sets it through the operator `begin`.
    at: Tensor | None = None
    row_ids: Tensor | None = None

    def set(self, is_on: bool, forward: Forward | None) -> None:
        self.is_on = is_on
        self.at, self.row_ids = (None, None) if forward is None else (forward.at, forward.row_ids)


class Forwards:
    """The forwards of one perturbed decoder."""

    def __init__(self, handle: Source, rows: Rows, realised: Realised, *, capturable: bool) -> None:
        self._handle = weakref.ref(handle)  # the hooks keep the handle alive; after detach only its owner does
        self._rows, self._realised, self.capturable = rows, realised, capturable
        self.scope, self.switch = Scope(), Switch()
        self.current: Forward | None = None  # the forward the decoder is in
        self._backward: tuple[int, Forward | None] = (-1, None)  # a backward call, and the forward it is in
        self._number, self._order = register(self)

    def open(self, row_ids: Tensor | None) -> None:
        self.scope.open(row_ids)
        self.current = None
        self._set_switch()

    def close(self) -> None:
        self.scope.close()
        self._stop()

    def next(self) -> Forward:
        """Return the next forward. It is counted when its first layer is perturbed."""
        handle, rows, row_ids = self._handle(), self._rows, self.scope.row_ids
        assert handle is not None
        log_sigma = handle.log_sigma
        if not self.capturable and is_captured(log_sigma):
            raise RuntimeError("perturbed: a CUDA graph would repeat this forward's noise; attach with capturable=True")
        start, number, step = rows.first() if row_ids is None else 0, rows.num_forwards, rows.step
        at = integers(self._number, handle.seed, step, start, number)
        return Forward(number, step, start, row_ids, rows.pointer(), at, log_sigma, set(), {})

    # -------------------------------------------------------------- the decoder's forward starts and ends

    def enter(self) -> None:
        if torch.compiler.is_compiling():
            if self.switch.is_on:
                self.begin_in_graph()
        elif not in_backward():
            self._start()

    def leave(self, output: Any) -> None:
        if torch.compiler.is_compiling():
            if self.switch.is_on:
                self.finish_in_graph(_a_tensor(output))
        elif not in_backward():
            forward = self.current  # None for a clean forward: a recompute must be clean, too
            for tensor in _tensors(output):
                tensor.register_hook(lambda grad: self._arrive(forward))
            self._stop()

    def _start(self) -> None:
        self.current = self.next() if self.scope.is_open else None
        self._set_switch()

    def _stop(self) -> None:
        self.current = None
        self._set_switch()

    def _set_switch(self) -> None:
        """Set the switch from the scope and the current forward."""
        forward = self.current
        if forward is None and self.scope.is_open and self.scope.row_ids is not None:
            forward = self.next()  # with row_ids, a layer can run outside its decoder's forward
        self.switch.set(self.scope.is_open, forward)

    def entered(self, layer: int) -> Forward:
        """Return the forward that `layer` is in; raises if the layer has run in it already."""
        forward = self.current
        if forward is None:
            if self.scope.row_ids is None:
                raise RuntimeError(f"perturbed: layer {layer} {_OUTSIDE}")
            forward = self.next()
        if layer in forward.ran:
            raise RuntimeError(
                f"perturbed: layer {layer} ran twice in one forward of its decoder, and both runs would get the same "
                "noise; attach with path=... to a module that runs each of its layers once"
            )
        forward.ran.add(layer)
        return forward

    # -------------------------------------------------------------- backward

    def _arrive(self, forward: Forward | None) -> None:
        """Record that backward has reached the output of `forward`, so its layers come next."""
        task = _backward_id()
        if self._backward[0] != task:
            torch.autograd.Variable._execution_engine.queue_callback(self._set_switch)
        self._backward = (task, forward)
        self.switch.set(forward is not None, forward)

    def recomputed(self, layer: int) -> Forward | None:
        """Return the forward whose `layer` backward recomputes; None if that forward was clean."""
        task, forward = self._backward
        if task != _backward_id() and self._rows.step >= 0:
            raise RuntimeError(
                f"perturbed: layer {layer} is recomputed in backward, but the gradient did not come through its "
                "decoder's output, so it is unknown which forward's noise the layer needs; checkpoint inside the decoder and "
                "compute the loss from its output"
            )
        return forward

    # -------------------------------------------------------------- in a graph

    def begin_in_graph(self) -> None:
        self.switch.at = begin(self._order)

    def finish_in_graph(self, made: Tensor) -> None:
        finish(self._order, made)
        self.switch.at = None

    def coordinates_in_graph(self) -> Tensor:
        if self.capturable:
            raise RuntimeError(_NOT_COMPILED)
        if self.switch.at is None:
            raise RuntimeError(f"perturbed: a layer {_OUTSIDE}")
        return self.switch.at

    def begin_compiled(self) -> Tensor:
        """Do what `enter` does, for a decoder that is compiled as a whole; the operator `begin` runs it."""
        if self.capturable:
            raise RuntimeError(_NOT_COMPILED)
        if in_backward():
            raise RuntimeError(
                "perturbed: a compiled decoder is recomputed in backward as a whole, and it is unknown which forward's noise it "
                "needs; checkpoint inside the decoder"
            )
        if not self.scope.is_open:  # a failed backward left the switch on
            self._set_switch()
            raise RuntimeError(
                "perturbed: this graph was compiled for noise, but no scope is open; call the model again"
            )
        self._start()
        assert self.current is not None
        return self.current.at.clone()

    def finish_compiled(self) -> None:
        """Do what `leave` does, for a decoder that is compiled as a whole; the operator `finish` runs it."""
        if not in_backward():
            self._stop()

    def note(
        self, number: int, row_start: int, position: int, hidden: Tensor, u: Tensor, sigma: Tensor, engine: Engine
    ) -> None:
        """Count a layer of forward `number` as perturbed. Eager code and the operator `perturb` call it after adding noise.

        A second call for the same layer is harmless; it happens when a compiler recomputes the layer.
        """
        if in_backward():
            return
        scope, rows = self.scope, self._rows
        scope.num_perturbed += 1
        scope.ran.add(position)
        if number == rows.num_forwards:
            rows.count(row_start, hidden.numel() // hidden.shape[-1], scope.row_ids is not None)
        if number == 0:
            self._realised.measure(position, hidden, u, sigma, engine)


def _backward_id() -> int:
    """Return the number of the running backward call, -1 outside backward."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return _backward_id() != -1


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on `tensor` are being captured into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _a_tensor(output: Any) -> Tensor:
    """Return a tensor of the output that the decoder's layers computed."""
    if isinstance(output, Tensor):
        return output.detach()
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0]
    return _a_tensor(found)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors with a gradient in a model's output, including those in nested mappings, lists and tuples."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, list | tuple | Mapping):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
