"""Brings padded (B, T) and packed (N,) batches to one flat form, and checks them before any kernel runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..objective import LOG_RATIO_CLAMP, LossRows, Objective
from .transfer import Asked, Transfer

_ROUNDING = 2.0**-10
"""How far above 0 an engine's rounding may bring the log-probability of a certain token."""


@dataclass(frozen=True)
class Numbers:
    """What a batch says of each of some rows, as one matrix: one operation selects from all of it."""

    columns: tuple[str, ...]  # what the rows of `matrix` are
    matrix: Tensor  # (columns, n) float32 (float64 for float64), finite, 0 off the mask
    denominator_name: str

    def __getitem__(self, column: str) -> Tensor:
        return self.matrix[self.columns.index(column)]

    def select(self, index: Tensor) -> Numbers:
        return replace(self, matrix=self.matrix[:, index])

    def get(self, column: str) -> Tensor | None:
        return self[column] if column in self.columns else None

    @property
    def denominator(self) -> Tensor:
        return self[self.denominator_name]

    def loss_rows(self) -> LossRows:
        return LossRows(
            self.denominator, self["advantages"], self["weight"], self.get("is_weight"), self.get("ref_logp")
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a batch in order, each sequence's together."""

    numbers: Numbers
    sequence: Tensor  # (n,) int64, non-decreasing
    turn: Tensor | None  # (n,) int64, non-decreasing, new at each turn and sequence


@dataclass(frozen=True)
class Batch:
    """A flat batch of N rows, checked."""

    shape: torch.Size  # of the caller's targets: (B, T) or (N,)
    mask: Tensor  # (N,) bool: the row is in the loss
    num_live: int  # rows in the loss
    numbers: Numbers  # of all rows
    sequence: Tensor | None  # (N,) int64, non-decreasing, of a packed batch that says so
    turn: Tensor | None
    num_nonfinite: Tensor | None  # (1,) int64: rows whose rollout log-probability took them out of the mask; None: none

    @property
    def knows_sequences(self) -> bool:
        return self.sequence is not None or len(self.shape) == 2

    def select(self, index: Tensor) -> Rows:
        """The rows `index` (n,), which are in order. A packed batch that says nothing of sequences counts as one."""
        turn = None if self.turn is None else self.turn[index]
        return Rows(self.numbers.select(index), _sequence_of(index, self.shape, self.sequence), turn)


def _sequence_of(index: Tensor, shape: torch.Size, sequence: Tensor | None) -> Tensor:
    """(n,) the sequences of rows `index`."""
    if sequence is not None:
        return sequence[index]
    return torch.zeros_like(index) if len(shape) == 1 else index.div(shape[1], rounding_mode="floor")


@dataclass(frozen=True)
class _Sequences:
    """What a packed batch says of its sequences."""

    of_row: Tensor  # (N,) int64, non-decreasing, in [0, count)
    count: int  # as the caller numbers them, empty ones included
    has_empty: bool  # where count == N: whether (N,) advantages are one a sequence


def _sequences(
    where: str,
    shape: torch.Size,
    device: torch.device,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    transfer: Transfer,
) -> _Sequences | None:
    """Of a packed batch; None where it says nothing, and of a padded one, whose shape says all."""
    if len(shape) == 2:
        if cu_seqlens is not None or sequence_ids is not None:
            raise ValueError(
                f"{where}: cu_seqlens and sequence_ids are for packed (N,) inputs; these are {tuple(shape)} "
                "(squeeze(0) makes a (1, N) batch packed)"
            )
        return None
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError(f"{where}: cu_seqlens and sequence_ids both came; one of them fits")
    num_rows = shape[0]
    if cu_seqlens is not None:
        return _of_cu_seqlens(where, num_rows, device, cu_seqlens, transfer)
    if sequence_ids is None:
        return None
    if sequence_ids.shape != shape or sequence_ids.device != device:
        raise ValueError(
            f"{where}: sequence_ids is {tuple(sequence_ids.shape)} on {sequence_ids.device}; "
            f"it needs {tuple(shape)} on {device}"
        )
    starts, distinct = torch.ones(2, num_rows, dtype=torch.bool, device=device)
    torch.ne(sequence_ids[1:], sequence_ids[:-1], out=starts[1:])
    ordered = sequence_ids.sort().values
    torch.ne(ordered[1:], ordered[:-1], out=distinct[1:])
    of_row = starts.cumsum(0)
    first = Transfer()  # shapes depend on how many there are
    asked = first.ask(torch.stack([of_row[-1], distinct.sum()]))
    first.bring()
    count, num_distinct = map(int, asked.numbers)
    if count != num_distinct:
        raise ValueError(
            f"{where}: sequence_ids return after another sequence; the rows of a sequence must be together"
        )
    return _Sequences(of_row - 1, count, False)


def _of_cu_seqlens(
    where: str, num_rows: int, device: torch.device, cu_seqlens: Tensor, transfer: Transfer
) -> _Sequences:
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
        raise ValueError(
            f"{where}: cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it needs integers (B + 1,)"
        )
    count = len(cu_seqlens) - 1
    is_ambiguous = count == num_rows  # only with an empty sequence: whose (N,) advantages are they?
    first = Transfer() if is_ambiguous else transfer
    asked = first.ask(cu_seqlens.long())

    def check() -> None:
        ends = asked.numbers
        if count < 1 or ends[0] != 0 or ends[-1] != num_rows or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"{where}: cu_seqlens is {ends}; it needs to rise from 0 to N = {num_rows}, shape (B + 1,)"
            )

    first.check(check)
    if is_ambiguous or count < 1:
        first.bring()
    rows = torch.arange(num_rows, device=device)
    # values that nobody has looked at: searchsorted gives numbers in [0, count) whatever they are
    inner = cu_seqlens[1:-1].to(device, torch.int64, non_blocking=True).contiguous()
    has_empty = is_ambiguous and any(a == b for a, b in itertools.pairwise(asked.numbers))
    return _Sequences(torch.searchsorted(inner, rows, right=True), count, has_empty)


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


