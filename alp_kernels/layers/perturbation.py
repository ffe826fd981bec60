"""The handle of a perturbed model: sigma, the scope that switches the noise on, and `detach`.

hooks.py adds the noise; forwards.py tracks which forward a layer is in; rows.py numbers the rows; realised.py measures
the noise that survives rounding.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import LARGEST, SMALLEST, check_flag, check_integer, check_rate, check_tensor, refuse_value
from ..stream import FINAL_LAYER, LOGITS_LAYER, MAX_SEED, MAX_STEP, LogitNoise, check_row_ids
from .forwards import Forwards, is_captured
from .hooks import Enter, LayerInput, Leave, Output, OwnForward
from .realised import Realised
from .rows import Rows

logger = logging.getLogger("alp_kernels")

Noise: TypeAlias = Callable[..., AbstractContextManager[Any]]
"""Opens the scope around one forward: takes row_ids, as `Perturbation.perturbed` does, or nothing."""

_PROBE = 1 << 31
"""The bit of a step's number that `probing` sets, above the steps of any update."""

attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Perturbation]] = weakref.WeakKeyDictionary()
"""Each perturbed decoder's handle. With it `attach` refuses a perturbed decoder, whichever module wraps it."""


class Perturbation(nn.Module):
    """The handle `attach` returns: sigma, the scope that switches the noise on, and `detach`.

    Its only parameter is `log_sigma` (L,) float32, one value for each perturbed layer. The model's
    `named_parameters()` does not include it, so trainers that push weights to an inference engine never push it.
    `state_dict()` holds log_sigma, the seed and the position in the noise stream; loading it continues the stream.
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
        needs_match: bool,
    ) -> None:
        super().__init__()
        if learnable:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)
        self.layers = tuple(layers)
        self.seed, self.scale, self.rounding = seed, scale, rounding
        self.sigma_bounds, self.engine = sigma_bounds, engine
        self.needs_match = needs_match
        self._parent = weakref.ref(parent)
        self._rows, self._realised = Rows(data_rank), Realised()
        self.forwards = Forwards(self, self._rows, self._realised, capturable=capturable)
        self._said_partial = False
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

    @property
    def is_attached(self) -> bool:
        return bool(self._removables)

    @property
    def is_open(self) -> bool:
        """Whether a scope is open: `perturbed` or `probing`."""
        return self.forwards.scope.is_open

    @property
    def capturable(self) -> bool:
        return self.forwards.capturable

    @property
    def data_rank(self) -> int | None:
        return self._rows.data_rank

    @data_rank.setter
    def data_rank(self, rank: int | None) -> None:
        self._rows.data_rank = rank

    @property
    def was_opened(self) -> bool:
        """Whether the scope was ever open, in this process or in the run that saved the loaded state."""
        return self._rows.step >= 0

    # -------------------------------------------------------------- the scope

    @contextmanager
    def perturbed(self, step: int, row_ids: Tensor | None = None) -> Iterator[Perturbation]:
        """Switch the noise on for the forwards inside the scope, and for their backward, inside or later.

        Args:
            step: optimiser step; its noise differs from every other step's. A second scope of the same step continues the
                row numbers.
            row_ids: int64, global identities below 2^48 of the positions that the layers read, in the shape and order of the
                hidden states: (B, T) for (B, T, D), (T, B) for (T, B, D); the two cannot be told apart if B = T. Axes of
                length 1 do not count, and flat ids are for packed rows. E.g. `stream.row_ids(samples[:, None], positions)`.
                With them, packing, padding, order, micro-batches and ranks do not change a row's noise. Where a position
                has several streams, (B, T, S, D) or (S, B, T, D), all of them are one row of S * D channels, also for
                scale="rms". Without row_ids, rows of D channels are numbered over the step, from data_rank << 32 on.

        With `attach(capturable=True)`, a CUDA graph captured in a scope draws the noise of the scope it is replayed in.
        Replays and eager forwards share one row numbering. Replays read row_ids from the tensor given at capture:

            with handle.perturbed(step=0):
                warm_up(tokens)  # required before every capture
                with torch.cuda.graph(graph):
                    loss = update(tokens)  # forward and backward
            for step in range(1, num_steps):
                tokens.copy_(batches[step])
                with handle.perturbed(step=step):
                    graph.replay()

        If Python perturbed no layer in such a scope, its end waits for the device and checks whether a replay did. A graph
        replayed outside any scope still draws noise, as if the last scope were open.

        Raises:
            RuntimeError: at the end, if no layer was perturbed, as the run would otherwise silently go without noise.
        """
        step = check_integer("perturbed", "step", step, 0, MAX_STEP)
        check_row_ids("perturbed", row_ids)
        if self.needs_match:
            raise RuntimeError(
                "perturbed: sigma='matched' is not known yet; call match_sigma(handle, score, rollout_logp, mask, ...) on the "
                "first batch, before its update"
            )
        with self._open(step, row_ids):
            yield self

    @contextmanager
    def probing(self, only: int | None = None) -> Iterator[Noise]:
        """Yield a function that opens the scope for forwards that measure the noise: `with noise(row_ids): ...`.

        No update uses their noise, and they use none of an update's: their step is 2^31 above the last update's, and the
        numbers of the update's rows and `realised` stay as they are. Scopes of one `probing` continue the row numbers.
        only: position in `layers` of the one layer that gets noise; None: all.
        """
        if only is not None:
            only = check_integer("probing", "only", only, 0, len(self.layers) - 1)
        step = max(self._rows.step, 0) | _PROBE

        @contextmanager
        def noise(row_ids: Tensor | None = None) -> Iterator[Perturbation]:
            check_row_ids("noise", row_ids)
            with self._open(step, row_ids):
                own = self.log_sigma.data
                if only is not None:
                    self.log_sigma.data = torch.full_like(own, -math.inf)
                    self.log_sigma.data[only] = own[only]
                try:
                    yield self
                finally:
                    self.log_sigma.data = own

        with self._rows.aside(), self._realised.aside():
            yield noise

    @contextmanager
    def _open(self, step: int, row_ids: Tensor | None) -> Iterator[None]:
        forwards, rows = self.forwards, self._rows
        if forwards.scope.is_open:
            raise RuntimeError("perturbed: this scope is already open; scopes do not nest")
        if not self.is_attached:
            raise RuntimeError("perturbed: this perturbation was detached from its model")
        if is_captured(self.log_sigma):
            raise RuntimeError(
                "perturbed: a CUDA graph being captured would freeze this step's number; open the scope around the capture"
            )
        is_new = rows.begin(step)
        if self.sigma_bounds is not None:
            with torch.no_grad():
                self.log_sigma.clamp_(*map(math.log, self.sigma_bounds))
        for own_forward in self._own_forwards:
            own_forward.set()
        if self.capturable:
            rows.write(self.log_sigma.device, is_new)
        forwards.open(row_ids)
        try:
            yield
        finally:
            forwards.close()
        if forwards.scope.num_perturbed == 0 and not rows.was_replayed():
            if self.layers == (LOGITS_LAYER,):
                raise RuntimeError(
                    "perturbed: no logits were perturbed inside the scope; run the model's own forward, or with a fused "
                    "head pass logit_noise=handle.logit_noise(num_rows)"
                )
            raise RuntimeError(
                f"perturbed: no layer of {list(self.layers)} was perturbed inside the scope (step {step}); the model's forward "
                "must run inside it, on the model that was given to attach"
            )
        if 0 < len(forwards.scope.ran) < len(self.layers) and not self._said_partial:
            self._said_partial = True
            left = [layer for position, layer in enumerate(self.layers) if position not in forwards.scope.ran]
            logger.warning(
                "layers %s did not run in a perturbed forward while others did: they get no noise, their sigma no gradient. "
                "The model drops layers (layerdrop), or they were replaced after attach; if replaced, call attach again.",
                left,
            )

    def logit_noise(self, num_rows: int, row_ids: Tensor | None = None) -> LogitNoise:
        """Return `fused_alp_loss`'s logit_noise, for layers="logits" with a fused head. Call it inside the scope.

        num_rows: targets.numel(). row_ids: shaped like targets; by default the scope's, which must then have that shape.
        """
        if self.layers != (LOGITS_LAYER,):
            raise RuntimeError('logit_noise: it needs a handle from attach(layers="logits")')
        if self.scale != "absolute":
            raise RuntimeError(
                "logit_noise: a fused head makes no rows of logits to take the RMS of; attach with scale='absolute'"
            )
        if self.capturable:
            raise RuntimeError(
                "logit_noise: the loss cannot read step and row number from the device; attach with capturable=False"
            )
        num_rows = check_integer("logit_noise", "num_rows", num_rows, 1)
        check_row_ids("logit_noise", row_ids)
        scope = self.forwards.scope
        if not scope.is_open:
            raise RuntimeError("logit_noise: open the scope first: with handle.perturbed(step=...)")
        if row_ids is None and scope.row_ids is not None:
            row_ids = scope.row_ids
        if row_ids is not None and row_ids.numel() != num_rows:
            raise ValueError(
                f"logit_noise: row_ids has shape {tuple(row_ids.shape)}; it needs {num_rows} values, one for each row that goes "
                "into the loss"
            )
        start = self._rows.take(num_rows) if row_ids is None else 0
        scope.num_perturbed += 1
        return LogitNoise(self.log_sigma, self.seed, self._rows.step, row_ids, start, num_rows)

    # -------------------------------------------------------------- sigma, its gradient, its state

    @property
    def sigma(self) -> Tensor:
        """exp(log_sigma), (L,), detached."""
        return self.log_sigma.detach().exp()

    def param_group(self, lr: float) -> dict[str, Any]:
        """Return a parameter group for any torch optimiser, with its own lr and no weight decay (decay pulls sigma to 1)."""
        if isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_meta:
            check_rate("param_group", "lr", lr.item())
        else:
            check_rate("param_group", "lr", lr)
        return {"params": list(self.parameters()), "lr": lr, "weight_decay": 0.0}

    def realised(self) -> dict[str, list[float]]:
        """Report how much noise survived rounding to the dtype, by layer, in the last step's first forward (first 64 rows).

        "rms_over_nominal": rms of u - h, divided by sigma (by sigma * rms of h if scale="rms"). "changed_frac": fraction
        of elements that changed. Rows that are NaN or inf, such as padding, are left out. Synchronises with the device.
        Warns once if a layer's ratio is outside [0.7, 1.4].
        """
        return self._realised.report(self.layers, self.scale)

    def sum_gradient(self, group: dist.ProcessGroup | None = None, *, average: bool = False) -> None:
        """All-reduce log_sigma's gradient over data-parallel ranks. Call it on every rank, once a step, after all backwards.

        DDP and FSDP do not see log_sigma; without this call its values drift apart between ranks. Reduce it as the weights:
        by default DDP and FSDP divide the sum by the number of ranks, and average=True does the same.
        """
        check_flag("sum_gradient", "average", average)
        if hasattr(self.log_sigma, "full_tensor"):
            raise RuntimeError(
                "sum_gradient: log_sigma is a DTensor: fully_shard took it for a weight and reduces its gradient; keep the "
                "handle out of the wrapped module"
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
        of_noise = {"layers": list(self.layers), "scale": self.scale, "rounding": self.rounding}
        return {"seed": self.seed, "needs_match": self.needs_match} | self._rows.state() | of_noise

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Check the whole state before any of it is loaded."""
        log_sigma, extra = (state_dict.get(prefix + name) for name in ("log_sigma", "_extra_state"))
        if isinstance(log_sigma, Tensor):
            check_tensor("load_state_dict", "log_sigma", log_sigma)
            if log_sigma.is_meta or not log_sigma.is_floating_point():
                refuse_value("load_state_dict", "log_sigma", log_sigma, "float32 numbers")
            sigma = log_sigma.detach().float().exp()
            if not bool(((sigma >= SMALLEST) & (sigma <= LARGEST)).all()):
                raise ValueError(
                    f"load_state_dict: log_sigma is {log_sigma.tolist()}; it needs logarithms of numbers > 0 that float32 holds"
                )
        if extra is not None:
            self._read(extra)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        numbers = self._read(state)
        self.seed = numbers["seed"]
        self.needs_match = bool(state.get("needs_match", False))
        self._rows.load(numbers)

    def _read(self, state: dict[str, Any]) -> dict[str, int]:
        """Return the numbers of an extra state; raise if it is not one of this perturbation's."""
        where = "load_state_dict"
        needed = self.get_extra_state().keys() - {"needs_match"}  # states of versions before it have none
        if not isinstance(state, dict) or (missing := sorted(needed - state.keys())):
            lacks = f"a state without {', '.join(missing)}" if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(f"{where}: {lacks} is no perturbation's; it needs what state_dict() of a handle returns")
        for name, own in (("layers", list(self.layers)), ("scale", self.scale), ("rounding", self.rounding)):
            if state[name] != own:
                raise ValueError(f"{where}: the state has {name}={state[name]!r}, this perturbation {own!r}")
        ranges = {"seed": (0, MAX_SEED), "step": (-1, MAX_STEP), "next_row": (0, None), "forwards": (0, None)}
        return {name: check_integer(where, name, state[name], *span) for name, span in ranges.items()}

    def detach(self) -> None:
        """Remove every hook, which restores the model exactly. A second call does nothing."""
        for removable in self._removables:
            removable.remove()
        self._removables.clear()
        parent = self._parent()
        if parent is not None and parent in attached and attached[parent]() is self:
            del attached[parent]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a Perturbation belongs to one model and can be neither copied nor pickled: save its state_dict(), attach to the "
            "other model, and call load_state_dict() on the new handle"
        )

    def __enter__(self) -> Perturbation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()
