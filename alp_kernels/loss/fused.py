"""The fused head's autograd functions: a chunk's logits are computed, used and replaced in place by their gradient.

A row's gradient needs only its own logits and coefficients known within its chunk, so three N x V x D products are enough: the
logits, dh and dW. At token level, any rows form a chunk. At sequence, turn and cumulative levels, a chunk holds whole
sequences; the logits of a sequence that does not fit are computed twice (a fourth product).
Rows outside the mask cost no product. Rows with a zero advantage cost no backward product; on the CPU, nor do clipped rows.
Derivation: docs/math.md, section 4
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import real
from ..objective import row_gradient, weighted_loss
from ..reference import HeadRows
from .batch import Batch, Unread, flatten, place_of
from .inputs import LossInputs
from .levels import level_log_ratio
from .plan import Gradients, Needs, Operands, Plan, even_sizes
from .precision import float32_products
from .products import Whole
from .sampled import sampled_gradients, sampled_rows
from .segments import highest_first
from .sparse import Kept
from .stats import Stats
from .supported import support_gradients, support_rows
from .tiled import Tiled
from .transfer import Asked, Transfer
from .widened import whole


class Order(NamedTuple):
    """Which rows are computed, and how they are grouped."""

    rows: Tensor  # (n,) the rows in the mask; those that may have a gradient come first
    groups: list[list[int]]  # per group of rows with a joint loss, its chunk sizes; several for a long sequence
    num_plain: int  # rows at the end that need only their log-probability


@dataclass(frozen=True)
class Fused:
    """What the fused head returns, without an autograd graph."""

    loss: Tensor  # ()
    logp: Tensor  # (N,), 0 off the mask
    entropy: Tensor  # (N,)
    gradients: Gradients  # not yet rounded to the tensors' dtypes
    index: Tensor  # (n,) the rows in the loss, in order
    stats: Stats


class Given(NamedTuple):
    """The fused head's inputs; a second backward recomputes the gradients from them."""

    operands: Operands
    batch: Batch
    order: Order
    needs: Needs


def prepare(
    where: str, operands: Operands, inputs: LossInputs, shape: torch.Size, transfer: Transfer, needs: Needs
) -> Given:
    """Check a batch against checked operands, then check all values in one transfer. shape: of the targets."""
    hidden = operands.hidden
    unread = flatten(where, inputs, transfer, shape=shape, dtype=real(hidden), device=hidden.device)
    ranked = rank_rows(unread, transfer)
    transfer.bring()
    return Given(operands, unread.batch(), ranked.order(operands.plan), needs)


def fused_head(given: Given) -> Fused:
    """Compute the loss and its gradients, chunk by chunk."""
    with torch.no_grad(), _arithmetic(given.operands):
        return (_sparse_head if _is_sparse(given.operands.plan) else _exact_head)(*given)


def _is_sparse(plan: Plan) -> bool:
    return plan.points is not None or plan.support is not None


def _products(operands: Operands, needs: Needs, num_parts: int) -> Whole | Tiled:
    """Choose Tiled or Whole for one pass over the rows; num_parts: how often `backward` will be called."""
    way = Tiled if operands.plan.is_tiled(operands.weight.dtype, num_parts) else whole
    return way(operands, needs, num_parts)


@contextlib.contextmanager
def _arithmetic(operands: Operands) -> Iterator[None]:
    """Products as the plan says, without autocast."""
    with torch.autocast(operands.hidden.device.type, enabled=False), float32_products(operands.plan.precision):
        yield