def _count(where: str, name: str, value: int | float | Tensor | None, default: float | Tensor) -> Tensor:
    """() float64, the count `name` to divide by; at least 1, since an empty batch has loss 0, not 0 / 0.

    A number becomes a tensor on the CPU, which every device takes as a scalar and no default dtype narrows.
    """
    if value is None:
        value = default if isinstance(default, Tensor) else max(default, 1)
    elif isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; it needs one number")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{where}: {name}={value!r}; it needs a count > 0, that of the whole optimiser batch")
    if isinstance(value, Tensor):
        return value.detach().reshape(()).double().clamp(min=1)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


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


@dataclass(frozen=True)
class Unread:
    """A batch whose values nobody has looked at yet: `batch` makes it one after the transfer."""

    where: str
    objective: Objective
    shape: torch.Size
    mask: Tensor
    graded: Tensor  # (N,) bool: rows in the loss whose advantage, or a penalty, gives them a gradient
    counts: Asked  # rows in the loss, wrong values of the mask, graded rows
    columns: tuple[str, ...]
    numbers: Tensor
    sequences: _Sequences | None
    turn: Tensor | None
    num_nonfinite: Tensor | None
    num_tokens: int | float | Tensor | None
    num_sequences: int | float | Tensor | None

    def count(self) -> int:
        """Sequences as the caller numbers them; 1 of a packed batch that says nothing."""
        return self.shape[0] if len(self.shape) == 2 else 1 if self.sequences is None else self.sequences.count

    def sequence(self) -> Tensor:
        """(N,) each row's sequence."""
        index = torch.arange(len(self.mask), device=self.mask.device)
        return _sequence_of(index, self.shape, None if self.sequences is None else self.sequences.of_row)

    def batch(self) -> Batch:
        objective, numbers = self.objective, dict(zip(self.columns, self.numbers, strict=True))
        if objective.weight is not None:
            w = _weights(numbers["old_logp"], numbers["rollout_logp"], self.mask, self.sequence(), objective)
            numbers["is_weight"].mul_(w)
        self._aggregate(numbers["weight"])
        return Batch(
            shape=self.shape,
            mask=self.mask,
            num_live=int(self.counts.numbers[0]),
            numbers=Numbers(
                self.columns, self.numbers, "old_logp" if objective.denominator == "old" else "rollout_logp"
            ),
            sequence=None if self.sequences is None else self.sequences.of_row,
            turn=self.turn,
            num_nonfinite=self.num_nonfinite,
        )

    def _aggregate(self, weight: Tensor) -> None:
        """Write the aggregation weights, 0 off the mask, into `weight` (N,)."""
        kind = self.objective.aggregation
        counted, other = ("tokens", "sequences") if kind == "token-mean" else ("sequences", "tokens")
        given = {"tokens": self.num_tokens, "sequences": self.num_sequences}
        if given[counted] is None and given[other] is not None:
            raise ValueError(
                f"{self.where}: num_{other} came without num_{counted}; aggregation={kind!r} divides by the number of "
                f"{counted}: give num_{counted} of the whole optimiser batch"
            )
        if kind == "token-mean":
            num_tokens = _count(self.where, "num_tokens", self.num_tokens, self.counts.numbers[0])
            torch.div(self.mask, num_tokens, out=weight)
            return
        sequence = self.sequence()
        first, last = first_and_last(sequence)
        tokens = segment_sum(self.mask, first, last)
        at_start = torch.arange(len(sequence), device=sequence.device) == first
        num_sequences = (at_start & (tokens > 0)).sum()
        torch.div(self.mask, _count(self.where, "num_sequences", self.num_sequences, num_sequences), out=weight)
        if kind == "seq-mean-token-mean":
            weight.div_(tokens.clamp(min=1).to(weight.dtype))
        if kind == "seq-mean-token-sum-norm":
            assert self.objective.norm_length is not None
            weight.div_(self.objective.norm_length)


