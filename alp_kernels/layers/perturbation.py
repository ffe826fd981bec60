"""The handle on a perturbed model: sigma, the scope that switches the noise on, and the way back.

hooks.py adds the noise; forwards.py knows which forward a layer is in; rows.py numbers the rows; realised.py measures.
"""

from __future__ import annotations

import logging
import math
import operator
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..stream import FINAL_LAYER, LOGITS_LAYER, MAX_STEP, LogitNoise
from .forwards import Forwards, is_captured
from .hooks import Enter, LayerInput, Leave, Output, OwnForward
from .realised import Realised
from .rows import Rows

logger = logging.getLogger("alp_kernels")

attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Perturbation]] = weakref.WeakKeyDictionary()
"""The handle on each perturbed decoder, so that none is perturbed twice, by whatever module it is reached."""


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
        self.sigma_bounds, self.engine = sigma_bounds, engine
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
        """Whether its scope was ever open, here or in the run whose state was loaded."""
        return self._rows.step >= 0

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
        forwards, rows = self.forwards, self._rows
        if forwards.scope.is_open:
            raise RuntimeError("perturbed: this scope is already open; scopes do not nest")
        if not self.is_attached:
            raise RuntimeError("perturbed: this perturbation was detached from its model")
        if is_captured(self.log_sigma):
            raise RuntimeError(
                "perturbed: a CUDA graph would hold this step's number; open the scope around the capture"
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
            yield self
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
        scope = self.forwards.scope
        if not scope.is_open:
            raise RuntimeError("logit_noise: open the scope first: with handle.perturbed(step=...)")
        if row_ids is None and scope.row_ids is not None:
            row_ids = scope.row_ids
        if row_ids is not None and row_ids.numel() != num_rows:
            raise ValueError(
                f"logit_noise: row_ids has shape {tuple(row_ids.shape)}; {num_rows} rows need as many (give those of the rows "
                "that go into the loss)"
            )
        start = self._rows.take(num_rows) if row_ids is None else 0
        scope.num_perturbed += 1
        return LogitNoise(self.log_sigma, self.seed, self._rows.step, row_ids, start)

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
        return self._realised.report(self.layers, self.scale)

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
        of_noise = {"layers": list(self.layers), "scale": self.scale, "rounding": self.rounding}
        return {"seed": self.seed} | self._rows.state() | of_noise

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, own in (("layers", list(self.layers)), ("scale", self.scale), ("rounding", self.rounding)):
            if state[name] != own:
                raise ValueError(f"load_state_dict: the state has {name}={state[name]!r}, this perturbation {own!r}")
        self.seed = state["seed"]
        self._rows.load(state)

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
