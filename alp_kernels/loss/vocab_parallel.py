"""The loss head where tensor-parallel ranks split the vocabulary: each has every hidden state and some rows of the weight.

A rank's logits x_r = h W_r' (n, V_r) exist one chunk at a time. Three numbers a row leave the rank in one all-gather a chunk:
its shard's log-sum-exp l_r and entropy H_r and, where it holds the target, the target's log-probability p_o within the shard.

    w_r  = exp(l_r - lse)          lse = ln sum_r exp(l_r)          H = sum_r w_r (H_r - ln w_r)
    logp = -log1p(expm1(-p_o) + sum_{r != o} exp(l_r - l_o - p_o))

The last line keeps the relative precision of a near-certain token: only the *other* tokens are summed. With lse, logp and H of
the whole row, each rank's gradient is that of the unsplit head at its own columns: dW_r stays, dh = sum_r dx_r W_r is summed
over the ranks in backward. Derivations: docs/math.md, section 4
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..objective import Objective
from ..protocol import HeadEngine
from ..reference import HeadRows, LogitTransform
from .fused import LinearLogprob
from .gather import local_rows
from .head import HeadArguments, check_head, fused_loss, needs_gradient, prepare, row_order
from .policy import LossOutput
from .products import Plan
from .transfer import Transfer

_NUM_SAMPLES, _NUM_WEIGHTS = 256, 16


class _Shard(NamedTuple):
    """Where this rank stands."""

    group: dist.ProcessGroup | None
    start: int  # this rank's first token
    size: int  # its tokens
    vocab: int  # all ranks' tokens


class _SplitEngine:
    """An engine's head for one rank's columns, for `products.Whole`: targets are those of the whole vocabulary."""

    tiles = None
    KEEPS_EXPONENTIALS = False
    FUSES_TOKEN_LOSS = False

    def __init__(self, engine: HeadEngine, shard: _Shard) -> None:
        self.engine, self.shard, self.scale_ = engine, shard, engine.scale_

    def _local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are this rank's, and their columns; 0 for the others."""
        column = targets - self.shard.start
        is_mine = (column >= 0) & (column < self.shard.size)
        return is_mine, torch.where(is_mine, column, 0)

    def head_fwd(self, x: Tensor, targets: Tensor, head: LogitTransform) -> HeadRows:
        """As reference.head_fwd, of the whole rows; a collective call."""
        is_mine, column = self._local(targets)
        out: HeadRows = self.engine.head_fwd(x, column, head)
        rows = torch.stack([out.lse, out.entropy, torch.where(is_mine, out.logp, 0.0), is_mine]).double()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(self.shard.group))]
        dist.all_gather(parts, rows, group=self.shard.group)
        logp, entropy, lse = _joined(*torch.stack(parts).unbind(1))
        return HeadRows(logp.to(out.logp.dtype), entropy.to(out.logp.dtype), lse)

    def head_bwd(
        self, x: Tensor, targets: Tensor, head: LogitTransform, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
    ) -> None:
        """As reference.head_bwd, at this rank's columns."""
        is_mine, column = self._local(targets)
        # a row whose target is elsewhere has none here: its column 0, taken for one, is made again beside one
        first = x[:, :1].repeat(1, 2)
        self.engine.head_bwd(x, column, head, rows, dlogp, dentropy)
        self.engine.head_bwd(first, torch.ones_like(column), head, rows, dlogp, dentropy)
        x[:, 0] = torch.where(is_mine, x[:, 0], first[:, 0])


