"""A head whose vocabulary is split over tensor-parallel ranks; each rank has all hidden states and some rows of the weight.

Rank r computes its logits x_r = h W_r' (n, V_r) one chunk at a time. One all-gather per chunk sends three numbers and a flag
per row: the shard's log-sum-exp l_r, its entropy H_r, the target's log-probability p_o within the shard, and whether the shard
holds the target (rank o does).

    w_r  = exp(l_r - lse)          lse = ln sum_r exp(l_r)          H = sum_r w_r (H_r - ln w_r)
    logp = -log1p(expm1(-p_o) + sum_{r != o} exp(l_r - l_o - p_o))

The last line keeps the relative precision of a near-certain token: only the *other* tokens are summed. With lse, logp and H of
the whole row, each rank computes the unsplit head's gradient at its own columns. dW_r stays on its rank; backward sums
dh = sum_r dx_r W_r over the ranks. Derivations: docs/math.md, section 4
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import real
from ..protocol import Engine
from ..reference import HeadRows, LogitTransform
from .head import VocabSplit, hint_at_mask

_NUM_SAMPLES, _NUM_WEIGHTS, _NUM_SHARED = 256, 16, 16


class Shard(NamedTuple):
    """This rank's part of the vocabulary, and the head functions on its columns; targets are in the whole vocabulary."""

    group: dist.ProcessGroup | None
    start: int  # this rank's first token
    size: int  # its tokens
    vocab: int  # all ranks' tokens

    def columns(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return which targets are in this rank's shard, and their columns (0 for the others)."""
        column = targets - self.start
        is_mine = (column >= 0) & (column < self.size)
        return is_mine, torch.where(is_mine, column, 0)

    def head_fwd(self, engine: Engine, x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows:
        """As reference.head_fwd, for whole rows; a collective call."""
        is_mine, column = self.columns(targets)
        out = engine.head_fwd(x, column, transform)
        rows = torch.stack([out.lse, out.entropy, torch.where(is_mine, out.logp, 0.0), is_mine]).double()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, rows, group=self.group)
        logp, entropy, lse = _joined(*torch.stack(parts).unbind(1))
        return HeadRows(logp.to(out.logp.dtype), entropy.to(out.logp.dtype), lse)

    def head_bwd(
        self,
        engine: Engine,
        x: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        rows: HeadRows,
        dlogp: Tensor,
        dentropy: Tensor | None,
    ) -> None:
        """As reference.head_bwd, for this rank's columns."""
        is_mine, column = self.columns(targets)
        # if a row's target is on another rank, the engine takes column 0 for it: compute that column again, with
        # column 1 of a copy as the target
        first = x[:, :1].repeat(1, 2)
        engine.head_bwd(x, column, transform, rows, dlogp, dentropy)
        engine.head_bwd(first, torch.ones_like(column), transform, rows, dlogp, dentropy)
        x[:, 0] = torch.where(is_mine, x[:, 0], first[:, 0])


def _joined(lse: Tensor, entropy: Tensor, logp: Tensor, is_mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the shards' values (R, n) into logp, entropy and log-sum-exp (n,) of whole rows; float64."""
    top, largest = lse.max(dim=0)
    below = lse - top
    share = torch.where(below > -torch.inf, below.exp(), 0.0)
    # the largest share is 1 and stays out of the sum, as in reference.head_fwd
    others = share.scatter(0, largest[None], 0.0).sum(dim=0)
    log_total = torch.log1p(others)
    spread = torch.where(share > 0, share * (entropy - below), 0.0).sum(dim=0)
    owner = is_mine.argmax(dim=0, keepdim=True)
    own_lse, own_logp = lse.gather(0, owner).squeeze(0), logp.gather(0, owner).squeeze(0)
    elsewhere = (lse - own_lse - own_logp).exp().scatter(0, owner, 0.0).sum(dim=0)
    against = torch.expm1(-own_logp) + elsewhere  # the sum of the other tokens' terms, divided by the target's
    far = own_logp + (own_lse - top) - log_total
    joined = torch.where(against.isfinite(), -torch.log1p(against), far)
    return joined, log_total + spread / (1 + others), top + log_total


class _SumGradient(torch.autograd.Function):
    """Identity; backward sums over the group, since each rank's shard contributes a part of dh."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, None]:
        total = dhidden.to(real(dhidden), copy=True)  # 16-bit parts are summed in float32
        dist.all_reduce(total, group=ctx.group)
        return total.to(dhidden.dtype), None


def sum_gradient(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return `hidden`; backward sums its gradient over the group."""
    summed: Tensor = _SumGradient.apply(hidden, group)
    return summed


def agree(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    split: VocabSplit,
    chunk_rows: int,
    transform: LogitTransform,
    shared: dict[str, Tensor],
) -> tuple[Shard, int]:
    """Check in one all-gather, before any kernel, that the shards form a vocabulary and all ranks have the same rows (N, D).

    shared: numbers () of the loss's inputs that must be equal on all ranks, by name.

    Returns this rank's shard and the number of rows of a chunk, which all ranks share because a chunk is a collective call.
    """
    flat = targets.reshape(-1).long()
    kept = torch.ones_like(flat) if mask is None else (mask.reshape(-1) != 0).long()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    low, high = (flat * kept).min(), (flat * kept).max()
    named = [len(flat), (flat * kept * (place % 1009)).sum(), (kept * place).sum(), low, high]
    tau = 1.0 if transform.temperature is None else transform.temperature.double().mean()
    options = [transform.logit_scale, transform.softcap or 0.0, tau]
    of_loss = zlib.crc32(",".join(shared).encode())  # ranks that give other arguments would gather other sizes
    slots = [*shared.values(), *([0.0] * (_NUM_SHARED - len(shared)))]
    known = [len(weight), -1 if split.start is None else split.start, chunk_rows, *named, *options, of_loss, *slots]
    places = torch.arange(0, hidden.numel(), max(1, hidden.numel() // _NUM_SAMPLES), device=hidden.device)[
        :_NUM_SAMPLES
    ]
    sample = hidden.detach().reshape(-1)[places].double().nan_to_num()
    sample = torch.where(kept[places // hidden.shape[-1]] > 0, sample, 0.0)  # masked rows may hold anything
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=hidden.device) for v in known])
    weights = weight.detach().reshape(-1)[:: max(1, weight.numel() // _NUM_WEIGHTS)][:_NUM_WEIGHTS].double()
    mine = torch.zeros(len(known) + _NUM_SAMPLES + _NUM_WEIGHTS, dtype=torch.float64, device=hidden.device)
    mine[: len(known)], mine[len(known) : len(known) + len(sample)] = numbers, sample
    mine[-_NUM_WEIGHTS:][: len(weights)] = weights
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(split.group))]
    dist.all_gather(parts, mine, group=split.group)
    table = torch.stack(parts).cpu()
    rank = dist.get_rank(split.group)
    sizes, starts, chunks = ([int(v) for v in column] for column in table[:, :3].T)
    vocab = sum(sizes)
    if all(start == -1 for start in starts):
        starts = [sum(sizes[:r]) for r in range(len(sizes))]
    spans = sorted((start, start + size) for start, size in zip(starts, sizes, strict=True))
    if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])]:
        raise ValueError(f"{where}: the ranks' rows of the weight are {spans}; they must be contiguous and start at 0")
    if not (table[:, 3:6] == table[0, 3:6]).all():
        raise ValueError(
            f"{where}: targets or mask are not the same on the ranks of the group (rows: {table[:, 3].long().tolist()}); "
            "the group must be the tensor-parallel one, whose ranks hold the same batch"
        )
    if not (table[:, 8:11] == table[0, 8:11]).all():
        raise ValueError(f"{where}: logit_scale, softcap or temperature are not the same on the ranks of the group")
    if not (table[:, 11] == table[0, 11]).all():
        raise ValueError(f"{where}: the ranks of the group were given different arguments of the loss")
    for column, name in enumerate(shared, start=12):
        values = table[:, column]
        if not torch.allclose(values, values[:1].expand_as(values), rtol=1e-9, atol=0.0):
            raise ValueError(
                f"{where}: {name} is not the same on the ranks of the group; tensor-parallel ranks compute one loss of one batch"
            )
    smallest, largest = int(table[0, 6]), int(table[0, 7])
    if smallest < 0 or largest >= vocab:
        raise ValueError(
            f"{where}: targets range from {smallest} to {largest}; the ranks' weights form a vocabulary of {vocab}"
            + hint_at_mask(smallest)
        )
    if (
        len(table) > 1
        and bool((table[:, -_NUM_WEIGHTS:] == table[0, -_NUM_WEIGHTS:]).all())
        and bool(table[0, -_NUM_WEIGHTS:].any())
    ):
        raise ValueError(
            f"{where}: all ranks of the group gave the same {sizes[rank]} rows of the weight; each needs its own part of the "
            "vocabulary (weight[start:stop])"
        )
    values = table[:, len(known) : -_NUM_WEIGHTS]
    apart, scale = (values - values[0]).abs().max(), values.abs().max()
    if apart > (2.0**-6 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-4) * scale:
        raise ValueError(
            f"{where}: hidden differs by {apart:.2g} between the ranks of the group (largest value {scale:.2g}); they must "
            "hold the same hidden states: with noise, give perturbed(row_ids=...), or attach(data_rank=...)"
        )
    return Shard(split.group, starts[rank], sizes[rank], vocab), min(chunks)
