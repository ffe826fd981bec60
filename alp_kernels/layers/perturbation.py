"""The handle on a perturbed model: forward hooks that add noise to its layers' inputs inside an explicit scope.

Activation checkpointing runs a layer twice. Where the checkpoint is inside the hooks the noise runs once; where it is
outside, the second run happens in backward and must meet the noise of *its* forward, with others in between. So each
forward's coordinates wait in a hook on the gradient of the decoder's output: autograd comes through it before it comes
to the layers, and one forward's part of a graph is worked off before that of an earlier one.

torch.compile traces these hooks once and runs what it traced: no Python of theirs runs afterwards. So under it a layer's hook
is one operator, whose coordinates are tensors. Whether there is noise is a Python value, `_Switch.is_on`, which compiled
code checks at each call: the clean and the perturbed graph are two. What has to be counted is counted inside the
operator (`note`).
"""

from __future__ import annotations

import logging
import math
import operator
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..engine import pick
from ..noise.operators import PerturbInputs, perturb_operator
from ..noise.perturb import Draw, Perturb, check_perturb, perturb
from ..operators import in_graph, integers
from ..protocol import Engine
from ..stream import FINAL_LAYER, LOGITS_LAYER, MAX_STEP, Coordinates, LogitNoise, Stream
from .hooks import Enter, LayerInput, Leave, Output, OwnForward
from .operators import begin, finish, register

logger = logging.getLogger("alp_kernels")

_RANK_SHIFT = 32  # numbered rows: data-parallel rank above, running number below
_MEASURED_ROWS = 64
_OUTSIDE = "ran outside its decoder's forward, so its rows cannot be numbered; give row_ids"
_NOT_COMPILED = "perturbed: compiled layers take their coordinates from the host; attach with capturable=False"
attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Perturbation]] = weakref.WeakKeyDictionary()
"""The handle on each perturbed decoder, so that none is perturbed twice, by whatever module it is reached."""


class _Forward(NamedTuple):
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


class _Measured(NamedTuple):
    """The noise in a layer's first rows."""

    sums: Tensor  # (n, 3): what engine.measure returns
    num_channels: int
    sigma: Tensor  # ()


class _Scope:
    """The scope that is open, or was the last. No module, on which each assignment takes as long as an addition of PyTorch."""

    is_on = False
    row_ids: Tensor | None = None
    forward: _Forward | None = None  # the one the decoder is in
    num_perturbed = 0

    def __init__(self) -> None:
        self.ran: set[int] = set()  # positions of the layers perturbed in it

    def open(self, row_ids: Tensor | None) -> None:
        self.is_on, self.row_ids, self.forward, self.num_perturbed = True, row_ids, None, 0
        self.ran.clear()

    def close(self) -> None:
        self.is_on, self.row_ids, self.forward = False, None, None


class _Switch:
    """What a compiled layer's hook reads. In a backward pass that recomputes a forward: that forward's."""

    is_on = False
    at: Tensor | None = None  # None outside of a forward whose rows are numbered
    row_ids: Tensor | None = None


def _backward_id() -> int:
    """The number of the backward call that is running, -1 outside of one."""
    return torch._C._current_graph_task_id()


def _in_backward() -> bool:
    return _backward_id() != -1


def _is_captured(tensor: Tensor) -> bool:
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


