"""Brings padded (B, T) and packed (N,) batches to one flat form, and checks them before any kernel runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .objective import LOG_RATIO_CLAMP, LossRows, Objective

_ROUNDING = 1e-3
"""How far above 0 an engine's rounding may bring the log-probability of a certain token."""


@dataclass(frozen=True)
class Batch:
    """A flat batch. N rows in order, each sequence's rows together; every tensor (N,) but where said."""

    shape: torch.Size  # of the caller's targets: (B, T) or (N,)
    mask: Tensor  # bool: the row is in the loss
    rollout_logp: Tensor
    denominator: Tensor
    advantages: Tensor
    weight: Tensor  # aggregation weight, 0 off the mask
    sequence: Tensor  # int64, non-decreasing
    turn: Tensor | None  # int64, non-decreasing, new at each turn and sequence
    is_weight: Tensor | None
    ref_logp: Tensor | None
    knows_sequences: bool  # False: a packed batch that said nothing of sequences; `sequence` is then all 0
    num_nonfinite: Tensor  # () int64: rows taken out of the mask because their rollout log-probability was not finite

    def select(self, index: Tensor) -> Batch:
        """The rows `index` (n,), still in order; `shape` stays the caller's."""
        chosen: dict[str, Any] = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor) and v.dim() == 1}
        return replace(self, **chosen)

    def loss_rows(self) -> LossRows:
        return LossRows(self.denominator, self.advantages, self.weight, self.is_weight, self.ref_logp)


def _first(flags: Tensor) -> tuple[Tensor, Tensor]:
    """How many flags are set and where the first one is."""
    return flags.sum(), flags.to(torch.uint8).argmax()


def _sequences(
    where: str, shape: torch.Size, device: torch.device, cu_seqlens: Tensor | None, sequence_ids: Tensor | None
) -> Tensor | None:
    """Each row's sequence, (N,) int64 non-decreasing; None where a packed batch says nothing of sequences."""
    if len(shape) == 2:
        if cu_seqlens is not None or sequence_ids is not None:
            raise ValueError(
                f"{where}: cu_seqlens and sequence_ids are for packed (N,) inputs; these are {tuple(shape)} "
                "(squeeze(0) makes a (1, N) batch packed)"
            )
        return torch.arange(shape[0], device=device).repeat_interleave(shape[1])
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError(f"{where}: cu_seqlens and sequence_ids both came; one of them fits")
    num_rows = shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"{where}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it needs integers (B + 1,)"
            )
        ends = cu_seqlens.tolist()
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != num_rows or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"{where}: cu_seqlens is {ends}; it needs to rise from 0 to N = {num_rows}, shape (B + 1,)"
            )
        lengths = torch.tensor(ends, device=device).diff()
        return torch.arange(len(ends) - 1, device=device).repeat_interleave(lengths, output_size=num_rows)
    if sequence_ids is not None:
        if sequence_ids.shape != shape or sequence_ids.device != device:
            raise ValueError(
                f"{where}: sequence_ids is {tuple(sequence_ids.shape)} on {sequence_ids.device}; "
                f"it needs {tuple(shape)} on {device}"
            )
        starts = torch.ones(num_rows, dtype=torch.bool, device=device)
        starts[1:] = sequence_ids[1:] != sequence_ids[:-1]
        if int(starts.sum()) != len(torch.unique(sequence_ids)):
            raise ValueError(
                f"{where}: sequence_ids return after another sequence; the rows of a sequence must be together"
            )
        return starts.long().cumsum(0) - 1
    return None


def _per_token(
    where: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor of shape {tuple(shape)}")
    if value.shape != shape:
        raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; it needs {tuple(shape)}")
    if value.device != device:
        raise ValueError(f"{where}: {name} is on {value.device}; the other inputs are on {device}")
    if value.is_complex():
        raise TypeError(f"{where}: {name} is {value.dtype}; it needs a float dtype")
    if name.endswith("logp") and value.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"{where}: {name} is {value.dtype}; it needs torch.float32 (16 bits move ratios by per cents)")
    return value.detach().reshape(-1).to(dtype)


def _count(where: str, name: str, value: int | float | Tensor | None, default: Tensor) -> Tensor:
    if value is None:
        return default.clamp(min=1)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; it needs one number")
        return value.detach().reshape(()).to(default.device).clamp(min=1)  # an empty batch has loss 0, not 0 / 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{where}: {name}={value!r}; it needs a count > 0, that of the whole optimiser batch")
    return torch.tensor(value, dtype=torch.float64, device=default.device)


