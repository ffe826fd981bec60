"""Flatten padded (B, T) and packed (N,) batches to one form, and check them before any kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..objective import LOG_RATIO_CLAMP, LossRows, Objective
from .inputs import Count, LossInputs, check_count, check_objective
from .segments import Sequences, first_and_last, read_sequences, segment_sum, sequence_of
from .transfer import Asked, Transfer

_ROUNDING = 2.0**-10
"""How far above 0 an engine's rounding may lift the log-probability of a token of probability 1."""


@dataclass(frozen=True)
class Numbers:
    """A batch's per-row numbers as one matrix, so that one operation selects rows of all of them."""

    columns: tuple[str, ...]  # names of the rows of `matrix`
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
    """Rows of a batch in order; a sequence's rows are adjacent."""

    numbers: Numbers
    sequence: Tensor  # (n,) int64, non-decreasing
    turn: Tensor | None  # (n,) int64, non-decreasing, increases where a turn or sequence starts


@dataclass(frozen=True)
class Batch:
    """A flat batch of N rows, checked."""

    shape: torch.Size  # of the caller's targets: (B, T) or (N,)
    mask: Tensor  # (N,) bool: the row is in the loss
    num_live: int  # rows in the loss
    objective: Objective
    numbers: Numbers  # of all rows
    sequence: Tensor | None  # (N,) int64, non-decreasing; None if padded, or packed without sequences
    turn: Tensor | None
    num_nonfinite: Tensor | None  # (1,) int64: rows masked for a NaN or inf rollout_logp; None if nonfinite='raise'

    @property
    def knows_sequences(self) -> bool:
        return self.sequence is not None or len(self.shape) == 2

    def select(self, index: Tensor) -> Rows:
        """Select the rows `index` (n,), which ascend. A packed batch without sequences counts as one sequence."""
        turn = None if self.turn is None else self.turn[index]
        return Rows(self.numbers.select(index), sequence_of(index, self.shape, self.sequence), turn)


def _count(where: str, name: str, value: Count, default: float | Tensor) -> Tensor:
    """Return the count `name` to divide by, () float64.

    Tensors and defaults count as at least 1, so that an empty batch has loss 0, not 0 / 0. A number becomes a float64 tensor
    on the CPU: every device accepts it as a scalar, and the default dtype does not narrow it.
    """
    if value is None:
        value = default if isinstance(default, Tensor) else max(default, 1)
    elif not isinstance(value, Tensor):
        check_count(where, name, value)
    if isinstance(value, Tensor):
        return value.detach().reshape(()).double().clamp(min=1)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Unread:
    """A batch whose values are not checked yet; after the transfer, `batch` makes the Batch."""

    where: str
    inputs: LossInputs
    shape: torch.Size
    mask: Tensor
    graded: Tensor  # (N,) bool: rows in the loss that get a gradient from their advantage or a penalty
    counts: Asked  # how many: rows in the loss, invalid values of the mask, graded rows
    columns: tuple[str, ...]
    numbers: Tensor
    sequences: Sequences | None
    turn: Tensor | None
    num_nonfinite: Tensor | None

    @property
    def objective(self) -> Objective:
        return self.inputs.objective

    def count(self) -> int:
        """Return how many sequences the caller has, empty ones included; 1 for a packed batch without sequences."""
        return self.shape[0] if len(self.shape) == 2 else 1 if self.sequences is None else self.sequences.count

    def sequence(self) -> Tensor:
        """Return each row's sequence, (N,)."""
        index = torch.arange(len(self.mask), device=self.mask.device)
        return sequence_of(index, self.shape, None if self.sequences is None else self.sequences.of_row)

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
            objective=objective,
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
        given = {"tokens": self.inputs.num_tokens, "sequences": self.inputs.num_sequences}
        if given[counted] is None and given[other] is not None:
            raise ValueError(
                f"{self.where}: num_{other} was given without num_{counted}; aggregation={kind!r} divides by the number of "
                f"{counted}: give num_{counted} of the whole optimiser batch"
            )
        if kind == "token-mean":
            num_tokens = _count(self.where, "num_tokens", self.inputs.num_tokens, self.counts.numbers[0])
            torch.div(self.mask, num_tokens, out=weight)
            return
        sequence = self.sequence()
        first, last = first_and_last(sequence)
        tokens = segment_sum(self.mask, first, last)
        at_start = torch.arange(len(sequence), device=sequence.device) == first
        num_sequences = (at_start & (tokens > 0)).sum()
        torch.div(self.mask, _count(self.where, "num_sequences", self.inputs.num_sequences, num_sequences), out=weight)
        if kind == "seq-mean-token-mean":
            weight.div_(tokens.clamp(min=1).to(weight.dtype))
        if kind == "seq-mean-token-sum-norm":
            assert self.objective.norm_length is not None
            weight.div_(self.objective.norm_length)


