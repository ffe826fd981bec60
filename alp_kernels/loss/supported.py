"""The head over a ragged support: logits at the kept tokens alone, N k D in place of N V D for k tokens a row.

    logp = z_t - ln sum_{v in S} e^z_v        dz_v = dlogp (is_target_v - p_v) - dentropy p_v (ln p_v + H),  v in S

The logits are one vector, row after row. The engine's head functions read rows of equal width: rows are grouped by the power
of two that holds their tokens, and -inf fills them up. A row's bits then depend on its own support, not on the batch's.
dh and dW are sparse products, as of a sampled backward (sampled.py), but exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import real
from ..reference import HeadRows, LogitTransform, SparseRows
from .plan import Gradients, Needs, Operands
from .sparse import Kept, sparse_gradients
from .support import spans

_FILLED_BYTES = 16  # of memory for each place of a row that is filled up


def support_rows(operands: Operands) -> Kept:
    """Compute the rows in the mask; `values` are the logits at the kept tokens, after the softcap and before the temperature."""
    hidden, weight, bias, plan = operands
    ragged = plan.support
    assert ragged is not None
    order = ragged.order[int(ragged.sizes.numbers[0]) :]
    counts, total = ragged.counts[order], int(ragged.total.numbers[0])
    tokens = spans(ragged.tokens, ragged.starts[order], counts, total)
    rows, weight = hidden[order].contiguous(), weight.contiguous()
    if plan.shard is None:
        x = plan.engine.sparse_logits(rows, weight, bias, counts, tokens)
    else:  # a rank computes the logits of its own tokens, and 0 for the others'
        mine, own_counts, own = _own(counts, tokens, plan.shard.start, plan.shard.size)
        x = torch.zeros(total, dtype=real(hidden), device=hidden.device)
        x[mine] = plan.engine.sparse_logits(rows, weight, bias, own_counts, own)
        dist.all_reduce(x, group=plan.shard.group)
    y = _capped(x * plan.transform.logit_scale, plan.transform)
    outs = [
        plan.engine.head_fwd(grid, places, transform)
        for _, _, grid, places, transform in _grids(operands, order, counts, y)
    ]
    empty = x.new_empty(0)
    columns = zip(*outs, strict=True) if outs else ((empty,), (empty,), (empty.double(),))
    logp, entropy, lse = (torch.cat(column) for column in columns)
    return Kept(order, logp, entropy, lse, counts, tokens, y)


def support_gradients(
    operands: Operands, kept: Kept, dlogp: Tensor, dentropy: Tensor | None, needs: Needs
) -> Gradients:
    """The gradients of hidden, weight and bias; dlogp, dentropy: (n,), of the kept rows."""
    plan, y = operands.plan, kept.values
    dy = y.new_empty(len(y) + 1)  # what fills rows up is written to the last
    for rows, at, grid, places, transform in _grids(operands, kept.order, kept.counts, y):
        dp, dh = dlogp[rows], None if dentropy is None else dentropy[rows]
        plan.engine.head_bwd(grid, places, transform, HeadRows(*(v[rows] for v in kept.head_rows)), dp, dh)
        idle = dp == 0 if dh is None else (dp == 0) & (dh == 0)
        dy.scatter_(0, at.reshape(-1), grid.masked_fill_(idle[:, None], 0.0).reshape(-1))
    dy = dy[:-1]
    dx = dy * plan.transform.logit_scale
    if plan.transform.softcap is not None:
        dx = dx * (1 - (y / plan.transform.softcap).square()).clamp(min=0.0)
        dx = torch.where(dy == 0, 0.0, dx)  # a row without a gradient has none even if its logits are NaN
    counts, tokens = kept.counts, kept.tokens
    if plan.shard is not None:
        mine, counts, tokens = _own(counts, tokens, plan.shard.start, plan.shard.size)
        dx = dx[mine]
    return sparse_gradients(operands, kept.order, SparseRows(counts, tokens, dx), needs)


def _capped(y: Tensor, transform: LogitTransform) -> Tensor:
    return y if transform.softcap is None else transform.softcap * torch.tanh(y / transform.softcap)


def _grids(
    operands: Operands, order: Tensor, counts: Tensor, y: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, LogitTransform]]:
    """Rows of one width at a time, as many as fit chunk_bytes.

    Yields which of `order`; (n, width) where each logit is in y, and the logits themselves; the targets' places (n,); and the
    transform that is left: the temperatures.
    """
    plan = operands.plan
    ragged = plan.support
    assert ragged is not None
    starts, stop = counts.cumsum(0) - counts, 0
    padded = torch.nn.functional.pad(y, (0, 1), value=-torch.inf)
    for exponent, size in enumerate(map(int, ragged.sizes.numbers)):
        if exponent == 0 or size == 0:  # 0: rows off the mask
            continue
        column = torch.arange(1 << exponent, device=y.device)
        start, stop = stop, stop + size
        step = max(1, plan.chunk_bytes // (_FILLED_BYTES << exponent))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            at = torch.where(column < counts[rows, None], starts[rows, None] + column, len(y))
            index = order[rows]
            temperature = plan.transform.temperature
            left = LogitTransform(temperature=None if temperature is None else temperature[index])
            yield rows, at, padded[at], ragged.places[index], left


def _own(counts: Tensor, tokens: Tensor, start: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are this rank's (m,) bool, how many in each row, and their rows of this rank's weight."""
    mine = (tokens >= start) & (tokens < start + size)
    before = torch.nn.functional.pad(mine.cumsum(0), (1, 0))
    ends = counts.cumsum(0)
    return mine, before[ends] - before[ends - counts], tokens[mine] - start
