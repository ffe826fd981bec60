"""The fused head's autograd functions: a chunk's logits are made, used and replaced by their gradient in place.

x = h W' + bias for a chunk of rows;   dh = dx W;   dW += dx' h.   One N x V x D product each: three in all, because a row's
dx needs only its own logits and coefficients known in the chunk. Token level: any rows make a chunk. Sequence, turn and
cumulative levels: a chunk holds whole sequences; one that does not fit is passed twice (a fourth product).
Rows outside the mask cost no product; rows with a zero advantage no backward product, nor clipped ones on the CPU.
Derivation: docs/math.md, section 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Batch, first_and_last, segment_sum
from .loss import level_log_ratio
from .objective import Objective, row_loss
from .reference import Head, HeadRows

_WORTH_DROPPING = 0.95
"""Rows without a gradient are dropped from a chunk where fewer than this fraction have one: dropping copies the others."""


@dataclass(frozen=True)
class Plan:
    """One call's constants; none of them is differentiated."""

    engine: ModuleType
    head: Head  # temperature and row ids for all N rows
    targets: Tensor  # (N,)
    chunk_rows: int
    with_grad: bool

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden[index], weight, bias)

    def parts(self, index: Tensor) -> Sequence[Tensor]:
        """Rows `index` in chunks; none where there are no rows."""
        return index.split(self.chunk_rows) if len(index) else ()


class _Grads:
    """Gradients of hidden, weight, bias and the logit noise, summed over chunks in float32 and rounded once."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sigma: Tensor | None,
        needs: Sequence[bool],
        num_chunks: int,
    ) -> None:
        self.hidden, self.weight = hidden, weight
        # a single chunk's product is rounded once whatever the dtype of its sum
        total = torch.float32 if num_chunks > 1 and weight.dtype != torch.float64 else weight.dtype
        self.dhidden = torch.zeros_like(hidden) if needs[0] else None
        self.dweight = torch.zeros_like(weight, dtype=total) if needs[1] else None
        self.dbias = torch.zeros_like(bias, dtype=total) if bias is not None and needs[2] else None
        self.dsigma = torch.zeros_like(sigma) if sigma is not None and needs[3] else None

    def add(self, index: Tensor, dx: Tensor, dsigma: Tensor | None) -> None:
        """Take up the logits' gradient dx (n, V) of rows `index` (n,)."""
        if self.dhidden is not None:
            self.dhidden[index] = dx @ self.weight
        if self.dweight is not None:
            _addmm(self.dweight, dx.t(), self.hidden[index])
        if self.dbias is not None:
            self.dbias += dx.sum(dim=0, dtype=self.dbias.dtype)
        if self.dsigma is not None and dsigma is not None:
            self.dsigma += dsigma

    def rounded(self) -> list[Tensor | None]:
        dweight = None if self.dweight is None else self.dweight.to(self.weight.dtype)
        dbias = None if self.dbias is None else self.dbias.to(self.weight.dtype)
        return [self.dhidden, dweight, dbias, self.dsigma]


def _addmm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b without rounding the product to a 16-bit dtype before a float32 sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no mixed product there: widen, a block of rows at a time
        for start in range(0, len(a), 16384):
            rows = slice(start, start + 16384)
            total[rows].addmm_(a[rows].float(), b.float())


def _backward_rows(
    plan: Plan, x: Tensor, index: Tensor, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None, grads: _Grads
) -> None:
    """From logits x of rows `index` and their coefficients to the gradients; on the CPU rows without one are dropped."""
    if x.device.type == "cpu":  # on a device the count would cost a sync
        has_gradient = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        keep = has_gradient.nonzero().squeeze(1)
        if len(keep) < _WORTH_DROPPING * len(x):
            x, index, dlogp = x.index_select(0, keep), index[keep], dlogp[keep]
            out, dentropy = HeadRows(*(v[keep] for v in out)), None if dentropy is None else dentropy[keep]
    if len(index) == 0:
        return
    dsigma = plan.engine.head_bwd(x, plan.targets[index], plan.head.rows(index), out, dlogp, dentropy)
    grads.add(index, x, dsigma)


class Order(NamedTuple):
    """Which rows are computed, and together with which."""

    rows: Tensor  # (n,) the masked-in rows, those that may have a gradient first
    groups: list[int]  # sizes: chunks at token level, else whole sequences, as many as fit a chunk
    num_plain: int  # rows at the end that need only their log-probability