def _exact_head(operands: Operands, batch: Batch, order: Order, needs: Needs) -> Fused:
    hidden, plan, objective = operands.hidden, operands.plan, batch.objective
    logp, entropy = (torch.zeros(len(hidden), dtype=real(hidden), device=hidden.device) for _ in range(2))
    products = _products(operands, needs, sum(map(len, order.groups)))

    def noted(index: Tensor, out: HeadRows) -> HeadRows:
        logp[index], entropy[index] = out.logp, out.entropy
        return out

    num_graded = len(order.rows) - order.num_plain if any(needs) else 0
    for index in products.parts(order.rows[num_graded:]):
        noted(index, products.logprob(index))
    groups = order.rows[:num_graded].split([sum(sizes) for sizes in order.groups]) if num_graded else ()
    for group, sizes in zip(groups, order.groups, strict=False):
        rows = batch.numbers.select(group).loss_rows()
        if isinstance(products, Whole) and objective.level == "token" and plan.fuses_token_loss(products.logits_dtype):
            noted(group, products.token_loss(group, rows, objective))
            continue
        *before, last = group.split(sizes)  # one part, unless a sequence is longer than a chunk
        outs = [noted(index, products.logprob(index)) for index in before]
        out, kept = products.keep(last, objective.entropy_coef != 0)
        noted(last, out)
        p = logp[group]
        ell = p - rows.denominator if objective.level == "token" else level_log_ratio(p, batch.select(group), objective)
        dlogp, dentropy = row_gradient(ell, p, rows, objective)
        dlogps = dlogp.split(sizes)
        dentropies = [None] * len(sizes) if dentropy is None else dentropy.split(sizes)
        products.backward(last, kept, out, dlogps[-1], dentropies[-1])
        del kept  # free it before the next chunk
        for index, out, dp, dh in zip(before, outs, dlogps, dentropies, strict=False):
            products.backward(index, None, out, dp, dh)
    index = order.rows.sort().values  # sequences in order again
    live, p, h = batch.select(index), logp[index], entropy[index]
    ell = level_log_ratio(p, live, objective)
    loss = weighted_loss(ell, p, h, live.numbers.loss_rows(), objective).sum()
    return Fused(loss, logp, entropy, products.gradients(), index, Stats.measure(p, h, ell, live, batch))


def _sparse_head(operands: Operands, batch: Batch, order: Order, needs: Needs) -> Fused:
    """As _exact_head. What backward keeps does not depend on the loss: at every level, one pass over the rows comes first."""
    hidden, plan, objective = operands.hidden, operands.plan, batch.objective
    every, entropies = (torch.zeros(len(hidden), dtype=real(hidden), device=hidden.device) for _ in range(2))
    if plan.support is None:
        graded, plain = order.rows.tensor_split([len(order.rows) - order.num_plain])
        products = _products(operands, Needs(), 0)
        for part in products.parts(plain):
            out = products.logprob(part)
            every[part], entropies[part] = out.logp, out.entropy
        del products
        kept = sampled_rows(operands, graded)
    else:
        kept = support_rows(operands)
    every[kept.order], entropies[kept.order] = kept.logp, kept.entropy
    index = order.rows.sort().values
    live, p, h = batch.select(index), every[index], entropies[index]
    logp, entropy = (torch.zeros_like(every).index_copy_(0, index, values) for values in (p, h))
    rows, ell = live.numbers.loss_rows(), level_log_ratio(p, live, objective)
    loss = weighted_loss(ell, p, h, rows, objective).sum()
    dlogp, dentropy = (
        None if g is None else torch.zeros_like(logp).index_copy_(0, index, g)[kept.order]
        for g in row_gradient(ell, p, rows, objective)
    )
    assert dlogp is not None
    gradients = _sparse_gradients(operands, kept, dlogp, dentropy, needs)
    return Fused(loss, logp, entropy, gradients, index, Stats.measure(p, h, ell, live, batch))


def _sparse_gradients(
    operands: Operands, kept: Kept, dlogp: Tensor, dentropy: Tensor | None, needs: Needs
) -> Gradients:
    way = sampled_gradients if operands.plan.support is None else support_gradients
    return way(operands, kept, dlogp, dentropy, needs)