BATCH_SCHEMA = (
    "Tensor rollout_logp, Tensor advantages, Tensor mask, Tensor? old_logp, Tensor? ref_logp, Tensor? token_weight, "
    "Tensor? cu_seqlens, Tensor? sequence_ids, Tensor? turn_ends, Tensor? num_tokens, Tensor? num_sequences, "
    "str nonfinite, str objective"
)
BATCH_NAMES = (
    "rollout_logp", "advantages", "mask", "old_logp", "ref_logp", "token_weight",
    "cu_seqlens", "sequence_ids", "turn_ends", "num_tokens", "num_sequences",
)  # fmt: skip


def batch_arguments(
    where: str, objective: Objective, device: torch.device, nonfinite: str, given: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments BATCH_SCHEMA of an operator. Counts become tensors, which no graph is specialised on."""
    if not isinstance(objective, Objective):
        raise TypeError(f"{where}: objective is a {type(objective).__name__}; it needs an Objective")
    values = []
    for name in BATCH_NAMES:
        value = given[name]
        if name.startswith("num_") and value is not None and not isinstance(value, Tensor):
            if isinstance(value, bool) or not value > 0:
                raise ValueError(f"{where}: {name}={value}; it needs a count > 0, that of the whole optimiser batch")
            value = torch.full((), value, dtype=torch.float64, device=device)
        values.append(value)
    return (*values, nonfinite, objective.spec)


def flatten(
    where: str,
    objective: Objective,
    *,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    rollout_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    turn_ends: Tensor | None,
    num_tokens: int | float | Tensor | None,
    num_sequences: int | float | Tensor | None,
    nonfinite: str,
) -> Batch:
    """Check every argument of a policy loss and flatten it; the values are looked at once, before any kernel."""
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"{where}: targets have shape {tuple(shape)}; a batch needs (B, T) or (N,), not empty")
    if nonfinite not in ("raise", "mask"):
        raise ValueError(f"{where}: nonfinite={nonfinite!r}; it needs 'raise' or 'mask'")
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{where}: objective is {objective!r}; it needs an Objective, e.g. Objective.preset('alp-sequence')"
        )
    for name, value in (("advantages", advantages), ("cu_seqlens", cu_seqlens), ("sequence_ids", sequence_ids)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
    q = _per_token(where, "rollout_logp", rollout_logp, shape, dtype, device)
    mask_values = _per_token(where, "mask", mask, shape, dtype, device)
    live = mask_values != 0
    sequence = _sequences(where, shape, device, cu_seqlens, sequence_ids)
    count, has_empty = shape[0] if len(shape) == 2 else None, False  # sequences as the caller numbers them
    if cu_seqlens is not None:
        count = len(cu_seqlens) - 1
        has_empty = bool((cu_seqlens.diff() == 0).any())  # where then B == N, (N,) advantages are by sequence
    elif sequence_ids is not None and sequence is not None:
        count = int(sequence[-1]) + 1

    if advantages.shape == shape and not (has_empty and count == shape[0]):
        per_token = _per_token(where, "advantages", advantages, shape, dtype, device)
    else:
        if count is None or advantages.shape != (count,):
            per_sequence = "with cu_seqlens or sequence_ids (B,)" if count is None else f"(B,) = ({count},)"
            raise ValueError(
                f"{where}: advantages has shape {tuple(advantages.shape)}; it needs {tuple(shape)} or {per_sequence}"
            )
        assert sequence is not None
        per_token = _per_token(where, "advantages", advantages, advantages.shape, dtype, device)[sequence]

    needs_sequences = (
        objective.level != "token"
        or objective.aggregation != "token-mean"
        or (objective.weight is not None and objective.weight_level == "sequence")
    )
    knows_sequences = sequence is not None
    if sequence is None:
        if needs_sequences:
            raise ValueError(
                f"{where}: this objective needs to know the sequences of a packed batch: give cu_seqlens or sequence_ids"
            )
        sequence = torch.zeros(shape[0], dtype=torch.int64, device=device)
    turn = None
    if objective.level == "cum-turn":
        if turn_ends is None:
            raise ValueError(
                f"{where}: level 'cum-turn' needs turn_ends {tuple(shape)}, true at each turn's last token"
            )
        ends = _per_token(where, "turn_ends", turn_ends, shape, torch.bool, device)
        starts = torch.ones_like(ends)
        starts[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
        turn = starts.long().cumsum(0)
    if objective.denominator == "old" and old_logp is None:
        raise ValueError(f"{where}: denominator 'old' needs old_logp {tuple(shape)}, recomputed before the update")
    if objective.kl_coef > 0 and ref_logp is None:
        raise ValueError(f"{where}: kl_coef={objective.kl_coef} needs ref_logp {tuple(shape)}")
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "token_weight": token_weight}
    extra = {k: _per_token(where, k, v, shape, dtype, device) for k, v in optional.items() if v is not None}

    bad_rollout = live & ~q.isfinite()
    if nonfinite == "mask":
        live = live & ~bad_rollout
    checks = {
        "rollout_logp": live & bad_rollout,
        "mask": (mask_values != 0) & (mask_values != 1),
        "advantages": live & ~per_token.isfinite(),
    }
    checks |= {k: live & ~v.isfinite() for k, v in extra.items()}
    checks["positive"] = live & (q > _ROUNDING)
    found = torch.stack([torch.stack(_first(flags)) for flags in checks.values()]).tolist()
    for name, (count, first) in zip(checks, found, strict=True):
        if count:
            at = (first,) if len(shape) == 1 else divmod(first, shape[1])
            if name == "positive":
                raise ValueError(
                    f"{where}: rollout_logp is > 0 at {count} tokens of the mask, first at {at}; it needs natural logarithms, "
                    "not probabilities"
                )
            if name == "mask":
                raise ValueError(
                    f"{where}: mask holds {count} values other than 0 and 1, first at {at}; weights go into token_weight"
                )
            hint = (
                "; nonfinite='mask' takes such tokens out of the loss and counts them" if name == "rollout_logp" else ""
            )
            raise ValueError(f"{where}: {name} is NaN or inf at {count} tokens of the mask, first at {at}{hint}")

    zero = torch.zeros((), dtype=dtype, device=device)
    q, per_token = torch.where(live, q, zero), torch.where(live, per_token, zero)
    extra = {k: torch.where(live, v, zero) for k, v in extra.items()}
    old = extra.get("old_logp")
    is_weight = extra.get("token_weight")
    if objective.weight is not None:
        assert old is not None
        w = _weights(old, q, live, sequence, objective)
        is_weight = w if is_weight is None else w * is_weight
    return Batch(
        shape=shape,
        mask=live,
        rollout_logp=q,
        denominator=old if objective.denominator == "old" and old is not None else q,
        advantages=per_token,
        weight=_aggregation(where, objective, live, sequence, num_tokens, num_sequences, dtype),
        sequence=sequence,
        turn=turn,
        is_weight=is_weight,
        ref_logp=extra.get("ref_logp"),
        knows_sequences=knows_sequences,
        num_nonfinite=bad_rollout.sum(),
    )


def segment_sum(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sum of values[first..last] for each row (both included), float64, exact to 1e-12 a value.

    Summed as integers, in steps of 2^-40: the result does not depend on what else is in the batch, no device needs an
    ordered sum, and an infinite value stays in its own segment. Values count as at most 1000 in size;
    8000 of those in a segment would overflow.
    """
    steps = (values.double().clamp(-1e3, 1e3) * 2.0**40).round_().long()
    before = steps.cumsum(0).sub_(steps)  # of each row, the sum of those above it
    return (before[last] - before[first]).add_(steps[last]).double().mul_(2.0**-40)


def first_and_last(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of non-decreasing `ids`, the first and last row with the same id."""
    return torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True) - 1


def _weights(old: Tensor, q: Tensor, live: Tensor, sequence: Tensor, objective: Objective) -> Tensor:
    log_w = torch.where(live, old - q, torch.zeros_like(q))
    if objective.weight_level == "sequence":
        log_w = segment_sum(log_w, *first_and_last(sequence)).to(q.dtype)
    w = log_w.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if objective.weight == "truncate":
        return w.clamp(max=objective.weight_cap)
    return torch.where((w >= 1 / objective.weight_cap) & (w <= objective.weight_cap), w, torch.zeros_like(w))


def _aggregation(
    where: str,
    objective: Objective,
    live: Tensor,
    sequence: Tensor,
    num_tokens: int | float | Tensor | None,
    num_sequences: int | float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    counted, other = ("tokens", "sequences") if objective.aggregation == "token-mean" else ("sequences", "tokens")
    given = {"tokens": num_tokens, "sequences": num_sequences}
    if given[counted] is None and given[other] is not None:
        raise ValueError(
            f"{where}: num_{other} came without num_{counted}; aggregation={objective.aggregation!r} divides by the number of "
            f"{counted}: give num_{counted} of the whole optimiser batch"
        )
    m = live.to(dtype)
    if objective.aggregation == "token-mean":
        return m / _count(where, "num_tokens", num_tokens, live.sum())
    first, last = first_and_last(sequence)
    tokens = segment_sum(m, first, last)
    at_start = torch.arange(len(sequence), device=sequence.device) == first
    per_sequence = m / _count(where, "num_sequences", num_sequences, (at_start & (tokens > 0)).sum())
    if objective.aggregation == "seq-mean-token-mean":
        return per_sequence / tokens.clamp(min=1).to(dtype)
    if objective.aggregation == "seq-mean-token-sum-norm":
        assert objective.norm_length is not None
        return per_sequence / objective.norm_length
    return per_sequence
