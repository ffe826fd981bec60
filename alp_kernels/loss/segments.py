"""Runs of rows that belong together, a sequence's or a turn's, without a loop and without a shape that depends on values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import Transfer


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


def sequence_of(index: Tensor, shape: torch.Size, sequence: Tensor | None) -> Tensor:
    """(n,) the sequences of rows `index`; `sequence` (N,) of a packed batch that says so."""
    if sequence is not None:
        return sequence[index]
    return torch.zeros_like(index) if len(shape) == 1 else index.div(shape[1], rounding_mode="floor")


@dataclass(frozen=True)
class Sequences:
    """What a packed batch says of its sequences."""

    of_row: Tensor  # (N,) int64, non-decreasing, in [0, count)
    count: int  # as the caller numbers them, empty ones included
    has_empty: bool  # where count == N: whether (N,) advantages are one a sequence


def read_sequences(
    where: str,
    shape: torch.Size,
    device: torch.device,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    transfer: Transfer,
) -> Sequences | None:
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
    if cu_seqlens is not None:
        return _of_cu_seqlens(where, shape[0], device, cu_seqlens, transfer)
    return None if sequence_ids is None else _of_ids(where, shape, device, sequence_ids)


def _of_ids(where: str, shape: torch.Size, device: torch.device, sequence_ids: Tensor) -> Sequences:
    if sequence_ids.shape != shape or sequence_ids.device != device:
        raise ValueError(
            f"{where}: sequence_ids is {tuple(sequence_ids.shape)} on {sequence_ids.device}; "
            f"it needs {tuple(shape)} on {device}"
        )
    starts, distinct = torch.ones(2, shape[0], dtype=torch.bool, device=device)
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
    return Sequences(of_row - 1, count, False)


def _of_cu_seqlens(
    where: str, num_rows: int, device: torch.device, cu_seqlens: Tensor, transfer: Transfer
) -> Sequences:
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
    return Sequences(torch.searchsorted(inner, rows, right=True), count, has_empty)
