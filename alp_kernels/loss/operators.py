"""linear_logprob and fused_alp_loss as operators of a compiled graph; they contain the checks, chunks and row selection.

`linear_logprob` recomputes its logits in backward. `fused_alp_loss` returns the gradients with the loss, in their tensors'
dtypes (float32 for float16, whose range is small); backward multiplies them by the loss's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import real
from ..noise.operators import in_tensors, stream_of
from ..operators import Operator
from ..reference import HeadRows
from ..stream import LOGITS_LAYER, LogitNoise
from .arguments import HeadInputs, check_head
from .fused import fused_head, logprob_gradients, logprob_rows, prepare, row_order
from .head import Head
from .inputs import LossInputs
from .plan import Gradients, Needs
from .precision import FLOAT32
from .products import gradient_dtype
from .stats import StatsRows
from .support import Support
from .transfer import Transfer


class Wire(NamedTuple):
    """HeadInputs in types that an operator accepts."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    log_sigma: Tensor | None
    targets: Tensor
    is_wanted: Tensor | None  # HeadInputs.mask
    temperatures: Tensor | None
    temperature: float  # if temperatures is None
    softcap: float | None
    logit_scale: float
    at: Tensor | None  # coordinates of the noise on the logits, with row_ids: noise/operators.py
    row_ids: Tensor | None
    support_tokens: Tensor | None  # Head.support
    support_offsets: Tensor | None
    chunk_bytes: int | None
    engine: str | None
    precision: str | None  # of Head.dtype
    needs: list[bool]

    @staticmethod
    def of(inputs: HeadInputs) -> Wire:
        head, noise = inputs.head, inputs.head.logit_noise
        by_row = head.temperature if isinstance(head.temperature, Tensor) else None
        return Wire(
            hidden=inputs.hidden,
            weight=head.weight,
            bias=head.bias,
            log_sigma=None if noise is None else noise.log_sigma,
            targets=inputs.targets,
            is_wanted=inputs.mask,
            temperatures=by_row,
            temperature=1.0 if isinstance(head.temperature, Tensor) else head.temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            at=None if noise is None else in_tensors(noise.coordinates.check("logit_noise")).at,
            row_ids=None if noise is None else noise.row_ids,
            support_tokens=None if head.support is None else head.support.tokens,
            support_offsets=None if head.support is None else head.support.offsets,
            chunk_bytes=inputs.chunk_bytes,
            engine=inputs.engine,
            precision=head.precision,
            needs=list(inputs.needs),
        )

    def inputs(self) -> HeadInputs:
        """Return the HeadInputs, detached."""
        noise = None
        if self.log_sigma is not None and self.at is not None:
            stream = stream_of(self.at, LOGITS_LAYER, self.row_ids)
            noise = LogitNoise(self.log_sigma.detach(), stream.seed, stream.step, self.row_ids, stream.row_start)
        support = None
        if self.support_tokens is not None and self.support_offsets is not None:
            support = Support(self.support_tokens, self.support_offsets)
        head = Head(
            self.weight.detach(),
            None if self.bias is None else self.bias.detach(),
            self.temperature if self.temperatures is None else self.temperatures,
            self.softcap,
            self.logit_scale,
            noise,
            support=support,
            dtype=torch.float32 if self.precision == FLOAT32 else self.precision,
        )
        rest = (self.targets, self.is_wanted, self.chunk_bytes, self.engine, Needs(*self.needs))
        return HeadInputs(self.hidden.detach(), head, *rest)

    def gradients(self, grads: Gradients) -> WireGradients:
        """Return each gradient in its tensor's shape and `gradient_dtype`, contiguous; (0,) if it is not needed."""
        likes = (self.hidden, self.weight, self.bias, self.log_sigma)
        return WireGradients(
            *(
                self.hidden.new_empty(0)
                if grad is None or like is None
                else grad.to(gradient_dtype(like)).reshape(like.shape).contiguous()
                for grad, like in zip(grads, likes, strict=True)
            )
        )

    def empty_gradients(self) -> WireGradients:
        likes = zip((self.hidden, self.weight, self.bias, self.log_sigma), self.needs, strict=True)
        empty = (
            like.new_empty(like.shape, dtype=gradient_dtype(like))
            if needed and like is not None
            else self.hidden.new_empty(0)
            for like, needed in likes
        )
        return WireGradients(*empty)