def _joined(lse: Tensor, entropy: Tensor, logp: Tensor, is_mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and log-sum-exp (n,) of whole rows from those of the shards (R, n); float64."""
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
    against = torch.expm1(-own_logp) + elsewhere  # the other tokens' sum over the target's own term
    far = own_logp + (own_lse - top) - log_total
    joined = torch.where(against.isfinite(), -torch.log1p(against), far)
    return joined, log_total + spread / (1 + others), top + log_total


class _SumGradient(torch.autograd.Function):
    """Identity; in backward the sum over the group: every rank's shard adds its part of dh."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dhidden: Tensor) -> tuple[Tensor, None]:
        real = torch.float64 if dhidden.dtype == torch.float64 else torch.float32
        total = dhidden.to(real, copy=True)  # 16-bit parts are summed in float32
        dist.all_reduce(total, group=ctx.group)
        return total.to(dhidden.dtype), None


def _check_split(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None,
    engine: str | None,
    transfer: Transfer,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Plan], list[bool]]:
    """Check the arguments, here and against the other ranks'.

    Returns what `check_head` does, for this rank's shard, and whether hidden, weight, bias and noise need a gradient.
    """
    if not dist.is_initialized():
        raise RuntimeError(f"{where}: torch.distributed is not initialised; in one process take the unsplit function")
    if hasattr(weight, "full_tensor"):
        if group is not None or vocab_start is not None:
            raise ValueError(
                f"{where}: weight is a DTensor, which says where its rows are; group and vocab_start must be None"
            )
        group, weight = local_rows(where, "weight", weight)
    if bias is not None and hasattr(bias, "full_tensor"):
        _, bias = local_rows(where, "bias", bias)
    if hasattr(hidden, "placements"):
        raise TypeError(
            f"{where}: hidden is a DTensor {hidden.placements}; give hidden.full_tensor(), each rank all of it"
        )
    for name, value in {"hidden": hidden, "weight": weight, "targets": targets}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
    if weight.dim() != 2 or len(weight) == 0:
        raise ValueError(
            f"{where}: weight has shape {tuple(weight.shape)}; it needs this rank's rows of the head (V_r, D)"
        )
    # check_head sees a target of this shard in every row; whether they are in the vocabulary, the ranks find out together
    stand_in = torch.zeros_like(targets)
    arguments = HeadArguments(
        hidden, weight, bias, stand_in, mask, temperature, softcap, logit_scale, None, chunk_bytes, engine
    )
    needs = needs_gradient(arguments)
    flat, weight, bias, plan = check_head(where, arguments, transfer, needs)
    shard, rows = _agree(where, flat, weight, targets, mask, group, vocab_start, plan)
    flat_targets = targets.reshape(-1).long().clamp(0, shard.vocab - 1)
    split = cast(HeadEngine, _SplitEngine(plan.engine, shard))
    plan = replace(plan, engine=split, targets=flat_targets, chunk_rows=rows, first_rows=rows)
    return (_SumGradient.apply(flat, group), weight, bias, plan), needs


def _agree(
    where: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    plan: Plan,
) -> tuple[_Shard, int]:
    """One exchange before any kernel: the shards make up a vocabulary, and the rows are the same on every rank.

    Returns this rank's shard and the rows of a chunk, which is the same on all: a chunk is a collective call.
    """
    flat = targets.reshape(-1).long()
    kept = torch.ones_like(flat) if mask is None else (mask.reshape(-1) != 0).long()
    place = torch.arange(1, len(flat) + 1, device=flat.device)
    low, high = (flat * kept).min(), (flat * kept).max()
    named = [len(flat), (flat * kept * (place % 1009)).sum(), (kept * place).sum(), low, high]
    known = [len(weight), -1 if vocab_start is None else vocab_start, plan.chunk_rows, *named]
    sample = hidden.detach().reshape(-1)[:: max(1, hidden.numel() // _NUM_SAMPLES)][:_NUM_SAMPLES].double()
    numbers = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=hidden.device) for v in known])
    weights = weight.detach().reshape(-1)[:: max(1, weight.numel() // _NUM_WEIGHTS)][:_NUM_WEIGHTS].double()
    mine = torch.zeros(len(known) + _NUM_SAMPLES + _NUM_WEIGHTS, dtype=torch.float64, device=hidden.device)
    mine[: len(known)], mine[len(known) : len(known) + len(sample)] = numbers, sample
    mine[-_NUM_WEIGHTS:][: len(weights)] = weights
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).cpu()
    rank = dist.get_rank(group)
    sizes, starts, chunks = ([int(v) for v in column] for column in table[:, :3].T)
    vocab = sum(sizes)
    if all(start == -1 for start in starts):
        starts = [sum(sizes[:r]) for r in range(len(sizes))]
    spans = sorted((start, start + size) for start, size in zip(starts, sizes, strict=True))
    if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])]:
        raise ValueError(f"{where}: the ranks' rows of the weight are {spans}; they must follow on one another from 0")
    if not (table[:, 3:6] == table[0, 3:6]).all():
        raise ValueError(
            f"{where}: targets or mask are not the same on the ranks of the group (rows: {table[:, 3].long().tolist()}); "
            "the group must be the tensor-parallel one, whose ranks hold the same batch"
        )
    smallest, largest = int(table[0, 6]), int(table[0, 7])
    if smallest < 0 or largest >= vocab:
        raise ValueError(
            f"{where}: targets reach from {smallest} to {largest}; the ranks' weights make a vocabulary of {vocab}"
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
            "hold the same hidden states: with noise, give perturbed(row_ids=...), or attach their data_rank"
        )
    return _Shard(group, starts[rank], sizes[rank], vocab), min(chunks)


