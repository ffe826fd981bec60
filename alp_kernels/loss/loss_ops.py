"""policy_loss as an operator: what a compiled graph calls. All of its checks and data-dependent shapes are inside.

The derivative is formed with the loss, in closed form (objective.row_gradient): backward only scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import operators as ops
from ..objective import objective_of, row_gradient, row_loss
from .layout import BATCH_NAMES, BATCH_SCHEMA
from .policy import check_loss, level_log_ratio
from .stats import Stats

NUM_NUMBERS, NUM_FLAGS = 6, 2  # of Stats.rows


def _register(name, run, fake, *, setup=None, gradient=None):  # type: ignore
    ops.library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"alp_kernels::{name}", fake, lib=ops.library)
    if gradient is not None:
        torch.library.register_autograd(f"alp_kernels::{name}", gradient, setup_context=setup, lib=ops.library)


ops.library.define(
    f"policy_loss(Tensor logp, Tensor? entropy, {BATCH_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _policy_loss(logp: Tensor, entropy: Tensor | None, *batch_arguments: Any) -> tuple[Tensor, ...]:
    """loss (), its gradients in logp and entropy, logp and entropy on the mask (all like logp; (0,) without an entropy), and
    Stats.rows with num_nonfinite (1,)."""
    *given, nonfinite, spec = batch_arguments
    objective, logp = objective_of(spec), logp.detach()
    batch, index = check_loss(logp, entropy, objective, nonfinite, dict(zip(BATCH_NAMES, given, strict=True)))
    live, p = batch.select(index), logp.reshape(-1)[index]
    h = None if entropy is None else entropy.detach().reshape(-1)[index]
    ell, rows = level_log_ratio(p, live, objective), live.numbers.loss_rows()
    loss = (live.numbers["weight"] * row_loss(ell, p, h, rows, objective)).sum()

    def spread(values: Tensor | None) -> Tensor:
        out = torch.zeros(logp.shape, dtype=logp.dtype, device=logp.device)
        if values is not None:
            out.view(-1)[index] = values.to(out.dtype)
        return out

    dlogp, dentropy = row_gradient(ell, p, rows, objective)
    stats = Stats.measure(p, h, ell, live, batch, objective)
    numbers, flags = stats.rows(index, logp.numel())
    none = logp.new_empty(0)
    of_entropy = (none, none.clone()) if h is None else (spread(dentropy), spread(h))
    return loss, spread(dlogp), of_entropy[0], spread(p), of_entropy[1], numbers, flags, stats.num_nonfinite.clone()


def stats_fake(like: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty(NUM_NUMBERS, num_rows),
        like.new_empty(NUM_FLAGS, num_rows, dtype=torch.bool),
        like.new_empty(1, dtype=torch.int64),
    )


def _policy_loss_fake(logp: Tensor, entropy: Tensor | None, *batch_arguments: Any) -> tuple[Tensor, ...]:
    per_token = [logp.new_empty(logp.shape) for _ in range(4)]
    if entropy is None:
        per_token[1], per_token[3] = logp.new_empty(0), logp.new_empty(0)
    return logp.new_empty(()), *per_token, *stats_fake(logp, logp.numel())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:3])
    ctx.num_inputs, ctx.has_entropy = len(inputs), inputs[1] is not None


def _grad(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dlogp, dentropy = ctx.saved_tensors
    return dloss * dlogp, dloss * dentropy if ctx.has_entropy else None, *[None] * (ctx.num_inputs - 2)


_register("policy_loss", _policy_loss, _policy_loss_fake, setup=_setup, gradient=_grad)
