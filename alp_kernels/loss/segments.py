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


_LARGEST = 2.0**38  # nats; 2^24 such values in a segment sum to less than 2^63


def segment_sum(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Sum values[first..last] (both included) for each row, float64, exact to 1e-12 per value; NaN if one is NaN.

    It sums integers, whole nats and steps of 2^-40 apart: the result does not depend on what else is in the batch, no device
    needs an ordered sum, and an infinite or NaN value affects only its own segment. Values beyond +-2^38 count as +-2^38.
    """
    wide = values.double()
    is_nan = wide.isnan()
    wide = torch.where(is_nan, 0.0, wide).clamp_(-_LARGEST, _LARGEST)
    whole = wide.round()
    parts = torch.stack([whole, (wide - whole).mul_(2.0**40).round_(), is_nan]).long()
    until = parts.cumsum(1)
    sums = (until[:, last] - (until - parts)[:, first]).double()
    return torch.where(sums[2] > 0, torch.nan, sums[1].mul_(2.0**-40).add_(sums[0]))


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
    live: Tensor,
    num_advantages: int,
    transfer: Transfer,
) -> Sequences | None:
    """Return a packed batch's sequences; None if it defines none, or if the batch is padded: its shape defines them.

    live: (N,) bool, the mask. num_advantages: how many the caller gives, which tells whether masked rows have ids.
    """
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
    return None if sequence_ids is None else _of_ids(where, shape, device, sequence_ids, live, num_advantages)


def _of_ids(
    where: str, shape: torch.Size, device: torch.device, sequence_ids: Tensor, live: Tensor, num_advantages: int
) -> Sequences:
    """Return the sequences of ids (N,). Rows off the mask may carry any id, such as padding's.

    If every run of equal ids, masked ones included, is a sequence and the advantages fit their number, the masked rows' ids
    count, too: a sequence may be masked as a whole. Else a masked row belongs to the sequence of the row before it. If all rows
    are masked, any number of advantages fits.
    """
    if sequence_ids.shape != shape or sequence_ids.device != device:
        raise ValueError(
            f"{where}: sequence_ids is {tuple(sequence_ids.shape)} on {sequence_ids.device}; "
            f"it needs {tuple(shape)} on {device}"
        )
    rows = torch.arange(shape[0], device=device)
    before = torch.where(live, rows, -1).cummax(0).values  # each row's last live row up to it, -1 before the first
    of_live = sequence_ids[torch.where(before < 0, live.to(torch.uint8).argmax(), before)]
    runs, counts = zip(*map(_runs, (sequence_ids, of_live)), strict=True)
    first = Transfer()  # shapes depend on the number of sequences
    asked, any_live = first.ask(torch.stack(counts)), first.ask(live.any())
    first.bring()
    num_all, num_distinct, num_live, num_live_distinct = map(int, asked.numbers)
    if not any_live.numbers[0] and num_advantages:
        return Sequences(torch.zeros_like(rows), num_advantages, False)
    if num_live != num_live_distinct:
        raise ValueError(
            f"{where}: sequence_ids return after another sequence; the rows of a sequence must be adjacent"
        )
    if num_all == num_distinct and not (num_advantages == num_live != num_all):
        return Sequences(runs[0], num_all, False)
    return Sequences(runs[1], num_live, False)


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's run of equal ids, counted from 0, and how many runs and how many distinct ids there are, (2,)."""
    starts, distinct = torch.ones(2, len(ids), dtype=torch.bool, device=ids.device)
    torch.ne(ids[1:], ids[:-1], out=starts[1:])
    ordered = ids.sort().values
    torch.ne(ordered[1:], ordered[:-1], out=distinct[1:])
    until = starts.cumsum(0)
    return until - 1, torch.stack([until[-1], distinct.sum()])


def _of_cu_seqlens(
    where: str, num_rows: int, device: torch.device, cu_seqlens: Tensor, transfer: Transfer
) -> Sequences:
    if cu_seqlens.is_meta:
        raise ValueError(f"{where}: cu_seqlens is on the meta device and holds no values")
    if cu_seqlens.dim() != 1:
        raise ValueError(f"{where}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; it needs (B + 1,)")
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