class WireGradients(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    log_sigma: Tensor

    def needed(self, needs: list[bool], dtype: torch.dtype) -> dict[str, Tensor | None]:
        """Return the needed gradients by their field names in Wire. dtype: of hidden, weight and bias."""
        found = {name: grad for name, grad, need in zip(self._fields, self, needs, strict=True) if need}
        return {name: grad if name == "log_sigma" else grad.to(dtype) for name, grad in found.items()}


# ------------------------------------------------------------------ linear_logprob


class LogprobRows(NamedTuple):
    """Each shaped like targets."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class _LogprobBackward(NamedTuple):
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    dlogp: Tensor
    dentropy: Tensor


def _linear_logprob(wire: Wire) -> LogprobRows:
    inputs, transfer = wire.inputs(), Transfer()
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        operands = check_head("linear_logprob", inputs, transfer)
        rows = logprob_rows(operands, row_order("linear_logprob", operands.hidden, inputs.mask, transfer))
    return LogprobRows(*(v.view(inputs.targets.shape) for v in rows))


def _linear_logprob_fake(wire: Wire) -> LogprobRows:
    dtypes = (real(wire.hidden), real(wire.hidden), torch.float64)
    return LogprobRows(*(wire.hidden.new_empty(wire.targets.shape, dtype=dtype) for dtype in dtypes))


def _linear_logprob_backward(wire: Wire, given: _LogprobBackward) -> WireGradients:
    inputs, transfer = wire.inputs(), Transfer()
    logp, entropy, lse, dlogp, dentropy = (v.reshape(-1) for v in given)
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        operands = check_head("linear_logprob", inputs, transfer)
        order = row_order("linear_logprob", operands.hidden, inputs.mask, transfer)
        grads = logprob_gradients(operands, order, HeadRows(logp, entropy, lse), dlogp, dentropy, inputs.needs)
    return wire.gradients(grads)


def _linear_logprob_backward_fake(wire: Wire, given: _LogprobBackward) -> WireGradients:
    return wire.empty_gradients()


def _linear_setup(ctx: Any, wire: Wire, out: LogprobRows) -> None:
    """Save tensors with save_for_backward, the rest on ctx."""
    ctx.mark_non_differentiable(out.lse)
    tensors = {name: value for name, value in wire._asdict().items() if isinstance(value, Tensor)}
    ctx.others = {name: value for name, value in wire._asdict().items() if name not in tensors}
    ctx.names = list(tensors)
    ctx.save_for_backward(*tensors.values(), *out)


def _linear_gradient(ctx: Any, grads: LogprobRows) -> dict[str, Tensor | None]:
    *tensors, logp, entropy, lse = ctx.saved_tensors
    wire = Wire(**ctx.others, **dict(zip(ctx.names, tensors, strict=True)))
    given = _LogprobBackward(logp, entropy, lse, grads.logp, grads.entropy)
    return _linear_logprob_backward_operator(wire, given).needed(wire.needs, wire.hidden.dtype)


linear_logprob_operator = Operator(
    "linear_logprob", (Wire,), LogprobRows, _linear_logprob, _linear_logprob_fake,
    setup=_linear_setup, gradient=_linear_gradient,
)  # fmt: skip
_linear_logprob_backward_operator = Operator(
    "linear_logprob_backward", (Wire, _LogprobBackward), WireGradients,
    _linear_logprob_backward, _linear_logprob_backward_fake,
)  # fmt: skip


# ------------------------------------------------------------------ fused_alp_loss


class FusedOutput(NamedTuple):
    loss: Tensor  # ()
    logp: Tensor  # like targets, and so is entropy
    entropy: Tensor
    dhidden: Tensor  # this and the next three as in WireGradients
    dweight: Tensor
    dbias: Tensor
    dlog_sigma: Tensor
    numbers: Tensor  # this and the next two as in StatsRows
    flags: Tensor
    num_nonfinite: Tensor

    @property
    def gradients(self) -> WireGradients:
        return WireGradients(self.dhidden, self.dweight, self.dbias, self.dlog_sigma)

    @property
    def stats_rows(self) -> StatsRows:
        return StatsRows(self.numbers, self.flags, self.num_nonfinite)


def _fused(wire: Wire, loss: LossInputs) -> FusedOutput:
    inputs, transfer = wire.inputs(), Transfer()
    shape = inputs.targets.shape
    with torch.autocast(inputs.hidden.device.type, enabled=False):
        operands = check_head("fused_alp_loss", inputs, transfer, loss)
        given = prepare("fused_alp_loss", operands, loss, shape, transfer, inputs.needs)
    fused, sigma = fused_head(given), operands.plan.transform.sigma
    grads = fused.gradients
    if grads.sigma is not None and sigma is not None:
        grads = grads._replace(sigma=grads.sigma * sigma)
    return FusedOutput(
        fused.loss,
        fused.logp.view(shape),
        fused.entropy.view(shape),
        *wire.gradients(grads),
        *fused.stats.rows(fused.index, shape.numel()),
    )


def _fused_fake(wire: Wire, loss: LossInputs) -> FusedOutput:
    value = wire.hidden.new_empty((), dtype=real(wire.hidden))
    logp, entropy = (
        torch.empty_like(wire.targets, dtype=value.dtype, memory_format=torch.contiguous_format) for _ in range(2)
    )
    stats = StatsRows.empty_like(value, wire.targets.numel())
    return FusedOutput(value, logp, entropy, *wire.empty_gradients(), *stats)


def _fused_setup(ctx: Any, wire: Wire, loss: LossInputs, out: FusedOutput) -> None:
    ctx.mark_non_differentiable(*out[1:])
    ctx.save_for_backward(*out.gradients)
    ctx.needs, ctx.dtype = wire.needs, wire.hidden.dtype


def _fused_gradient(ctx: Any, grads: FusedOutput) -> dict[str, Tensor | None]:
    formed = (grad * grads.loss for grad in ctx.saved_tensors)
    return WireGradients(*formed).needed(ctx.needs, ctx.dtype)


fused_alp_loss_operator = Operator(
    "fused_alp_loss", (Wire, LossInputs), FusedOutput, _fused, _fused_fake, setup=_fused_setup, gradient=_fused_gradient
)
