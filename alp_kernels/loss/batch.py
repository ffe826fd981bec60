"""Flatten padded (B, T) and packed (N,) batches to one form, and check them before any kernel runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checks import LARGEST, SMALLEST
from ..objective import LOG_RATIO_CLAMP, LossRows, Objective
from .inputs import LOG_PROBABILITIES, PLACEHOLDER, UNKNOWN, Count, LossInputs, is_known
from .segments import Sequences, first_and_last, read_sequences, segment_sum, sequence_of
from .transfer import Asked, Transfer

ROUNDING = 2.0**-10
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
        optional = (self.get(name) for name in ("is_weight", "ref_logp", "entropy_weight"))
        return LossRows(self.denominator, self["advantages"], self["weight"], *optional)


@dataclass(frozen=True)
class Rows:
    """Rows of a batch in order; a sequence's rows are adjacent."""

    numbers: Numbers
    sequence: Tensor  # (n,) int64, non-decreasing
    turn: Tensor | None  # (n,) int64, non-decreasing, increases where a turn or sequence starts
    index: Tensor  # (n,) int64, ascending: the rows' numbers in the batch


@dataclass(frozen=True)
class Batch:
    """A flat batch of N rows, checked."""

    shape: torch.Size  # of the caller's targets: (B, T) or (N,)
    mask: Tensor  # (N,) bool: the row is in the loss
    num_live: int  # rows in the loss
    objective: Objective
    numbers: Numbers  # of all rows
    sequence: Tensor | None  # (N,) int64, non-decreasing; None if padded, or packed without sequences
    num_sequences: int  # as Unread.count
    turn: Tensor | None
    num_nonfinite: Tensor | None  # (1,) int64: rows masked for an unknown rollout_logp; None if nonfinite='raise'

    @property
    def knows_sequences(self) -> bool:
        return self.sequence is not None or len(self.shape) == 2

    def select(self, index: Tensor) -> Rows:
        """Select the rows `index` (n,), which ascend. A packed batch without sequences counts as one sequence."""
        turn = None if self.turn is None else self.turn[index]
        return Rows(self.numbers.select(index), sequence_of(index, self.shape, self.sequence), turn, index)


def _count(value: Count, default: float | Tensor) -> Tensor:
    """Return the count to divide by, () float64.

    A tensor or default of 0 counts as 1, so that an empty batch has loss 0, not 0 / 0. A number becomes a float64 tensor
    on the CPU: every device accepts it as a scalar, and the default dtype does not narrow it.
    """
    if value is None:
        value = default if isinstance(default, Tensor) else max(default, 1)
    if isinstance(value, Tensor):
        count = value.detach().reshape(()).double()
        return torch.where(count == 0, 1.0, count)
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
        if "entropy_weight" in numbers:
            torch.div(self.mask, self._num_tokens(), out=numbers["entropy_weight"])
        return Batch(
            shape=self.shape,
            mask=self.mask,
            num_live=int(self.counts.numbers[0]),
            objective=objective,
            numbers=Numbers(
                self.columns, self.numbers, "old_logp" if objective.denominator == "old" else "rollout_logp"
            ),
            sequence=None if self.sequences is None else self.sequences.of_row,
            num_sequences=self.count(),
            turn=self.turn,
            num_nonfinite=self.num_nonfinite,
        )

    def _num_tokens(self) -> Tensor:
        return _count(self.inputs.num_tokens, self.counts.numbers[0])

    def _aggregate(self, weight: Tensor) -> None:
        """Write the aggregation weights, 0 off the mask, into `weight` (N,)."""
        kind = self.objective.aggregation
        if kind == "token-mean":
            torch.div(self.mask, self._num_tokens(), out=weight)
            return
        sequence = self.sequence()
        first, last = first_and_last(sequence)
        tokens = segment_sum(self.mask, first, last)
        at_start = torch.arange(len(sequence), device=sequence.device) == first
        num_sequences = (at_start & (tokens > 0)).sum()
        torch.div(self.mask, _count(self.inputs.num_sequences, num_sequences), out=weight)
        if kind == "seq-mean-token-mean":
            weight.div_(tokens.clamp(min=1).to(weight.dtype))
        if kind == "seq-mean-token-sum-norm":
            assert self.objective.norm_length is not None
            weight.div_(self.objective.norm_length)


