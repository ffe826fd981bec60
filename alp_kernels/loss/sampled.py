"""The sampled backward: softmax in a row's gradient is replaced by a few of its entries, whose expectation it is.

    dz_v = dlogp (is_target_v - p_v) - dentropy p_v (ln p_v + H)      p_v -> p^_v = max(p_v, tau) hits_v,   E[p^_v] = p_v

The entries do not depend on dlogp and dentropy, so forward chooses them while it has the logits, and keeps them, 8 bytes each.
Backward is two sparse products, whatever loss comes after. Derivation: docs/math.md, section 5
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import real
from ..reference import LogitTransform, SparseRows
from .plan import Gradients, Needs, Operands, even_sizes
from .sparse import Kept, sparse_gradients
from .widened import whole


def sampled_rows(operands: Operands, order: Tensor) -> Kept:
    """Compute rows `order` of the head and choose their entries, chunk by chunk: one product, no logits left.

    `values` are the entries' probabilities; a row's first entry is its target.
    """
    plan, products = operands.plan, whole(operands, Needs(), 0)
    assert plan.points is not None
    outs, chosen = [], []
    for part in order.split(even_sizes(len(order), plan.chunk_rows, plan.chunk_rows)):
        x, targets, transform = products.logits(part), plan.targets[part], plan.transform.rows(part)
        points = plan.points.rows(part)
        if plan.shard is None:
            out, entries = plan.engine.head_select(x, targets, transform, points)
        else:
            out = products.head_fwd(x, targets, transform)
            is_mine, columns = plan.shard.columns(targets)
            entries = plan.engine.select(x, torch.where(is_mine, columns, -1), transform, out, points)
        outs.append(out)
        chosen.append(entries)
    if not outs:
        empty = operands.hidden.new_empty(0, dtype=real(operands.hidden))
        counts, tokens = order.new_empty(0), order.new_empty(0, dtype=torch.int32)
        return Kept(order, empty, empty, empty.double(), counts, tokens, empty)
    logp, entropy, lse = (torch.cat(parts) for parts in zip(*outs, strict=True))
    return Kept(order, logp, entropy, lse, *(torch.cat(parts) for parts in zip(*chosen, strict=True)))


def sampled_gradients(
    operands: Operands, kept: Kept, dlogp: Tensor, dentropy: Tensor | None, needs: Needs
) -> Gradients:
    """The gradients of hidden, weight and bias; dlogp, dentropy: (n,), of the kept rows."""
    plan, order, counts = operands.plan, kept.order, kept.counts
    assert plan.points is not None
    values = _logit_gradient(kept, plan.transform.rows(order), plan.points.threshold, dlogp, dentropy)
    if plan.shard is not None:  # the target's entry belongs to the rank that holds the target
        first = _first(counts)
        values[first] = torch.where(plan.shard.columns(plan.targets[order])[0], values[first], 0.0)
    return sparse_gradients(operands, order, SparseRows(counts, kept.tokens, values), needs)


def _first(counts: Tensor) -> Tensor:
    """Where each row's first entry is, (n,)."""
    return counts.cumsum(0) - counts


def _logit_gradient(
    kept: Kept,
    transform: LogitTransform,
    threshold: float,
    dlogp: Tensor,
    dentropy: Tensor | None,
) -> Tensor:
    """The gradient of the logits at the entries, (m,) float32 (float64 for float64); as reference.head_bwd with p^ for p."""
    counts, p = kept.counts, kept.values
    first = _first(counts)

    def spread(value: Tensor) -> Tensor:
        return value.to(p.dtype).repeat_interleave(counts, output_size=len(p))

    log_p = p.log()
    log_p[first] = kept.logp.to(p.dtype)
    weight = p.clamp(min=threshold)
    values = -spread(dlogp) * weight
    values[first] = dlogp * -torch.expm1(kept.logp)
    if dentropy is not None:
        weight[first] = p[first]
        by_entropy = spread(dentropy) * weight * (log_p + spread(kept.entropy))
        values -= torch.where(weight > 0, by_entropy, 0.0)
    by: float | Tensor = transform.logit_scale
    if transform.temperature is not None:
        by = by / transform.temperature
    values *= spread(by) if isinstance(by, Tensor) else by
    if transform.softcap is not None:
        z = log_p + spread(kept.lse)
        if transform.temperature is not None:
            z = z * spread(transform.temperature)
        slope = 1 - (z / transform.softcap).square()
        values *= slope.clamp(min=0.0)
    return values