class Perturbation(nn.Module):
    """The handle `attach` returns: sigma, the scope that switches the noise on, and the way back.

    Its only parameter is `log_sigma` (L,) float32, one value for each perturbed layer; the model's own
    `named_parameters()` do not hold it, so trainers that push weights to an inference engine never push it.
    `state_dict()` holds log_sigma, the seed and the noise's position; loading it continues the stream.
    """

    log_sigma: Tensor

    def __init__(
        self,
        layers: dict[int, nn.Module],
        parent: nn.Module,
        log_sigma: Tensor,
        *,
        learnable: bool,
        seed: int,
        scale: str,
        rounding: str,
        sigma_bounds: tuple[float, float] | None,
        data_rank: int | None,
        engine: str | None,
        capturable: bool,
    ) -> None:
        super().__init__()
        if learnable:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        self.layers = tuple(layers)
        self.seed, self.scale, self.rounding = seed, scale, rounding
        self.sigma_bounds, self.data_rank, self.engine = sigma_bounds, data_rank, engine
        self._parent = weakref.ref(parent)
        self._step, self._next_row, self._forwards = -1, 0, 0
        self.capturable = capturable
        # (3,) int64 on the device: step, next row, forwards of the scope. Of a capturable handle these count, not the host's,
        # which knows of no replay
        self._position: Tensor | None = None
        self._scope = _Scope()
        self._said_partial = False
        self._backward: tuple[int, _Forward | None] = (-1, None)  # a backward call, and whose layers it is at
        self._switch = _Switch()
        self._number, self._order = register(self)
        self._measured: dict[int, _Measured] = {}
        self._warned = False
        self._own_forwards = [OwnForward(module) for module in (parent, *layers.values())]
        self._removables: list[Any] = [
            *self._own_forwards,
            parent.register_forward_pre_hook(Enter(self)),
            parent.register_forward_hook(Leave(self), always_call=True),
        ]
        for position, (index, layer) in enumerate(layers.items()):
            if index == LOGITS_LAYER:
                self._removables.append(layer.register_forward_hook(Output(self, index, "logits")))
            elif index == FINAL_LAYER:
                self._removables.append(layer.register_forward_hook(Output(self, index, "last_hidden_state")))
            else:
                hook = LayerInput(self, position, index)
                self._removables.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    # -------------------------------------------------------------- the scope

    @contextmanager
    def perturbed(self, step: int, row_ids: Tensor | None = None) -> Iterator[Perturbation]:
        """Switch the noise on for the forwards inside (and for their backward, inside or later).

        Args:
            step: optimiser step; its noise differs from every other step's. Scopes of one step number their rows on.
            row_ids: int64, one for each row of the hidden states, (B, T) or (B*T,): global row identities below 2^48,
                e.g. sample * max_length + position. Then packing, padding, order, micro-batches and ranks do not
                change a row's noise. Without them rows are numbered, after those of the data-parallel rank before.

        With `attach(capturable=True)` a CUDA graph that was captured in a scope draws the noise of the scope it is replayed in.
        Rows are numbered on over replays and eager forwards alike; row_ids are read from the tensor given at capture:

            with handle.perturbed(step=0):
                warm_up(tokens)  # as each capture needs it
                with torch.cuda.graph(graph):
                    loss = update(tokens)  # forward and backward
            for step in range(1, num_steps):
                tokens.copy_(batches[step])
                with handle.perturbed(step=step):
                    graph.replay()

        A scope in which Python perturbed no layer then waits for the device at its end, and asks whether a replay did. A graph
        replayed outside of a scope draws noise too, as if the last one were open still.

        Raises:
            RuntimeError: at the end, if no layer was perturbed: a run that would silently be without noise.
        """
        if isinstance(step, bool) or not hasattr(step, "__index__") or not 0 <= step <= MAX_STEP:
            raise ValueError(f"perturbed: step={step!r}; it needs an int in [0, {MAX_STEP}]")
        step = operator.index(step)
        if row_ids is not None and not isinstance(row_ids, Tensor):
            raise TypeError(f"perturbed: row_ids is a {type(row_ids).__name__}; it needs a torch.Tensor of int64")
        if self._scope.is_on:
            raise RuntimeError("perturbed: this scope is already open; scopes do not nest")
        if not self._removables:
            raise RuntimeError("perturbed: this perturbation was detached from its model")
        if _is_captured(self.log_sigma):
            raise RuntimeError(
                "perturbed: a CUDA graph would hold this step's number; open the scope around the capture"
            )
        is_new = step != self._step
        if is_new:
            self._step, self._next_row, self._forwards = step, 0, 0
        if self.sigma_bounds is not None:
            with torch.no_grad():
                self.log_sigma.clamp_(*map(math.log, self.sigma_bounds))
        for forward in self._own_forwards:
            forward.set()
        if self.capturable:
            self._set_position(is_new)
        self._scope.open(row_ids)
        self._set_switch()
        try:
            yield self
        finally:
            self._scope.close()
            self._set_switch()
        if self._scope.num_perturbed == 0 and (self._position is None or int(self._position[2]) == 0):
            if self.layers == (LOGITS_LAYER,):
                raise RuntimeError(
                    "perturbed: no logits were perturbed inside the scope; run the model's own forward, or with a fused "
                    "head pass logit_noise=handle.logit_noise(num_rows)"
                )
            raise RuntimeError(
                f"perturbed: no layer of {list(self.layers)} was perturbed inside the scope (step {step}); the model's forward "
                "must run inside it, on the model that was given to attach"
            )
        if 0 < len(self._scope.ran) < len(self.layers) and not self._said_partial:
            self._said_partial = True
            left = [layer for position, layer in enumerate(self.layers) if position not in self._scope.ran]
            logger.warning(
                "layers %s did not run in a perturbed forward while others did: their sigma gets no noise and no gradient. "
                "The model drops layers (layerdrop), or these were replaced after attach: then attach anew.",
                left,
            )

    def logit_noise(self, num_rows: int, row_ids: Tensor | None = None) -> LogitNoise:
        """For layers="logits" with a fused head: the noise that `fused_alp_loss(logit_noise=...)` adds. Inside the scope."""
        if self.layers != (LOGITS_LAYER,):
            raise RuntimeError('logit_noise: it belongs to attach(layers="logits")')
        if self.capturable:
            raise RuntimeError(
                "logit_noise: the loss reads no coordinates from the device; attach with capturable=False"
            )
        if not self._scope.is_on:
            raise RuntimeError("logit_noise: open the scope first: with handle.perturbed(step=...)")
        if row_ids is None and self._scope.row_ids is not None:
            row_ids = self._scope.row_ids
        if row_ids is not None and row_ids.numel() != num_rows:
            raise ValueError(
                f"logit_noise: row_ids has shape {tuple(row_ids.shape)}; {num_rows} rows need as many (give those of the rows "
                "that go into the loss)"
            )
        start = self._take_rows(num_rows) if row_ids is None else 0
        self._scope.num_perturbed += 1
        return LogitNoise(self.log_sigma, self.seed, self._step, row_ids, start)

    def _take_rows(self, num_rows: int) -> int:
        start = self._first_row()
        self._use_rows(start, num_rows)
        return start

    def _first_row(self) -> int:
        """The number of the next row."""
        rank = self.data_rank
        if rank is None:  # asked for now: attach may come before torch.distributed starts
            rank = dist.get_rank() if dist.is_initialized() else 0
        return (rank << _RANK_SHIFT) + self._next_row

    def _set_position(self, is_new: bool) -> None:
        """Write where the noise stands to the device, without waiting for it."""
        device = self.log_sigma.device
        with torch.inference_mode(False):  # a tensor of an inference scope could not be written outside of one
            if self._position is None or self._position.device != device:
                if not is_new:
                    self._next_row = self._rows_so_far()
                self._position, is_new = torch.empty(3, dtype=torch.int64, device=device), True
            if is_new:
                self._position[0].fill_(self._step)
                self._position[1].fill_(self._first_row())
            self._position[2].zero_()

    def _rows_so_far(self) -> int:
        return self._next_row if self._position is None else int(self._position[1]) % (1 << _RANK_SHIFT)

    def _use_rows(self, start: int, num_rows: int) -> None:
        self._next_row = max(self._next_row, start % (1 << _RANK_SHIFT) + num_rows)
        if self._next_row > 1 << _RANK_SHIFT:
            raise RuntimeError(f"perturbed: step {self._step} has over 2^{_RANK_SHIFT} rows on one rank; give row_ids")

    # -------------------------------------------------------------- hooks

    def on_enter(self) -> None:
        if torch.compiler.is_compiling():
            if self._switch.is_on:
                self._switch.at = begin(self._order)
        elif not _in_backward():
            self._start()

    def on_leave(self, output: Any) -> None:
        if torch.compiler.is_compiling():
            if self._switch.is_on:
                finish(self._order, _a_tensor(output))
                self._switch.at = None
        elif not _in_backward():
            forward = self._scope.forward  # None: a clean one, which a recompute must also know
            for tensor in _tensors(output):
                tensor.register_hook(lambda grad: self._arrive(forward))
            self._stop()

    def _start(self) -> None:
        """The decoder's forward starts."""
        self._scope.forward = self._next_forward() if self._scope.is_on else None
        self._set_switch()

    def _stop(self) -> None:
        self._scope.forward = None
        self._set_switch()

    def begin_compiled(self) -> Tensor:
        """What the operator `begin` runs: `on_enter` of a decoder that is compiled whole."""
        if self.capturable:
            raise RuntimeError(_NOT_COMPILED)
        if _in_backward():
            raise RuntimeError(
                "perturbed: a compiled decoder is recomputed in backward as a whole, and whose noise it needs cannot be told; "
                "checkpoint inside it"
            )
        if not self._scope.is_on:  # a backward pass failed on its way, and left its switch on
            self._set_switch()
            raise RuntimeError("perturbed: compiled for noise, but no scope is open; call the model again")
        self._start()
        assert self._scope.forward is not None
        return self._scope.forward.at.clone()

    def finish_compiled(self) -> None:
        """What the operator `finish` runs: `on_leave` of such a decoder."""
        if not _in_backward():
            self._stop()

    def _set_switch(self) -> None:
        """The switch as the scope and the current forward want it."""
        switch, forward = self._switch, self._scope.forward
        if forward is None and self._scope.is_on and self._scope.row_ids is not None:
            forward = self._next_forward()  # rows with names need no decoder around them
        switch.is_on = self._scope.is_on
        switch.at, switch.row_ids = (None, None) if forward is None else (forward.at, forward.row_ids)

    def _arrive(self, forward: _Forward | None) -> None:
        """Backward has come to the output of `forward`; its layers are next."""
        task, switch = _backward_id(), self._switch
        if self._backward[0] != task:
            torch.autograd.Variable._execution_engine.queue_callback(self._set_switch)
        self._backward = (task, forward)
        switch.is_on = forward is not None
        switch.at, switch.row_ids = (None, None) if forward is None else (forward.at, forward.row_ids)

    def _next_forward(self) -> _Forward:
        """The forward that comes next. It counts as one with its first perturbed layer."""
        log_sigma = self.log_sigma
        if not self.capturable and _is_captured(log_sigma):
            raise RuntimeError("perturbed: a CUDA graph would repeat this forward's noise; attach with capturable=True")
        row_ids = self._scope.row_ids
        start, number, step = self._first_row() if row_ids is None else 0, self._forwards, self._step
        at = integers(self._number, self.seed, step, start, number)
        pointer = None if self._position is None else self._position[:2].clone()
        return _Forward(number, step, start, row_ids, pointer, at, log_sigma, set(), {})

    def note(
        self, number: int, row_start: int, position: int, hidden: Tensor, u: Tensor, sigma: Tensor, engine: Engine
    ) -> None:
        """Count a layer of forward `number` as perturbed; what the operator `perturb` runs beside its arithmetic.

        Doing it twice is harmless, as when a compiler has a layer computed again.
        """
        if _in_backward():
            return
        scope = self._scope
        scope.num_perturbed += 1
        scope.ran.add(position)
        if number == self._forwards:
            self._forwards += 1
            num_rows = hidden.numel() // hidden.shape[-1]
            if self._position is not None:
                self._position[2] += 1
                if scope.row_ids is None:
                    self._position[1] += num_rows
            elif scope.row_ids is None:
                self._use_rows(row_start, num_rows)
        if number == 0:
            num_channels = hidden.shape[-1]
            sums = engine.measure(hidden.contiguous(), u, min(hidden.numel() // num_channels, _MEASURED_ROWS))
            self._measured[position] = _Measured(sums, num_channels, sigma)

    def _recomputed(self, index: int) -> _Forward | None:
        """The forward whose layer `index` backward runs again; None where it was clean."""
        task, forward = self._backward
        if task != _backward_id() and self._step >= 0:
            raise RuntimeError(
                f"perturbed: layer {index} is recomputed in backward, and the gradient did not come through its "
                "decoder's output, so whose noise it needs cannot be told; checkpoint inside the decoder and take "
                "the loss from its output"
            )
        return forward

    def _entered(self, index: int) -> _Forward:
        """The forward that layer `index` is in, which has not run in it before."""
        forward = self._scope.forward
        if forward is None:
            if self._scope.row_ids is None:
                raise RuntimeError(f"perturbed: layer {index} {_OUTSIDE}")
            forward = self._next_forward()
        if index in forward.ran:
            raise RuntimeError(
                f"perturbed: layer {index} ran twice in one forward of its decoder, and both runs would meet the same "
                "noise; attach with path=... to a module that runs each of its layers once"
            )
        forward.ran.add(index)
        return forward

    def _draws(self, forward: _Forward, hidden: Tensor) -> list[Draw]:
        """How each layer of `forward` with hidden states like these draws its noise; checked as `perturb` does."""
        device, num_rows = hidden.device, hidden.numel() // max(hidden.shape[-1], 1)
        log_sigma, row_ids = forward.log_sigma.detach().to(device), forward.row_ids  # layers on several devices
        check_perturb("perturb", hidden, log_sigma[0], self.scale, self.rounding)
        if row_ids is not None:
            if row_ids.numel() != num_rows:
                raise ValueError(
                    f"perturbed: row_ids has shape {tuple(row_ids.shape)}; the hidden states have {num_rows} rows"
                )
            row_ids = row_ids.to(device)
        seed, step, start, engine = self.seed, forward.step, forward.row_start, pick(self.engine, device)
        at = None if forward.pointer is None else forward.pointer.to(device)
        row_ids = Coordinates(seed, step, self.layers[0], row_ids, start).stream("perturb", num_rows, device).row_ids
        return [
            Draw(engine, Stream(seed, step, layer, start, row_ids, at), sigma, position, self.scale, self.rounding)
            for position, (layer, sigma) in enumerate(zip(self.layers, log_sigma.exp().unbind(), strict=True))
        ]

    def _add(self, position: int, index: int, hidden: Tensor, forward: _Forward) -> Tensor:
        if in_graph(hidden):
            return self._add_to_fake(position, index, hidden, forward)
        device, log_sigma = hidden.device, forward.log_sigma
        alike = hidden.shape, hidden.dtype, device
        if alike not in forward.draws:
            forward.draws[alike] = self._draws(forward, hidden)
        draw = forward.draws[alike][position]
        if log_sigma.device != device:
            log_sigma = log_sigma.to(device)
        u: Tensor = Perturb.apply(hidden, log_sigma, draw)
        self.note(forward.number, forward.row_start, position, hidden, u, draw.sigma, draw.engine)
        return u

    def _add_to_fake(self, position: int, index: int, hidden: Tensor, forward: _Forward) -> Tensor:
        """The shapes alone: fake and meta tensors."""
        self._scope.num_perturbed += 1
        self._scope.ran.add(position)
        return perturb(
            hidden,
            self.log_sigma[position].to(hidden.device),
            seed=self.seed,
            step=forward.step,
            layer=index,
            row_start=forward.row_start,
            scale=self.scale,
            rounding=self.rounding,
            engine=self.engine,
        )

    def _add_compiled(self, place: Tensor, hidden: Tensor) -> Tensor:
        """The same as an operator in a graph."""
        if self.capturable:
            raise RuntimeError(_NOT_COMPILED)
        at, row_ids = self._switch.at, self._switch.row_ids
        if at is None:
            raise RuntimeError(f"perturbed: a layer {_OUTSIDE}")
        ids = None if row_ids is None else row_ids.reshape(-1).to(hidden.device)
        log_sigma = self.log_sigma.to(hidden.device)
        inputs = PerturbInputs(hidden, log_sigma, at, place, ids, self.scale, self.rounding, self.engine)
        return perturb_operator(inputs).u

    def on_layer(self, hook: LayerInput, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_compiling = torch.compiler.is_compiling()
        in_backward = not is_compiling and _in_backward()
        if not (self._switch.is_on if is_compiling else self._scope.is_on or in_backward):
            return None
        by_position = len(args) > 0 and isinstance(args[0], Tensor)
        hidden = args[0] if by_position else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"attach: layer {hook.index} was called with {len(args)} positional arguments and keywords {sorted(kwargs)}; its "
                "hidden states must come first or as hidden_states"
            )
        if is_compiling:
            u = self._add_compiled(hook.place, hidden)
        else:
            forward = self._recomputed(hook.index) if in_backward else self._entered(hook.index)
            if forward is None:
                return None
            u = self._add(hook.position, hook.index, hidden, forward)
        return ((u, *args[1:]), kwargs) if by_position else (args, {**kwargs, "hidden_states": u})

    def on_output(self, hook: Output, output: Any) -> Any:
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling and _in_backward() and self._step >= 0:
            raise RuntimeError(
                'perturbed: with layers="final" or "logits" the decoder as a whole cannot be recomputed in backward; '
                "checkpoint its layers"
            )
        if not (self._switch.is_on if is_compiling else self._scope.is_on):
            return None
        hidden = output if isinstance(output, Tensor) else getattr(output, hook.field, None)
        if hidden is None and isinstance(output, tuple):
            hidden = output[0]
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"attach: the model returned a {type(output).__name__} without {hook.field}; noise cannot be added to it"
            )
        if is_compiling:
            self._switch.at = begin(self._order)
            u = self._add_compiled(hook.place, hidden)
            finish(self._order, u.detach())
            self._switch.at = None
        else:
            u = self._add(0, hook.index, hidden, self._scope.forward or self._next_forward())
        if isinstance(output, Tensor):
            return u
        if hasattr(output, hook.field):
            setattr(output, hook.field, u)
            return output
        return (u, *output[1:])

    # -------------------------------------------------------------- what users read and keep

    @property
    def sigma(self) -> Tensor:
        """exp(log_sigma), (L,), detached."""
        return self.log_sigma.detach().exp()

    def param_group(self, lr: float) -> dict[str, Any]:
        """A parameter group for any torch optimiser: its own learning rate, and no weight decay (decay pulls sigma to 1)."""
        if isinstance(lr, bool) or not isinstance(lr, int | float | Tensor) or not lr >= 0:
            raise ValueError(f"param_group: lr={lr!r}; it needs a number >= 0")
        return {"params": list(self.parameters()), "lr": lr, "weight_decay": 0.0}

    def realised(self) -> dict[str, list[float]]:
        """How much of the noise survived the dtype, by layer, in the last step's first forward (first 64 rows).

        "rms_over_nominal": rms of u - h over sigma (times the row's rms where scale="rms"); "changed_frac": fraction of
        elements that changed. Syncs with the device. Warns once where a layer's ratio leaves [0.7, 1.4].
        """
        if not self._measured:
            return {"rms_over_nominal": [], "changed_frac": []}
        measured = [self._measured[p] for p in sorted(self._measured)]
        counts = torch.tensor([len(m.sums) * m.num_channels for m in measured], dtype=torch.float64, device="cpu")
        means = torch.stack([m.sums.cpu().double().sum(dim=0) for m in measured]) / counts[:, None]
        noise, changed, size = means.unbind(dim=1)
        nominal = torch.stack([m.sigma.cpu().double() for m in measured])
        if self.scale == "rms":
            nominal = nominal * size.sqrt()
        ratio = (noise.sqrt() / nominal.clamp(min=1e-30)).tolist()
        off = [self.layers[p] for p, r in zip(sorted(self._measured), ratio, strict=True) if not 0.7 <= r <= 1.4]
        if off and not self._warned:
            self._warned = True
            logger.warning(
                "the noise that reached layers %s is %.2g to %.2g times the size asked for: sigma is too small for the "
                'dtype of the hidden states and is rounded away or up. Use a larger sigma, scale="rms", '
                'rounding="stochastic", or float32.',
                off,
                min(ratio),
                max(ratio),
            )
        return {"rms_over_nominal": ratio, "changed_frac": changed.tolist()}

    def sum_gradient(self, group: dist.ProcessGroup | None = None, *, average: bool = False) -> None:
        """Sum log_sigma's gradient over data-parallel ranks, once a step, after its last backward; a collective call.

        DDP and FSDP do not know log_sigma: without this its values drift apart. Treat it as they treat the weights: DDP and
        FSDP divide the sum by the number of ranks unless told otherwise, and so does average=True.
        """
        if hasattr(self.log_sigma, "full_tensor"):
            raise RuntimeError(
                "sum_gradient: log_sigma is a DTensor: fully_shard took it for a weight and reduces it; keep the handle out of "
                "the module that is wrapped"
            )
        if self.log_sigma.requires_grad and dist.is_initialized():
            if self.log_sigma.grad is None:
                self.log_sigma.grad = torch.zeros_like(self.log_sigma)
            dist.all_reduce(self.log_sigma.grad, group=group)
            if average:
                self.log_sigma.grad /= dist.get_world_size(group)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, scale={self.scale!r}, rounding={self.rounding!r}, seed={self.seed}"

    def get_extra_state(self) -> dict[str, Any]:
        position = {"seed": self.seed, "step": self._step, "next_row": self._rows_so_far(), "forwards": self._forwards}
        return position | {"layers": list(self.layers), "scale": self.scale, "rounding": self.rounding}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, own in (("layers", list(self.layers)), ("scale", self.scale), ("rounding", self.rounding)):
            if state[name] != own:
                raise ValueError(f"load_state_dict: the state has {name}={state[name]!r}, this perturbation {own!r}")
        self.seed, self._step = state["seed"], state["step"]
        self._next_row, self._forwards = state["next_row"], state["forwards"]
        self._position = None

    def detach(self) -> None:
        """Take every hook off the model, which is then exactly as before. Doing it twice does nothing."""
        for removable in self._removables:
            removable.remove()
        self._removables.clear()
        parent = self._parent()
        if parent is not None and parent in attached and attached[parent]() is self:
            del attached[parent]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a Perturbation sits on one model and is neither copied nor pickled: save its state_dict(), attach to the other "
            "model, and load_state_dict() there"
        )

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
