"""Runs of adjacent rows, such as a sequence's or a turn's, without loops and without shapes that depend on values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from .transfer import Transfer


def highest_first(rank: Tensor) -> Tensor:
    """Return row numbers (N,) by descending rank (N,), bool or uint8; equal ranks stay in order. No shape depends on values."""
    return torch.argsort(rank.view(torch.uint8), descending=True, stable=True)


def segment_sum(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sum values[first..last] (both included) for each row, float64, exact to 1e-12 per value.

    It sums integers, in steps of 2^-40: the result does not depend on what else is in the batch, no device needs an
    ordered sum, and an infinite value affects only its own segment. Values are clamped to +-1000; a segment with more than
    8000 values of that size may overflow.
    """
    steps = (values.double().clamp(-1e3, 1e3) * 2.0**40).round_().long()
    before = steps.cumsum(0).sub_(steps)  # for each row, the sum of all rows before it
    return (before[last] - before[first]).add_(steps[last]).double().mul_(2.0**-40)


def first_and_last(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of non-decreasing `ids`, the first and last row with the same id."""
    return torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True) - 1


def sequence_of(index: Tensor, shape: torch.Size, sequence: Tensor | None) -> Tensor:
    """Return the sequences (n,) of rows `index`; sequence: (N,) for a packed batch that defines them, else None."""
    if sequence is not None:
        return sequence[index]
    return torch.zeros_like(index) if len(shape) == 1 else index.div(shape[1], rounding_mode="floor")


@dataclass(frozen=True)
class Sequences:
    """The sequences of a packed batch."""

    of_row: Tensor  # (N,) int64, non-decreasing, in [0, count)
    count: int  # as the caller numbers them, empty ones included
    has_empty: bool  # set only if count == N: (N,) advantages are then one per sequence


def read_sequences(
    where: str,
    shape: torch.Size,
    device: torch.device,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
    transfer: Transfer,
) -> Sequences | None:
    """Return a packed batch's sequences; None if it defines none, or if the batch is padded: its shape defines them."""
    if len(shape) == 2:
        if cu_seqlens is not None or sequence_ids is not None:
            raise ValueError(
                f"{where}: cu_seqlens and sequence_ids are for packed (N,) inputs; these are {tuple(shape)} "
                "(squeeze(0) makes a (1, N) batch packed)"
            )
        return None
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError(f"{where}: cu_seqlens and sequence_ids were both given; it needs one of them")
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
    first = Transfer()  # shapes depend on the number of sequences
    asked = first.ask(torch.stack([of_row[-1], distinct.sum()]))
    first.bring()
    count, num_distinct = map(int, asked.numbers)
    if count != num_distinct:
        raise ValueError(
            f"{where}: sequence_ids return after another sequence; the rows of a sequence must be adjacent"
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
    is_ambiguous = count == num_rows  # (N,) advantages are per sequence if one is empty, else per token
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
    # not checked yet: searchsorted gives numbers in [0, count) whatever the values are
    inner = cu_seqlens[1:-1].to(device, torch.int64, non_blocking=True).contiguous()
    has_empty = is_ambiguous and any(a == b for a, b in itertools.pairwise(asked.numbers))
    return Sequences(torch.searchsorted(inner, rows, right=True), count, has_empty)
