"""linear_logprob and fused_alp_loss as operators: what a compiled graph calls. Checks, chunks and row selections are inside.

`linear_logprob` makes its logits again in backward. `fused_alp_loss` returns the gradients beside the loss, already in the dtypes
of their tensors (and at the scale that float16 needs); backward multiplies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import operators as ops
from ..dtypes import real
from ..objective import objective_of
from ..reference import HeadRows
from .fused import fused_head, gradient_scale, logprob_gradients, logprob_rows
from .head import HEAD_SCHEMA, arguments_of, check_head, prepare, row_order
from .layout import BATCH_NAMES, BATCH_SCHEMA
from .loss_ops import stats_fake
from .transfer import Transfer

NUM_HEAD = HEAD_SCHEMA.count(",") + 1
TARGETS, NEEDS = 4, NUM_HEAD - 1  # positions in HEAD_SCHEMA


def _register(name, run, fake, *, setup=None, gradient=None):  # type: ignore
    ops.library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alp_kernels::{name}", fake, lib=ops.library)
    if gradient is not None:
        torch.library.register_autograd(f"alp_kernels::{name}", gradient, setup_context=setup, lib=ops.library)


ops.library.define(f"linear_logprob({HEAD_SCHEMA}) -> (Tensor, Tensor, Tensor)")
ops.library.define(
    f"linear_logprob_backward({HEAD_SCHEMA}, Tensor logp, Tensor entropy, Tensor lse, Tensor dlogp, Tensor dentropy)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
ops.library.define(
    f"fused_alp_loss({HEAD_SCHEMA}, {BATCH_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _gradients(grads: list[Tensor | None], likes: tuple[Tensor | None, ...], hidden: Tensor) -> tuple[Tensor, ...]:
    """Each in its tensor's dtype and shape, contiguous; (0,) for those that are not needed."""
    return tuple(
        torch.empty(0, dtype=hidden.dtype, device=hidden.device)
        if grad is None or like is None
        else grad.to(like.dtype).reshape(like.shape).contiguous()
        for grad, like in zip(grads, likes, strict=True)
    )


def _gradients_fake(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    hidden = args[0]
    return tuple(
        like.new_empty(like.shape) if needed else hidden.new_empty(0)
        for like, needed in zip(args[:4], args[NEEDS], strict=True)
    )


# ------------------------------------------------------------------ linear_logprob


def _linear_logprob(*args: Any) -> tuple[Tensor, ...]:
    """logp, entropy and log-sum-exp, like targets."""
    arguments, needs = arguments_of(*args)
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        transfer = Transfer()
        flat, weight, bias, plan = check_head("linear_logprob", arguments, transfer, needs)
        rows = logprob_rows(flat, weight, bias, plan, row_order(flat, arguments.mask, transfer))
    return tuple(v.view(arguments.targets.shape) for v in rows)


def _linear_logprob_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, targets = args[0], args[TARGETS]
    dtypes = (real(hidden), real(hidden), torch.float64)
    return tuple(hidden.new_empty(targets.shape, dtype=dtype) for dtype in dtypes)


def _linear_logprob_backward(*args: Any) -> tuple[Tensor, ...]:
    (arguments, needs), rest = arguments_of(*args[:NUM_HEAD]), [v.reshape(-1) for v in args[NUM_HEAD:]]
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        transfer = Transfer()
        flat, weight, bias, plan = check_head("linear_logprob", arguments, transfer, needs)
        logp, entropy, lse, dlogp, dentropy = rest
        order, rows = row_order(flat, arguments.mask, transfer), HeadRows(logp, entropy, lse)
        grads = logprob_gradients(flat, weight, bias, plan, order, rows, dlogp, dentropy, needs)
    return _gradients(grads, args[:4], arguments.hidden)


def _linear_logprob_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return _gradients_fake(args[:NUM_HEAD])


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    """Tensors where autograd wants them, the rest on ctx."""
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.others = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)], *outputs)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    _save_inputs(ctx, inputs, *output)


def _linear_grad(ctx: Any, dlogp: Tensor, dentropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
    inputs = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.is_tensor]
    grads = torch.ops.alp_kernels.linear_logprob_backward(*inputs, *tensors, dlogp, dentropy)
    needed = [grad if need else None for grad, need in zip(grads, inputs[NEEDS], strict=True)]
    return *needed, *[None] * (NUM_HEAD - 4)


# ------------------------------------------------------------------ fused_alp_loss


def _fused(*args: Any) -> tuple[Tensor, ...]:
    """loss (), logp and entropy like targets, four gradients, their scale (), and Stats.rows with num_nonfinite (1,)."""
    arguments, needs = arguments_of(*args[:NUM_HEAD])
    *given, nonfinite, spec = args[NUM_HEAD:]
    objective, targets = objective_of(spec), arguments.targets
    with torch.autocast(arguments.hidden.device.type, enabled=False):
        transfer = Transfer()
        checked = check_head("fused_alp_loss", arguments, transfer, needs)
        of_batch = dict(zip(BATCH_NAMES, given, strict=True))
        prepared = prepare("fused_alp_loss", checked, targets.shape, objective, nonfinite, of_batch, transfer, needs)
    fused, flat, sigma = fused_head(prepared), prepared.hidden, prepared.plan.head.sigma
    grads = fused.gradients
    if grads[3] is not None and sigma is not None:
        grads[3] = grads[3] * sigma
    scale = gradient_scale(prepared.batch, flat.dtype)
    return (
        fused.loss,
        fused.logp.view(targets.shape),
        fused.entropy.view(targets.shape),
        *_gradients(grads, args[:4], flat),
        torch.ones_like(fused.loss) if scale is None else scale,
        *fused.stats.rows(fused.index, targets.numel()),
        fused.stats.num_nonfinite.clone(),
    )


def _fused_fake(*args: Any) -> tuple[Tensor, ...]:
    hidden, targets = args[0], args[TARGETS]
    loss, scale = (hidden.new_empty((), dtype=real(hidden)) for _ in range(2))
    logp, entropy = (
        torch.empty_like(targets, dtype=loss.dtype, memory_format=torch.contiguous_format) for _ in range(2)
    )
    return loss, logp, entropy, *_gradients_fake(args[:NUM_HEAD]), scale, *stats_fake(loss, targets.numel())


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:8])
    ctx.needs, ctx.num_inputs = inputs[NEEDS], len(inputs)


def _fused_grad(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *grads, scale = ctx.saved_tensors
    by = dloss * scale
    needed = [(grad * by).to(grad.dtype) if need else None for grad, need in zip(grads, ctx.needs, strict=True)]
    return *needed, *[None] * (ctx.num_inputs - 4)


_register("linear_logprob", _linear_logprob, _linear_logprob_fake, setup=_linear_setup, gradient=_linear_grad)
_register("linear_logprob_backward", _linear_logprob_backward, _linear_logprob_backward_fake)
_register("fused_alp_loss", _fused, _fused_fake, setup=_fused_setup, gradient=_fused_grad)