class _Form(NamedTuple):
    """The shape and device that every tensor of a batch must have, and the dtype that it is cast to."""

    where: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def flat(
        self, name: str, value: Tensor, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Check a per-token tensor, and return it flat (N,) and detached."""
        where, shape = self.where, self.shape if shape is None else shape
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor of shape {tuple(shape)}"
            )
        if value.shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; it needs {tuple(shape)}")
        if value.device != self.device:
            raise ValueError(f"{where}: {name} is on {value.device}; the other inputs are on {self.device}")
        if value.is_complex():
            raise TypeError(f"{where}: {name} is {value.dtype}; it needs a float dtype")
        if name.endswith("logp") and value.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"{where}: {name} is {value.dtype}; it needs torch.float32 (16 bits change ratios by several per cent)"
            )
        return value.detach().reshape(-1).to(self.dtype if dtype is None else dtype)


def flatten(
    where: str, inputs: LossInputs, transfer: Transfer, *, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Unread:
    """Check every input of a policy loss and flatten it; `transfer` checks all values at once.

    shape: of the targets. dtype: of log-probabilities, float32 (float64 for float64).
    """
    form, objective = _Form(where, shape, dtype, device), inputs.objective
    _check_kinds(form, inputs)
    q = form.flat("rollout_logp", inputs.rollout_logp)
    mask_dtype = inputs.mask.dtype if isinstance(inputs.mask, Tensor) else dtype
    mask_values = form.flat("mask", inputs.mask, dtype=mask_dtype)
    sequences = read_sequences(where, shape, device, inputs.cu_seqlens, inputs.sequence_ids, transfer)
    advantages = _advantages_by_token(form, inputs.advantages, sequences)
    _check_needs(form, inputs, knows_sequences=len(shape) == 2 or sequences is not None)
    optional = {"old_logp": inputs.old_logp, "ref_logp": inputs.ref_logp, "token_weight": inputs.token_weight}
    extra = {name: form.flat(name, value) for name, value in optional.items() if value is not None}

    live, wrong_mask, graded = flags = torch.empty(3, q.numel(), dtype=torch.bool, device=device)
    torch.ne(mask_values, 0, out=live)
    torch.ne(mask_values, live, out=wrong_mask)
    num_nonfinite = None
    if inputs.nonfinite == "mask":
        is_bad = live & ~q.isfinite()
        num_nonfinite = is_bad.sum(0, keepdim=True)
        live &= ~is_bad
    checked = {"rollout_logp": q, "advantages": advantages, **extra}
    columns = ["is_weight" if name == "token_weight" else name for name in checked]
    if objective.weight is not None and inputs.token_weight is None:
        columns.append("is_weight")
    columns.append("weight")
    numbers = torch.zeros(len(columns), q.numel(), dtype=dtype, device=device)
    zero = numbers[-1, 0]  # from the last row, the weights', which is still 0
    for value, row in zip(checked.values(), numbers[: len(checked)], strict=True):
        torch.where(live.view(value.shape), value, zero, out=row.view(value.shape))
    if len(columns) > len(checked) + 1:  # the importance weight's row; `Unread.batch` multiplies it
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
    for name in ("num_tokens", "num_sequences"):
        _check_count_later(where, name, getattr(inputs, name), transfer)
    turn = _turns(form, inputs, sequences) if objective.level == "cum-turn" else None
    return Unread(
        where=where,
        inputs=inputs,
        shape=shape,
        mask=live,
        graded=graded,
        counts=counts,
        columns=tuple(columns),
        numbers=numbers,
        sequences=sequences,
        turn=turn,
        num_nonfinite=num_nonfinite,
    )


def _check_count_later(where: str, name: str, value: Count, transfer: Transfer) -> None:
    """Check a count given as a tensor: 0 counts as 1, since a batch may be empty; a negative count raises."""
    if not isinstance(value, Tensor):
        return
    if value.numel() != 1 or value.dtype == torch.bool:
        raise ValueError(f"{where}: {name} is {value.dtype} {tuple(value.shape)}; it needs one number")
    asked = transfer.ask(value)

    def check() -> None:
        if not 0 <= asked.numbers[0] < math.inf:
            raise ValueError(
                f"{where}: {name}={asked.numbers[0]}; it needs a count >= 0 over the whole optimiser batch"
            )

    transfer.check(check)


def _check_kinds(form: _Form, inputs: LossInputs) -> None:
    where, shape = form.where, form.shape
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(
            f"{where}: the batch has shape {tuple(shape)}; it needs (B, T) or (N,), one value per token, not empty"
        )
    if inputs.nonfinite not in ("raise", "mask"):
        raise ValueError(f"{where}: nonfinite={inputs.nonfinite!r}; it needs 'raise' or 'mask'")
    check_objective(where, inputs.objective)
    for name in ("advantages", "cu_seqlens", "sequence_ids"):
        value = getattr(inputs, name)
        if not isinstance(value, Tensor) and (value is not None or name == "advantages"):
            raise TypeError(f"{where}: {name} is a {type(value).__name__}; it needs a torch.Tensor")


def _advantages_by_token(form: _Form, advantages: Tensor, sequences: Sequences | None) -> Tensor:
    """Return one advantage per token: (N,), or (B, T) if a padded batch has one per sequence."""
    where, shape = form.where, form.shape
    if advantages.shape == shape and not (sequences is not None and sequences.has_empty):
        return form.flat("advantages", advantages)
    count = shape[0] if len(shape) == 2 else None if sequences is None else sequences.count
    if count is None or advantages.shape != (count,):
        per_sequence = "; for one per sequence give cu_seqlens or sequence_ids, too"
        if count is not None:
            per_sequence = f", or ({count},), one per sequence"
        raise ValueError(
            f"{where}: advantages has shape {tuple(advantages.shape)}; it needs {tuple(shape)}, one per token{per_sequence}"
        )
    per_sequence_values = form.flat("advantages", advantages, shape=advantages.shape)
    return per_sequence_values[:, None].expand(shape) if sequences is None else per_sequence_values[sequences.of_row]


def _check_needs(form: _Form, inputs: LossInputs, *, knows_sequences: bool) -> None:
    """Check that every input the objective reads is given."""
    where, shape, objective = form.where, tuple(form.shape), inputs.objective
    if objective.needs_sequences and not knows_sequences:
        raise ValueError(
            f"{where}: this objective needs to know the sequences of a packed batch: give cu_seqlens or sequence_ids"
        )
    if objective.level == "cum-turn" and inputs.turn_ends is None:
        raise ValueError(f"{where}: level 'cum-turn' needs turn_ends {shape}, true at each turn's last token")
    if objective.denominator == "old" and inputs.old_logp is None:
        raise ValueError(f"{where}: denominator 'old' needs old_logp {shape}, recomputed before the update")
    if objective.kl_coef > 0 and inputs.ref_logp is None:
        raise ValueError(f"{where}: kl_coef={objective.kl_coef} needs ref_logp {shape}")


def _turns(form: _Form, inputs: LossInputs, sequences: Sequences | None) -> Tensor:
    """Return each row's turn, (N,) int64, non-decreasing; it increases where a turn or sequence starts."""
    assert inputs.turn_ends is not None
    ends = form.flat("turn_ends", inputs.turn_ends, dtype=torch.bool)
    index = torch.arange(len(ends), device=form.device)
    sequence = sequence_of(index, form.shape, None if sequences is None else sequences.of_row)
    starts = torch.ones_like(ends)
    starts[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
    return starts.long().cumsum(0)


def _raise_fault(where: str, shape: torch.Size, values: dict[str, Tensor], wrong_mask: Tensor) -> NoReturn:
    """Raise an error that names the first fault; every tensor is (N,), and values are 0 off the mask."""
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


def _weights(old: Tensor, q: Tensor, live: Tensor, sequence: Tensor, objective: Objective) -> Tensor:
    log_w = torch.where(live, old - q, torch.zeros_like(q))
    if objective.weight_level == "sequence":
        log_w = segment_sum(log_w, *first_and_last(sequence)).to(q.dtype)
    w = log_w.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if objective.weight == "truncate":
        return w.clamp(max=objective.weight_cap)
    return torch.where((w >= 1 / objective.weight_cap) & (w <= objective.weight_cap), w, torch.zeros_like(w))