class FusedLoss(torch.autograd.Function):
    """Attach the loss and its precomputed gradients to the autograd graph; returns the loss ().

    The first backward scales the gradients in place and returns them, which avoids a second copy of a V x D gradient. A second
    backward recomputes them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_sigma: Tensor | None,
        given: Given,
        fused: Fused,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        # keep these tensors nowhere else, so that autograd detects in-place changes to them
        ctx.plan, ctx.rest, ctx.gradients = given.operands.plan, given[1:], fused.gradients
        ctx.log_sigma_shape = None if log_sigma is None else log_sigma.shape
        return fused.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        given = Given(Operands(hidden, weight, bias, ctx.plan), *ctx.rest)
        grads, ctx.gradients = ctx.gradients, None
        if grads is None:
            grads = fused_head(given).gradients
        plan = ctx.plan
        dhidden, dweight, dbias, dsigma = (
            None if g is None or like is None else _rounded(g, like.dtype, dloss, plan)
            for g, like in zip(grads, (hidden, weight, bias, dloss), strict=True)
        )
        sigma = plan.transform.sigma
        dlog_sigma = None if dsigma is None or sigma is None else (dsigma * sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, None, None


def _rounded(gradient: Tensor, dtype: torch.dtype, by: Tensor, plan: Plan) -> Tensor:
    """Return gradient * by in `dtype`, in one pass; in place if gradient has that dtype."""
    if gradient.dtype == dtype:
        return plan.engine.scale_(gradient, by)
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


class LinearLogprob(torch.autograd.Function):
    """Returns (logp (N,), entropy (N,)). Saves its inputs and a few numbers per row; backward recomputes the
    logits (four products in all)."""

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
        logp, entropy, lse = logprob_rows(Operands(hidden, weight, bias, plan), order)
        ctx.save_for_backward(hidden, weight, bias, order, logp, entropy, lse)
        ctx.plan, ctx.log_sigma_shape = plan, None if log_sigma is None else log_sigma.shape
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, order, *rows = ctx.saved_tensors
        operands, needs = Operands(hidden, weight, bias, ctx.plan), Needs(*ctx.needs_input_grad[:4])
        grads = logprob_gradients(operands, order, HeadRows(*rows), dlogp, dentropy, needs)
        dlog_sigma = None if grads.sigma is None else grads.sigma.reshape(ctx.log_sigma_shape)
        return grads.hidden, grads.weight, grads.bias, dlog_sigma, None, None


class SparseLogprob(torch.autograd.Function):
    """As LinearLogprob, with a sparse backward: it keeps some values of each row and needs no logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        logp, entropy = (torch.zeros(len(hidden), dtype=real(hidden), device=hidden.device) for _ in range(2))
        operands = Operands(hidden, weight, bias, plan)
        with _arithmetic(operands):
            kept = sampled_rows(operands, order) if plan.support is None else support_rows(operands)
        logp[kept.order], entropy[kept.order] = kept.logp, kept.entropy
        ctx.save_for_backward(hidden, weight, bias, *kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # most losses have no entropy gradient
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        if dlogp is None:
            assert dentropy is not None
            dlogp = torch.zeros_like(dentropy)
        kept = Kept(*saved)
        operands, needs = Operands(hidden, weight, bias, ctx.plan), Needs(*ctx.needs_input_grad[:3])
        with _arithmetic(operands):
            by_entropy = None if dentropy is None else dentropy[kept.order]
            grads = _sparse_gradients(operands, kept, dlogp[kept.order], by_entropy, needs)
        return *_in_dtypes(grads, operands)[:3], None, None


def _in_dtypes(grads: Gradients, operands: Operands) -> Gradients:
    """Round the gradients to their tensors' dtypes."""
    like = zip(grads[:3], operands[:3], strict=True)
    return Gradients(*(None if g is None or x is None else g.to(x.dtype) for g, x in like))


def row_order(where: str, hidden: Tensor, mask: Tensor | None, transfer: Transfer) -> Tensor:
    """Return the rows of hidden (N, D) to compute, (n,) int64; checks the mask's values and runs the transfer."""
    if mask is None:
        transfer.bring()
        return torch.arange(len(hidden), device=hidden.device)
    live = mask.reshape(-1) != 0
    wrong = mask.reshape(-1) != live
    asked = transfer.ask(torch.stack([live, wrong]).sum(1))

    def check() -> None:
        if asked.numbers[1]:
            number, first = place_of(wrong, mask.shape)
            raise ValueError(f"{where}: mask holds {number} values other than 0 and 1, first at {first}")

    transfer.check(check)
    transfer.bring()
    return highest_first(live)[: int(asked.numbers[0])]


def logprob_rows(operands: Operands, order: Tensor) -> HeadRows:
    """Log-probability, entropy and log-sum-exp, each (N,), of the rows `order`; 0 at the others."""
    hidden = operands.hidden
    dtypes = (real(hidden), real(hidden), torch.float64)
    out = HeadRows(*(torch.zeros(len(hidden), dtype=dtype, device=hidden.device) for dtype in dtypes))
    with _arithmetic(operands):
        if operands.plan.support is not None:
            kept = support_rows(operands)
            for column, part in zip(out, kept.head_rows, strict=True):
                column[kept.order] = part.to(column.dtype)
            return out
        products = _products(operands, Needs(), 0)
        for index in products.parts(order):
            for column, part in zip(out, products.logprob(index), strict=True):
                column[index] = part.to(column.dtype)
    return out


def logprob_gradients(
    operands: Operands, order: Tensor, rows: HeadRows, dlogp: Tensor, dentropy: Tensor, needs: Needs
) -> Gradients:
    """Compute the gradients of hidden, weight, bias and log_sigma () from dlogp and dentropy; recomputes the logits."""
    hidden, weight, bias, plan = operands
    if plan.support is not None:
        with _arithmetic(operands):
            kept = support_rows(operands)
            by_row = dlogp[kept.order], dentropy[kept.order]
            return _in_dtypes(support_gradients(operands, kept, *by_row, needs), operands)
    products = _products(operands, needs, -(-len(order) // plan.chunk_rows))
    with _arithmetic(operands):
        for index in products.parts(order):
            out = HeadRows(*(v[index] for v in rows))
            products.backward(index, None, out, dlogp[index], dentropy[index])
    sigma = plan.transform.sigma
    grads = zip(products.gradients(), (hidden, weight, bias, sigma), strict=True)
    dhidden, dweight, dbias, dsigma = (None if g is None or like is None else g.to(like.dtype) for g, like in grads)
    return Gradients(dhidden, dweight, dbias, None if dsigma is None or sigma is None else dsigma * sigma)


class Ranked(NamedTuple):
    """The rows in processing order, before the host knows how many there are of each kind."""

    rows: Tensor  # (N,) first those that may have a gradient, then others in the loss, then those off the mask
    counts: Asked  # as Unread.counts
    lengths: Asked | None  # rows in the loss per sequence, 0 if none has a gradient; None at token level

    def order(self, plan: Plan) -> Order:
        num_live, _, num_graded = map(int, self.counts.numbers)
        if self.lengths is None:
            groups = [[size] for size in even_sizes(num_graded, plan.first_rows, plan.chunk_rows)]
        else:
            lengths = [int(length) for length in self.lengths.numbers if length]
            num_graded = sum(lengths)
            groups = _whole_sequences(lengths, plan.first_rows, plan.chunk_rows)
        return Order(self.rows[:num_live], groups, num_live - num_graded)


def rank_rows(unread: Unread, transfer: Transfer) -> Ranked:
    """Sort a batch's rows into those with a gradient and those without, and request their counts."""
    graded, lengths = unread.graded, None
    if unread.objective.level != "token":  # one graded row makes its whole sequence graded
        sequence = unread.sequence()
        starts = torch.searchsorted(sequence, torch.arange(unread.count() + 1, device=sequence.device))
        sums = torch.zeros(2, len(graded) + 1, dtype=torch.int64, device=graded.device)
        torch.cumsum(torch.stack([graded, unread.mask]), dim=1, out=sums[:, 1:])
        num_graded, num_live = sums[:, starts].diff(dim=1)
        lengths = transfer.ask(num_live * (num_graded > 0))
        graded = unread.mask & (num_graded > 0)[sequence]
    rank = graded.view(torch.uint8) + unread.mask.view(torch.uint8)
    return Ranked(highest_first(rank), unread.counts, lengths)


def _whole_sequences(lengths: list[int], first: int, rest: int) -> list[list[int]]:
    """Put as many sequences as fit into each chunk; split a sequence longer than a chunk over chunks of its own."""
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
