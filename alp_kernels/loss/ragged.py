"""Check a support against its batch, and sort its rows for the head over a support (supported.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import hint_at_mask
from .support import Support
from .transfer import Asked, Transfer, is_on_host

_NARROWEST, _WIDEST = 4, 31  # exponents of 2 of the rows' widths


class Ragged(NamedTuple):
    """A checked support of all N rows, on the hidden states' device."""

    tokens: Tensor  # (M,) int32, ascending within a row
    starts: Tensor  # (N,) int64, and so are counts and places
    counts: Tensor
    places: Tensor  # the target's place among its row's tokens
    order: Tensor  # (N,) rows by width, those off the mask first
    sizes: Asked  # how many rows have which width 2^e; those off the mask: e = 0
    total: Asked  # tokens of the rows in the mask


def check_support(
    where: str, support: Support, targets: Tensor, live: Tensor | None, vocab: int, transfer: Transfer
) -> Ragged:
    """Check the values, in `transfer`, and sort each row's tokens.

    targets: (N,); live: (N,) bool, the rows in the mask; None: all.
    """
    device, num_rows = targets.device, len(targets)
    if len(support.offsets) != num_rows + 1:
        raise ValueError(
            f"{where}: support.offsets has shape {tuple(support.offsets.shape)}; {num_rows} targets need ({num_rows + 1},)"
        )
    tokens, offsets = (x.to(device, torch.int64, non_blocking=True) for x in support)
    live = torch.ones_like(targets, dtype=torch.bool) if live is None else live
    ends = torch.stack([offsets[0], offsets[-1], offsets.diff().amin()]) if num_rows else offsets.new_zeros(3)
    # searchsorted gives a row to every token, whatever the offsets hold
    entry = torch.arange(len(tokens), device=device)
    row = torch.searchsorted(offsets[1:].contiguous(), entry, right=True).clamp(max=num_rows - 1)
    counted = torch.where(live[row], tokens, 0)
    key = (row << 32) | tokens.clamp(0, (1 << 31) - 1)
    if not is_on_host(key) or not bool((key[1:] > key[:-1]).all()):
        key = key.sort().values
    repeated = ((key[1:] == key[:-1]) & live[row[1:]]).sum()
    wanted = (torch.arange(num_rows, device=device) << 32) | targets
    at = torch.searchsorted(key, wanted)
    has_target = key[at.clamp(max=max(len(key) - 1, 0))] == wanted if len(key) else torch.zeros_like(live)
    missing = live & ~has_target
    counts = offsets.diff().clamp(0, len(tokens))  # as right offsets have it; the others are refused below
    width = torch.frexp((counts - 1).clamp(min=0).double()).exponent.clamp(min=_NARROWEST)
    width = torch.where(live, width, 0).long()
    sizes = torch.zeros(_WIDEST + 1, dtype=torch.int64, device=device).scatter_add_(0, width, torch.ones_like(width))
    span = torch.stack([counted.min(), counted.max()]) if len(tokens) else tokens.new_zeros(2)
    asked = transfer.ask(torch.cat([ends, span, torch.stack([repeated, missing.sum(), missing.long().argmax()])]))
    ragged = Ragged(
        (key & 0xFFFFFFFF).int(), offsets[:-1].clone(), counts, at - offsets[:-1], width.argsort(stable=True),
        transfer.ask(sizes), transfer.ask(torch.where(live, counts, 0).sum()),
    )  # fmt: skip

    def check() -> None:
        first, last, least, low, high, num_repeated, num_missing, where_first = map(int, asked.numbers)
        if first != 0 or last != len(tokens) or least < 0:
            raise ValueError(
                f"{where}: support.offsets run from {first} to {last}, smallest step {least}; {len(tokens)} tokens need "
                f"offsets from 0 to {len(tokens)} that never fall"
            )
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{where}: support.tokens range from {low} to {high}; the vocabulary is [0, {vocab})"
                + hint_at_mask(low)
            )
        if num_repeated:
            raise ValueError(f"{where}: support holds {num_repeated} tokens twice in one row; it needs each once")
        if num_missing:
            token, count = int(targets[where_first]), int(counts[where_first])
            raise ValueError(
                f"{where}: {num_missing} targets are not in their row's support, first row {where_first}: token {token}, "
                f"{count} kept tokens. The sampler drew each token from those that it kept: rows of targets and support may "
                "not be aligned, or tokens that were not sampled (a tool's output, padding) are in the mask"
            )

    transfer.check(check)
    return ragged