def vocab_parallel_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` with the head's rows split over tensor-parallel ranks: four products, the logits made again in backward.

    A collective call, and so is its backward: every rank of the group gives the same batch. The other arguments and what
    returns, the same on every rank, are as in `linear_logprob`.

    Args:
        hidden: (B, T, D) or (N, D), the same on every rank; its gradient is summed over the group.
        weight: (V_r, D), this rank's rows of the head, numbers of rows may differ; or a DTensor placed (Shard(0),).
        targets: (B, T) or (N,) int64, tokens of the whole vocabulary.
        group: the tensor-parallel ranks; None: all. A DTensor brings its own.
        vocab_start: this rank's first token; None: the shards lie in the order of the ranks.
        bias: (V_r,), or a DTensor like weight.

    Raises:
        ValueError, TypeError: naming the argument; where ranks disagree, on all of them, before any kernel runs.
    """
    where = "vocab_parallel_logprob"
    head = (temperature, softcap, logit_scale, chunk_bytes, engine)
    transfer = Transfer()
    checked, _ = _check_split(where, hidden, weight, bias, targets, mask, group, vocab_start, *head, transfer)
    flat, weight, bias, plan = checked
    logp, entropy = LinearLogprob.apply(flat, weight, bias, None, plan, row_order(flat, mask, transfer))
    return logp.view(targets.shape), entropy.view(targets.shape)


def vocab_parallel_alp_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: Objective,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    token_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    turn_ends: Tensor | None = None,
    num_tokens: int | float | Tensor | None = None,
    num_sequences: int | float | Tensor | None = None,
    nonfinite: str = "raise",
    chunk_bytes: int | None = None,
    engine: str | None = None,
) -> LossOutput:
    """`fused_alp_loss` with the head's rows split over tensor-parallel ranks: three products, gradients formed with the loss.

    Arguments as in `fused_alp_loss` and `vocab_parallel_logprob`; the same loss and statistics on every rank of the group.
    """
    where = "vocab_parallel_alp_loss"
    head = (temperature, softcap, logit_scale, chunk_bytes, engine)
    transfer = Transfer()
    checked, needs = _check_split(where, hidden, weight, bias, targets, mask, group, vocab_start, *head, transfer)
    given = {
        "rollout_logp": rollout_logp,
        "advantages": advantages,
        "mask": mask,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "token_weight": token_weight,
        "cu_seqlens": cu_seqlens,
        "sequence_ids": sequence_ids,
        "turn_ends": turn_ends,
        "num_tokens": num_tokens,
        "num_sequences": num_sequences,
    }
    prepared = prepare(where, checked, targets.shape, objective, nonfinite, given, transfer, needs)
    return fused_loss(prepared, targets.shape, None)
