"""Which forward of its decoder a layer is in: now, and in a backward pass that runs some layers again.

Activation checkpointing runs a layer twice. Where the checkpoint is inside the hooks the noise runs once. Where it is
outside, the second run happens in backward and must meet the noise of *its* forward, with others in between. A hook on the
gradient of the decoder's output records which forward backward is in: autograd comes through it before it comes to the
layers, and it works off one forward's part of a graph before that of an earlier one.

torch.compile traces the hooks once and runs what it traced: no Python of theirs runs afterwards. So coordinates are tensors,
and what has to be counted is counted inside the operator (`note`). Compiled code checks one Python value at each call,
`Switch.is_on`: the clean and the perturbed graph are two.
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
from .realised import Realised
from .rows import Rows

_OUTSIDE = "ran outside its decoder's forward, so its rows cannot be numbered; give row_ids"
_NOT_COMPILED = "perturbed: compiled layers take their coordinates from the host; attach with capturable=False"


class Source(Protocol):
    """What noise is made of."""

    log_sigma: Tensor
    seed: int


class Forward(NamedTuple):
    """One perturbed forward pass through the layers."""

    number: int
    step: int
    row_start: int
    row_ids: Tensor | None
    pointer: Tensor | None  # (2,) step and row_start on the device, where the handle is capturable
    at: Tensor  # the same for compiled layers: noise/operators.py
    log_sigma: Tensor  # the handle's own
    ran: set[int]  # layers
    draws: dict[tuple[torch.Size, torch.dtype, torch.device], list[Draw]]  # by what the hidden states are like, a layer


class Scope:
    """The scope that is open, or was the last. No module, on which each assignment takes as long as an addition of PyTorch."""

    is_open = False
    row_ids: Tensor | None = None
    num_perturbed = 0

    def __init__(self) -> None:
        self.ran: set[int] = set()  # positions of the layers perturbed in it

    def open(self, row_ids: Tensor | None) -> None:
        self.is_open, self.row_ids, self.num_perturbed = True, row_ids, 0
        self.ran.clear()

    def close(self) -> None:
        self.is_open, self.row_ids = False, None


class Switch:
    """Whether noise is on in compiled code: as in the scope, but in a backward pass as in the forward that it runs again."""

    is_on = False
    at: Tensor | None = (
        None  # None outside of a forward whose rows are numbered; traced code sets it by the operator `begin`
    )
    row_ids: Tensor | None = None

    def set(self, is_on: bool, forward: Forward | None) -> None:
        self.is_on = is_on
        self.at, self.row_ids = (None, None) if forward is None else (forward.at, forward.row_ids)


class Forwards:
    """The forwards of one perturbed decoder."""

    def __init__(self, handle: Source, rows: Rows, realised: Realised, *, capturable: bool) -> None:
        self._handle = weakref.ref(handle)  # hooks hold it; without them it goes when its owner lets it go
        self._rows, self._realised, self.capturable = rows, realised, capturable
        self.scope, self.switch = Scope(), Switch()
        self.current: Forward | None = None  # the one the decoder is in
        self._backward: tuple[int, Forward | None] = (-1, None)  # a backward call, and whose layers it is at
        self._number, self._order = register(self)

    def open(self, row_ids: Tensor | None) -> None:
        self.scope.open(row_ids)
        self.current = None
        self._set_switch()

    def close(self) -> None:
        self.scope.close()
        self._stop()

    def next(self) -> Forward:
        """The forward that comes next. It counts as one with its first perturbed layer."""
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
            forward = self.current  # None: a clean one, which a recompute must also know
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
        """As the scope and the current forward want it."""
        forward = self.current
        if forward is None and self.scope.is_open and self.scope.row_ids is not None:
            forward = self.next()  # rows with names need no decoder around them
        self.switch.set(self.scope.is_open, forward)

    def entered(self, layer: int) -> Forward:
        """The forward that `layer` is in, which has not run in it before."""
        forward = self.current
        if forward is None:
            if self.scope.row_ids is None:
                raise RuntimeError(f"perturbed: layer {layer} {_OUTSIDE}")
            forward = self.next()
        if layer in forward.ran:
            raise RuntimeError(
                f"perturbed: layer {layer} ran twice in one forward of its decoder, and both runs would meet the same "
                "noise; attach with path=... to a module that runs each of its layers once"
            )
        forward.ran.add(layer)
        return forward

    # -------------------------------------------------------------- backward

    def _arrive(self, forward: Forward | None) -> None:
        """Backward has come to the output of `forward`; its layers are next."""
        task = _backward_id()
        if self._backward[0] != task:
            torch.autograd.Variable._execution_engine.queue_callback(self._set_switch)
        self._backward = (task, forward)
        self.switch.set(forward is not None, forward)

    def recomputed(self, layer: int) -> Forward | None:
        """The forward whose `layer` backward runs again; None where it was clean."""
        task, forward = self._backward
        if task != _backward_id() and self._rows.step >= 0:
            raise RuntimeError(
                f"perturbed: layer {layer} is recomputed in backward, and the gradient did not come through its "
                "decoder's output, so whose noise it needs cannot be told; checkpoint inside the decoder and take "
                "the loss from its output"
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
        """What the operator `begin` runs: `enter` of a decoder that is compiled whole."""
        if self.capturable:
            raise RuntimeError(_NOT_COMPILED)
        if in_backward():
            raise RuntimeError(
                "perturbed: a compiled decoder is recomputed in backward as a whole, and whose noise it needs cannot be told; "
                "checkpoint inside it"
            )
        if not self.scope.is_open:  # a backward pass failed on its way, and left its switch on
            self._set_switch()
            raise RuntimeError("perturbed: compiled for noise, but no scope is open; call the model again")
        self._start()
        assert self.current is not None
        return self.current.at.clone()

    def finish_compiled(self) -> None:
        """What the operator `finish` runs: `leave` of such a decoder."""
        if not in_backward():
            self._stop()

    def note(
        self, number: int, row_start: int, position: int, hidden: Tensor, u: Tensor, sigma: Tensor, engine: Engine
    ) -> None:
        """Count a layer of forward `number` as perturbed; what the operator `perturb` runs beside its arithmetic.

        Doing it twice is harmless, as when a compiler has a layer computed again.
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
    """The number of the backward call that is running, -1 outside of one."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return _backward_id() != -1


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done to `tensor` now goes into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _a_tensor(output: Any) -> Tensor:
    """One that the decoder's layers made."""
    if isinstance(output, Tensor):
        return output.detach()
    found = getattr(output, "last_hidden_state", None)
    if found is None:
        found = output[0]
    return _a_tensor(found)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output that carry a gradient: itself, or those in its fields and their tuples."""
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, list | tuple | Mapping):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