def _check_counts(where: str, inputs: LossInputs) -> None:
    """Raise if a count of the whole optimiser batch is given and another one is needed, too."""
    objective = inputs.objective
    of_loss = "tokens" if objective.aggregation == "token-mean" else "sequences"
    given = {"tokens": inputs.num_tokens, "sequences": inputs.num_sequences}
    needed = {of_loss: f"aggregation={objective.aggregation!r}"}
    if objective.entropy_coef != 0 and objective.entropy_aggregation == "token-mean":
        needed = {"tokens": "entropy_aggregation='token-mean'"} | needed
    for counted, by in needed.items():
        other = "sequences" if counted == "tokens" else "tokens"
        if given[counted] is None and given[other] is not None:
            raise ValueError(
                f"{where}: num_{other} was given without num_{counted}; {by} divides by the number of {counted}: give "
                f"num_{counted} of the whole optimiser batch"
            )


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
        if value.shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}; it needs {tuple(shape)}")
        if value.device != self.device:
            raise ValueError(f"{where}: {name} is on {value.device}; the other inputs are on {self.device}")
        return value.detach().reshape(-1).to(self.dtype if dtype is None else dtype)


def flatten(
    where: str, inputs: LossInputs, transfer: Transfer, *, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Unread:
    """Check every input of a policy loss and flatten it; `transfer` checks all values at once.

    shape: of the targets. dtype: of log-probabilities, float32 (float64 for float64).
    """
    form, objective = _Form(where, shape, dtype, device), inputs.objective
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(
            f"{where}: the batch has shape {tuple(shape)}; it needs (B, T) or (N,), one value per token, not empty"
        )
    _check_counts(where, inputs)
    q = form.flat("rollout_logp", inputs.rollout_logp)
    live, wrong_mask, graded = flags = torch.empty(3, q.numel(), dtype=torch.bool, device=device)
    mask_values = form.flat("mask", inputs.mask, dtype=inputs.mask.dtype)
    torch.ne(mask_values, 0, out=live)
    torch.ne(mask_values, live, out=wrong_mask)
    sequences, advantages = _of_sequences(form, inputs, live, transfer)
    _check_needs(form, inputs, knows_sequences=len(shape) == 2 or sequences is not None)
    optional = {"old_logp": inputs.old_logp, "ref_logp": inputs.ref_logp, "token_weight": inputs.token_weight}
    extra = {name: form.flat(name, value) for name, value in optional.items() if value is not None}

    num_nonfinite = None
    if inputs.nonfinite == "mask":
        is_bad = live & ~is_known(q)
        num_nonfinite = is_bad.sum(0, keepdim=True)
        live &= ~is_bad
    checked = {"rollout_logp": q, "advantages": advantages, **extra}
    columns = ["is_weight" if name == "token_weight" else name for name in checked]
    if objective.weight is not None and inputs.token_weight is None:
        columns.append("is_weight")
    if objective.entropy_coef != 0 and objective.entropy_aggregation is not None:
        columns.append("entropy_weight")
    columns.append("weight")
    numbers = torch.zeros(len(columns), q.numel(), dtype=dtype, device=device)
    zero = numbers[-1, 0]  # from the last row, the weights', which is still 0
    for value, row in zip(checked.values(), numbers[: len(checked)], strict=True):
        torch.where(live.view(value.shape), value, zero, out=row.view(value.shape))
    if objective.weight is not None and inputs.token_weight is None:
        numbers[len(checked)] = 1.0  # `Unread.batch` multiplies it by the importance weight
    if objective.has_penalty:
        graded.copy_(live)
    else:
        torch.ne(numbers[1], 0, out=graded)
    counts = transfer.ask(flags.sum(1))
    low, high = (transfer.ask(values) for values in numbers[: len(checked)].aminmax(dim=1))

    def check() -> None:
        finite = all(map(math.isfinite, (*low.numbers, *high.numbers)))
        largest = dict(zip(checked, high.numbers, strict=True))
        is_log = all(largest.get(name, 0.0) <= ROUNDING for name in LOG_PROBABILITIES)
        is_placeholder = low.numbers[0] <= PLACEHOLDER  # of rollout_logp
        if counts.numbers[1] or not finite or is_placeholder or not is_log:
            _raise_fault(where, shape, dict(zip(checked, numbers, strict=False)), wrong_mask)

    transfer.check(check)
    for name in ("num_tokens", "num_sequences"):
        _check_count_later(where, name, getattr(inputs, name), transfer)
    turn = _turns(form, inputs, sequences, live, transfer) if objective.level == "cum-turn" else None
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
    """Check the value of a count given as a tensor: 0 counts as 1, since a batch may be empty; a negative count raises."""
    if not isinstance(value, Tensor):
        return
    if value.is_meta:
        raise ValueError(f"{where}: {name} is on the meta device and holds no value")
    asked = transfer.ask(value)

    def check() -> None:
        count = asked.numbers[0]
        if not (count == 0 or SMALLEST <= count <= LARGEST):
            raise ValueError(f"{where}: {name}={count}; it needs a count >= 0 over the whole optimiser batch")

    transfer.check(check)


def _of_sequences(form: _Form, inputs: LossInputs, live: Tensor, transfer: Transfer) -> tuple[Sequences | None, Tensor]:
    """Return a packed batch's sequences, and one advantage per token: (N,), or (B, T) if a padded batch has (B,)."""
    where, shape, advantages = form.where, form.shape, inputs.advantages
    sequences = read_sequences(
        where, shape, form.device, inputs.cu_seqlens, inputs.sequence_ids, live, advantages.shape[:1].numel(), transfer
    )
    if advantages.shape == shape and not (sequences is not None and sequences.has_empty):
        return sequences, form.flat("advantages", advantages)
    count = shape[0] if len(shape) == 2 else None if sequences is None else sequences.count
    if count is None or advantages.shape != (count,):
        per_sequence = "; for one per sequence give cu_seqlens or sequence_ids, too"
        if count is not None:
            of = "" if len(shape) == 2 else " of cu_seqlens" if inputs.sequence_ids is None else " of sequence_ids"
            per_sequence = f", or ({count},), one per sequence{of}"
        raise ValueError(
            f"{where}: advantages has shape {tuple(advantages.shape)}; it needs {tuple(shape)}, one per token{per_sequence}"
        )
    values = form.flat("advantages", advantages, shape=advantages.shape)
    return sequences, values[:, None].expand(shape) if sequences is None else values[sequences.of_row]


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


def _turns(form: _Form, inputs: LossInputs, sequences: Sequences | None, live: Tensor, transfer: Transfer) -> Tensor:
    """Return each row's turn, (N,) int64, non-decreasing; it increases where a turn or sequence starts."""
    assert inputs.turn_ends is not None
    values = form.flat("turn_ends", inputs.turn_ends, dtype=inputs.turn_ends.dtype)
    ends = values == 1
    wrong = transfer.ask(((values != ends) & live).sum())

    def check() -> None:
        if wrong.numbers[0]:
            raise ValueError(
                f"{form.where}: turn_ends holds {wrong.numbers[0]} values other than 0 and 1; it needs 1 at each turn's last "
                "token, not the turns' numbers"
            )

    transfer.check(check)
    index = torch.arange(len(ends), device=form.device)
    sequence = sequence_of(index, form.shape, None if sequences is None else sequences.of_row)
    starts = torch.ones_like(ends)
    starts[1:] = ends[:-1] | (sequence[1:] != sequence[:-1])
    return starts.long().cumsum(0)


def place_of(flags: Tensor, shape: torch.Size) -> tuple[int, tuple[int, ...]]:
    """How many of the flags (N,) are set, and the index of the first one in a batch of `shape`; for messages."""
    count, first = int(flags.sum()), int(flags.to(torch.uint8).argmax())
    return count, (first,) if len(shape) == 1 else divmod(first, shape[1])


def _raise_fault(where: str, shape: torch.Size, values: dict[str, Tensor], wrong_mask: Tensor) -> NoReturn:
    """Raise an error that names the first fault; every tensor is (N,), and values are 0 off the mask."""
    infinite = " is NaN or inf at {} tokens of the mask, first at {}"
    positive = " is > 0 at {} tokens of the mask, first at {}; it needs natural logarithms, not probabilities"
    wrong = "mask holds {} values other than 0 and 1, first at {}; weights go into token_weight"
    hint = "; nonfinite='mask' takes such tokens out of the loss and counts them"
    logp = {name: value for name, value in values.items() if name in LOG_PROBABILITIES}
    faults = [
        (
            f"rollout_logp is {UNKNOWN} at {{}} tokens of the mask, first at {{}}{hint}",
            ~is_known(values["rollout_logp"]),
        ),
        (wrong, wrong_mask),
        *((name + infinite, ~value.isfinite()) for name, value in values.items()),
        *((name + positive, value > ROUNDING) for name, value in logp.items()),
    ]
    text, flags = next((text, flags) for text, flags in faults if bool(flags.any()))
    raise ValueError(f"{where}: " + text.format(*place_of(flags, shape)))


def _weights(old: Tensor, q: Tensor, live: Tensor, sequence: Tensor, objective: Objective) -> Tensor:
    log_w = torch.where(live, old - q, torch.zeros_like(q))
    if objective.weight_level == "sequence":
        log_w = segment_sum(log_w, *first_and_last(sequence)).to(q.dtype)
    w = log_w.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    if objective.weight == "truncate":
        return w.clamp(max=objective.weight_cap)
    return torch.where((w >= 1 / objective.weight_cap) & (w <= objective.weight_cap), w, torch.zeros_like(w))