def flatten(
    where: str,
    objective: Objective,
    transfer: Transfer,
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
) -> Unread:
    """Check every argument of a policy loss and flatten it; `transfer` looks at the values, all at once."""
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"{where}: targets have shape {tuple(shape)}; a batch needs (B, T) or (N,), not empty")
    if nonfinite not in ("raise", "mask"):
        raise ValueError(f"{where}: nonfinite={nonfinite!r}; it needs 'raise' or 'mask'")
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{where}: objective is {objective!r}; it needs an Objective, e.g. Objective.preset('alp-sequence')"
        )
    for name, value in (("advantages", advantages), ("cu_seqlens", cu_seqlens), ("sequence_ids", sequence_ids)):
        if not isinstance(value, Tensor) and (value is not None or name == "advantages"):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor")
    q = _per_token(where, "rollout_logp", rollout_logp, shape, dtype, device)
    mask_values = _per_token(where, "mask", mask, shape, mask.dtype if isinstance(mask, Tensor) else dtype, device)
    sequences = _sequences(where, shape, device, cu_seqlens, sequence_ids, transfer)
    count = shape[0] if len(shape) == 2 else None if sequences is None else sequences.count

    if advantages.shape == shape and not (sequences is not None and sequences.has_empty):
        per_token = _per_token(where, "advantages", advantages, shape, dtype, device)
    else:
        if count is None or advantages.shape != (count,):
            per_sequence = "with cu_seqlens or sequence_ids (B,)" if count is None else f"(B,) = ({count},)"
            raise ValueError(
                f"{where}: advantages has shape {tuple(advantages.shape)}; it needs {tuple(shape)} or {per_sequence}"
            )
        per_token = _per_token(where, "advantages", advantages, advantages.shape, dtype, device)
        per_token = per_token[:, None].expand(shape) if sequences is None else per_token[sequences.of_row]

    needs_sequences = (
        objective.level != "token"
        or objective.aggregation != "token-mean"
        or (objective.weight is not None and objective.weight_level == "sequence")
    )
    if needs_sequences and count is None:
        raise ValueError(
            f"{where}: this objective needs to know the sequences of a packed batch: give cu_seqlens or sequence_ids"
        )
    if objective.level == "cum-turn" and turn_ends is None:
        raise ValueError(f"{where}: level 'cum-turn' needs turn_ends {tuple(shape)}, true at each turn's last token")
    if objective.denominator == "old" and old_logp is None:
        raise ValueError(f"{where}: denominator 'old' needs old_logp {tuple(shape)}, recomputed before the update")
    if objective.kl_coef > 0 and ref_logp is None:
        raise ValueError(f"{where}: kl_coef={objective.kl_coef} needs ref_logp {tuple(shape)}")
    optional = {"old_logp": old_logp, "ref_logp": ref_logp, "token_weight": token_weight}
    extra = {k: _per_token(where, k, v, shape, dtype, device) for k, v in optional.items() if v is not None}

    live, wrong_mask, graded = flags = torch.empty(3, q.numel(), dtype=torch.bool, device=device)
    torch.ne(mask_values, 0, out=live)
    torch.ne(mask_values, live, out=wrong_mask)
    num_nonfinite = None
    if nonfinite == "mask":
        is_bad = live & ~q.isfinite()
        num_nonfinite = is_bad.sum(0, keepdim=True)
        live &= ~is_bad
    checked = {"rollout_logp": q, "advantages": per_token, **extra}
    columns = ["is_weight" if name == "token_weight" else name for name in checked]
    if objective.weight is not None and token_weight is None:
        columns.append("is_weight")
    columns.append("weight")
    numbers = torch.zeros(len(columns), q.numel(), dtype=dtype, device=device)
    zero = numbers[-1, 0]  # of the weights, which come last
    for value, row in zip(checked.values(), numbers[: len(checked)], strict=True):
        torch.where(live.view(value.shape), value, zero, out=row.view(value.shape))
    if len(columns) > len(checked) + 1:  # the importance weight's row, to be multiplied
        numbers[-2] = 1.0
    if objective.has_penalty:
        graded.copy_(live)
    else:
        torch.ne(numbers[1], 0, out=graded)
    counts = transfer.ask(flags.sum(1))
    low, high = (transfer.ask(values) for values in numbers[: len(checked)].aminmax(dim=1))

    def check() -> None:
        finite = all(map(math.isfinite, (*low.numbers, *high.numbers)))
        if counts.numbers[1] or not finite or high.numbers[0] > _ROUNDING:
            _raise_fault(where, shape, dict(zip(checked, numbers, strict=False)), wrong_mask)

    transfer.check(check)
    turn = None
    if objective.level == "cum-turn":
        ends = _per_token(where, "turn_ends", turn_ends, shape, torch.bool, device)  # type: ignore[arg-type]
        index = torch.arange(len(ends), device=device)
        sequence = _sequence_of(index, shape, None if sequences is None else sequences.of_row)
        starts = torch.ones_like(ends)
        starts[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
        turn = starts.long().cumsum(0)
    return Unread(
        where=where,
        objective=objective,
        shape=shape,
        mask=live,
        graded=graded,
        counts=counts,
        columns=tuple(columns),
        numbers=numbers,
        sequences=sequences,
        turn=turn,
        num_nonfinite=num_nonfinite,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )


def _raise_fault(where: str, shape: torch.Size, values: dict[str, Tensor], wrong_mask: Tensor) -> NoReturn:
    """Name the first of the faults that the transfer has shown; every tensor (N,), values 0 off the mask."""
    faults = {name: ~value.isfinite() for name, value in values.items()}
    faults = {
        "rollout_logp": faults.pop("rollout_logp"),
        "mask": wrong_mask,
        **faults,
        "positive": values["rollout_logp"] > _ROUNDING,
    }
    name, flags = next((name, flags) for name, flags in faults.items() if bool(flags.any()))
    count, first = int(flags.sum()), int(flags.to(torch.uint8).argmax())
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
    hint = "; nonfinite='mask' takes such tokens out of the loss and counts them" if name == "rollout_logp" else ""
    raise ValueError(f"{where}: {name} is NaN or inf at {count} tokens of the mask, first at {at}{hint}")


def highest_first(rank: Tensor) -> Tensor:
    """(N,) row numbers by falling rank (N,), bool or uint8, equal ones in order: no shape depends on how many have which."""
    return torch.argsort(rank.view(torch.uint8), descending=True, stable=True)


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
