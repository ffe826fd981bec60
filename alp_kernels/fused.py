"""The fused head's autograd functions: a chunk's logits are made, used and replaced by their gradient in place.

A row's gradient needs only its own logits and coefficients known in the chunk, so three products of N x V x D are enough: the
logits, dh and dW. Token level: any rows make a chunk. Sequence, turn and cumulative levels: a chunk holds whole sequences;
one that does not fit is passed twice (a fourth product).
Rows outside the mask cost no product; rows with a zero advantage no backward product, nor clipped ones on the CPU.
Derivation: docs/math.md, section 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Batch, first_and_last, segment_sum
from .loss import level_log_ratio
from .objective import Objective, row_gradient, row_loss
from .products import Plan, Whole, even_sizes
from .reference import HeadRows


class Order(NamedTuple):
    """Which rows are computed, and together with which."""

    rows: Tensor  # (n,) the masked-in rows, those that may have a gradient first
    groups: list[
        list[int]
    ]  # rows whose loss is taken together: sizes of their chunks, more than one for a long sequence
    num_plain: int  # rows at the end that need only their log-probability


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    batch: Batch,
    objective: Objective,
    order: Order,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """The loss (), logp and entropy (N,), and the gradients of hidden, weight, bias and sigma where `needs` asks.

    The gradients are those of loss / gradient_scale, summed and not yet rounded to their tensors' dtypes.
    """
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp, entropy = (torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(2))
    products = plan.products(hidden, weight, bias, needs, sum(map(len, order.groups)))

    def noted(index: Tensor, out: HeadRows) -> HeadRows:
        logp[index], entropy[index] = out.logp, out.entropy
        return out

    scaled = replace(batch, weight=batch.weight / gradient_scale(batch, hidden.dtype))
    num_graded = len(order.rows) - order.num_plain if any(needs) else 0
    for index in products.parts(order.rows[num_graded:]):
        noted(index, products.logprob(index))
    groups = order.rows[:num_graded].split([sum(sizes) for sizes in order.groups]) if num_graded else ()
    for group, sizes in zip(groups, order.groups, strict=False):
        rows = scaled.select(group)
        if isinstance(products, Whole) and objective.level == "token" and plan.engine.FUSES_TOKEN_LOSS:
            noted(group, products.token_loss(group, rows.loss_rows(), objective))
            continue
        *before, last = group.split(sizes)  # one part, but for a sequence longer than a chunk
        outs = [noted(index, products.logprob(index)) for index in before]
        out, kept = products.keep(last, objective.entropy_coef != 0)
        noted(last, out)
        dlogp, dentropy = coefficients(logp[group], rows, objective)
        dlogps = dlogp.split(sizes)
        dentropies = [None] * len(sizes) if dentropy is None else dentropy.split(sizes)
        products.backward(last, kept, out, dlogps[-1], dentropies[-1])
        del kept  # before the next chunk's
        for index, out, dp, dh in zip(before, outs, dlogps, dentropies, strict=False):
            products.backward(index, None, out, dp, dh)
    index = order.rows.sort().values  # sequences in order again
    live, p, h = batch.select(index), logp[index], entropy[index]
    ell = level_log_ratio(p, live, objective)
    loss = (live.weight * row_loss(ell, p, h, live.loss_rows(), objective)).sum()
    return loss, logp, entropy, products.gradients()


class FusedLoss(torch.autograd.Function):
    """Returns (sum of weighted row losses, logp (N,), entropy (N,)); the gradients are formed with the loss.

    The first backward hands them out, scaled in place, so that no second copy of a V x D gradient is made; a second one
    forms them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma: Tensor | None,
        plan: Plan,
        batch: Batch,
        objective: Objective,
        order: Order,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = [need and plan.with_grad for need in ctx.needs_input_grad[:4]]
        with torch.autocast(hidden.device.type, enabled=False):
            out = loss_and_gradients(hidden, weight, bias, plan, batch, objective, order, needs)
        loss, logp, entropy, ctx.grads = out
        ctx.save_for_backward(hidden, weight, bias)
        ctx.again = (plan, batch, objective, order, needs)
        ctx.log_sigma_shape = None if log_sigma is None else log_sigma.shape
        ctx.mark_non_differentiable(logp, entropy)
        return loss, logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, _dlogp: Tensor, _dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        plan, batch = ctx.again[:2]
        if grads is None:
            with torch.autocast(hidden.device.type, enabled=False):
                *_, grads = loss_and_gradients(hidden, weight, bias, *ctx.again)
        by = dloss * gradient_scale(batch, hidden.dtype)
        likes = (hidden, weight, bias, by)
        dhidden, dweight, dbias, dsigma = (
            None if g is None else _rounded(g, like.dtype, by, plan) for g, like in zip(grads, likes, strict=True)
        )
        dlog_sigma = None if dsigma is None else (dsigma * plan.head.sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, *[None] * 4


def _rounded(gradient: Tensor, dtype: torch.dtype, by: Tensor, plan: Plan) -> Tensor:
    """gradient * by in `dtype`, in one pass and in place where it can be."""
    if gradient.dtype == dtype:
        scaled: Tensor = plan.engine.scale_(gradient, by)
        return scaled
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


def gradient_scale(batch: Batch, dtype: torch.dtype) -> Tensor:
    """() what gradients are divided by while they are formed: 1, but for float16, which would underflow.

    There it is the largest aggregation weight, up to the next power of two: a loss scaled by its caller (GradScaler) comes
    too late for gradients that are formed with the loss.
    """
    if dtype != torch.float16:
        return torch.ones_like(batch.weight[0])
    _, exponent = torch.frexp(batch.weight.amax())
    return torch.ldexp(torch.ones_like(batch.weight[0]), exponent)


def coefficients(logp: Tensor, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Gradient of the weighted loss with respect to logp and (where it has a coefficient) entropy, each (n,)."""
    return row_gradient(level_log_ratio(logp, batch, objective), logp, batch.loss_rows(), objective)


class LinearLogprob(torch.autograd.Function):
    """Returns (logp (N,), entropy (N,)); saves a few numbers a row beside its inputs and makes the logits
    again in backward (four products)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma: Tensor | None,
        plan: Plan,
        order: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy, lse = logprob_rows(hidden, weight, bias, plan, order)
        ctx.save_for_backward(hidden, weight, bias, order, logp, entropy, lse)
        ctx.plan, ctx.log_sigma_shape = plan, None if log_sigma is None else log_sigma.shape
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, order, *rows = ctx.saved_tensors
        dhidden, dweight, dbias, dlog_sigma = logprob_gradients(
            hidden, weight, bias, ctx.plan, order, HeadRows(*rows), dlogp, dentropy, ctx.needs_input_grad[:4]
        )
        dlog_sigma = None if dlog_sigma is None else dlog_sigma.reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, None, None


def logprob_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, order: Tensor) -> HeadRows:
    """Log-probability, entropy and log-sum-exp, each (N,), of the rows `order`; 0 at the others."""
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = HeadRows(*(torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(3)))
    products = plan.products(hidden, weight, bias, [False] * 4, 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for index in products.parts(order):
            for whole, part in zip(out, products.logprob(index), strict=True):
                whole[index] = part
    return out


def logprob_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    order: Tensor,
    rows: HeadRows,
    dlogp: Tensor,
    dentropy: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of hidden, weight, bias and log_sigma () from those of `logprob_rows`; the logits are made again."""
    products = plan.products(hidden, weight, bias, needs, -(-len(order) // plan.chunk_rows))
    with torch.autocast(hidden.device.type, enabled=False):
        for index in products.parts(order):
            out = HeadRows(*(v[index] for v in rows))
            products.backward(index, None, out, dlogp[index], dentropy[index])
    sigma = plan.head.sigma
    grads = zip(products.gradients(), (hidden, weight, bias, sigma), strict=True)
    dhidden, dweight, dbias, dsigma = (None if g is None or like is None else g.to(like.dtype) for g, like in grads)
    return [dhidden, dweight, dbias, None if dsigma is None or sigma is None else dsigma * sigma]


def plan_order(batch: Batch, objective: Objective, plan: Plan) -> Order:
    """Sort a batch's rows into those with a gradient and those without, and group them."""
    graded = batch.mask & ((batch.advantages != 0) | objective.has_penalty)
    if objective.level != "token":  # a sequence with one graded row goes whole
        graded = batch.mask & (segment_sum(graded, *first_and_last(batch.sequence)) > 0)
    rows = torch.argsort(2 * (~batch.mask).long() + (~graded).long(), stable=True)
    num_graded, num_live = torch.stack([graded.sum(), batch.mask.sum()]).tolist()
    rows, num_plain = rows[:num_live], num_live - num_graded
    if objective.level == "token":
        return Order(rows, [[size] for size in even_sizes(num_graded, plan.first_rows, plan.chunk_rows)], num_plain)
    lengths = torch.unique_consecutive(batch.sequence[rows[:num_graded]], return_counts=True)[1].tolist()
    return Order(rows, _whole_sequences(lengths, plan.first_rows, plan.chunk_rows), num_plain)


def _whole_sequences(lengths: list[int], first: int, rest: int) -> list[list[int]]:
    """As many sequences to a chunk as fit it; one that fits none in chunks of its own."""
    groups: list[list[int]] = []
    for length in lengths:
        room = first if len(groups) <= 1 else rest
        if groups and groups[-1][-1] + length <= room and len(groups[-1]) == 1:
            groups[-1][0] += length
        elif length <= (rest if groups else first):
            groups.append([length])
        else:
            whole, left = divmod(length, rest)
            groups.append([rest] * whole + [left] * (left > 0))
    return groups