def _loss_and_grads(
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

    The gradients are those of loss / gradient_scale(batch).
    """
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp, entropy = (torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(2))
    num_chunks = sum(-(-group // plan.chunk_rows) for group in order.groups)
    grads = _Grads(hidden, weight, bias, plan.head.sigma, needs, num_chunks)

    def forward_rows(index: Tensor) -> tuple[Tensor, HeadRows]:
        x = plan.logits(hidden, weight, bias, index)
        out = plan.engine.head_fwd(x, plan.targets[index], plan.head.rows(index))
        logp[index], entropy[index] = out.logp, out.entropy
        return x, out

    scale = gradient_scale(batch)
    scaled = replace(batch, weight=batch.weight / scale)
    num_graded = len(order.rows) - order.num_plain if any(needs) else 0
    for index in plan.parts(order.rows[num_graded:]):
        forward_rows(index)
    for group in order.rows[:num_graded].split(order.groups) if num_graded else ():
        rows = scaled.select(group)
        if objective.level == "token" and plan.engine.FUSES_TOKEN_LOSS:
            x, head = plan.logits(hidden, weight, bias, group), plan.head.rows(group)
            out, dsigma = plan.engine.head_token_loss(x, plan.targets[group], head, rows.loss_rows(), objective)
            logp[group], entropy[group] = out.logp, out.entropy
            grads.add(group, x, dsigma)
            del x  # before the next chunk's logits
            continue
        *before, last = plan.parts(group)  # one part, but for a sequence longer than a chunk
        outs = [forward_rows(index)[1] for index in before]
        x, out = forward_rows(last)
        dlogp, dentropy = coefficients(logp[group], entropy[group], rows, objective)
        dlogps = dlogp.split(plan.chunk_rows)
        dentropies = [None] * len(dlogps) if dentropy is None else dentropy.split(plan.chunk_rows)
        _backward_rows(plan, x, last, out, dlogps[-1], dentropies[-1], grads)
        del x  # before the next chunk's logits
        for index, out, dp, dh in zip(before, outs, dlogps, dentropies, strict=False):
            _backward_rows(plan, plan.logits(hidden, weight, bias, index), index, out, dp, dh, grads)
    index = order.rows.sort().values  # sequences in order again
    live, p, h = batch.select(index), logp[index], entropy[index]
    ell = level_log_ratio(p, live, objective)
    loss = (live.weight * row_loss(ell, p, h, live.loss_rows(), objective)).sum()
    return loss, logp, entropy, grads.rounded()


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
            out = _loss_and_grads(hidden, weight, bias, plan, batch, objective, order, needs)
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
        by = dloss * gradient_scale(ctx.again[1])
        if grads is None:
            with torch.autocast(hidden.device.type, enabled=False):
                *_, grads = _loss_and_grads(hidden, weight, bias, *ctx.again)
        dhidden, dweight, dbias, dsigma = (None if g is None else g.mul_(by) for g in grads)
        sigma = ctx.again[0].head.sigma
        dlog_sigma = None if dsigma is None else (dsigma * sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, *[None] * 4


def gradient_scale(batch: Batch) -> Tensor:
    """() the largest aggregation weight, up to the next power of two: without it float16 gradients would underflow.

    A loss scaled by its caller (GradScaler) comes too late for gradients that are formed with the loss.
    """
    _, exponent = torch.frexp(batch.weight.amax())
    return torch.ldexp(torch.ones_like(batch.weight[0]), exponent)


def coefficients(logp: Tensor, entropy: Tensor, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor | None]:
    """Gradient of the weighted loss with respect to logp and (where it has a coefficient) entropy, each (n,)."""
    with torch.enable_grad():
        p = logp.detach().requires_grad_()
        h = entropy.detach().requires_grad_() if objective.entropy_coef != 0 else None
        ell = level_log_ratio(p, batch, objective)
        loss = (batch.weight * row_loss(ell, p, h, batch.loss_rows(), objective)).sum()
        dlogp, *dentropy = torch.autograd.grad(loss, (p,) if h is None else (p, h))
    dlogp = torch.where(logp.isnan(), logp, dlogp)  # a NaN loss has a NaN gradient, which comparisons would hide
    return dlogp, dentropy[0] if dentropy else None


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
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy, lse = (torch.zeros(len(hidden), dtype=real, device=hidden.device) for _ in range(3))
        with torch.autocast(hidden.device.type, enabled=False):
            for index in plan.parts(order):
                x = plan.logits(hidden, weight, bias, index)
                out = plan.engine.head_fwd(x, plan.targets[index], plan.head.rows(index))
                logp[index], entropy[index], lse[index] = out
                del x
        ctx.save_for_backward(hidden, weight, bias, order, logp, entropy, lse)
        ctx.plan, ctx.log_sigma_shape = plan, None if log_sigma is None else log_sigma.shape
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogp: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, order, *rows = ctx.saved_tensors
        plan: Plan = ctx.plan
        num_chunks = -(-len(order) // plan.chunk_rows)
        grads = _Grads(hidden, weight, bias, plan.head.sigma, list(ctx.needs_input_grad), num_chunks)
        with torch.autocast(hidden.device.type, enabled=False):
            for index in plan.parts(order):
                x = plan.logits(hidden, weight, bias, index)
                out = HeadRows(*(v[index] for v in rows))
                _backward_rows(plan, x, index, out, dlogp[index], dentropy[index], grads)
                del x
        dhidden, dweight, dbias, dsigma = grads.rounded()
        sigma = plan.head.sigma
        dlog_sigma = None if dsigma is None or sigma is None else (dsigma * sigma).reshape(ctx.log_sigma_shape)
        return dhidden, dweight, dbias, dlog_sigma, None, None


def plan_order(batch: Batch, objective: Objective, chunk_rows: int) -> Order:
    """Sort a batch's rows into those with a gradient and those without, and group them."""
    graded = batch.mask & ((batch.advantages != 0) | objective.has_penalty)
    if objective.level != "token":  # a sequence with one graded row goes whole
        graded = batch.mask & (segment_sum(graded, *first_and_last(batch.sequence)) > 0)
    rows = torch.argsort(2 * (~batch.mask).long() + (~graded).long(), stable=True)
    num_graded, num_live = torch.stack([graded.sum(), batch.mask.sum()]).tolist()
    rows, num_plain = rows[:num_live], num_live - num_graded
    if objective.level == "token":
        full, rest = divmod(num_graded, chunk_rows)
        return Order(rows, [chunk_rows] * full + [rest] * (rest > 0), num_plain)
    groups: list[int] = []
    for length in torch.unique_consecutive(batch.sequence[rows[:num_graded]], return_counts=True)[1].tolist():
        if groups and groups[-1] + length <= chunk_rows:
            groups[-1] += length
        else:
            groups.append(length)
    return Order(rows, groups, num_plain)
