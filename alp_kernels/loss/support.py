"""The support of truncated sampling: the tokens that the sampler kept in each row, ragged.

Top-k, top-p and min-p keep some tokens S of a row and renormalise: the sampler's log-probability of token a is
z_a - ln sum_{v in S} e^z_v. The policy's must be over the same S, or every ratio is too small by the probability of S.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_device, check_integer, check_local, refuse_type, refuse_value

_WHERE = "Support"
_INTEGERS = (torch.int64, torch.int32)


class Support(NamedTuple):
    """The tokens that the sampler kept, row by row: log-probabilities and entropies are over these alone.

    Row n keeps tokens[offsets[n] : offsets[n + 1]], in any order, each once. Rows are those of the targets, flattened; a row off
    the mask may have any tokens, or none. vLLM's reply has this form: Support(token_ids, offsets), as tensors.
    """

    tokens: Tensor  # (M,) int64 or int32: the tokens of row 0, then of row 1, ...
    offsets: Tensor  # (N + 1,) int64 or int32, from 0 to M

    @property
    def counts(self) -> Tensor:
        """Each row's number of tokens, (N,)."""
        return self.offsets.diff()

    @staticmethod
    def from_lists(rows: Iterable[Sequence[int]], device: torch.device | str | None = None) -> Support:
        """Make a support of one list of token ids per row; an empty list: the row has none."""
        place = torch.device("cpu") if device is None else check_device(_WHERE, "device", device)
        fits = "lists of token ids >= 0, one for each row"
        try:
            lists = [list(row) for row in rows]
            flat = [token for row in lists for token in row]
            tokens = torch.tensor(flat, dtype=None if flat else torch.int64)
        except (TypeError, ValueError, RuntimeError):
            refuse_type(_WHERE, "rows", rows, fits)
        if tokens.dtype not in _INTEGERS or tokens.dim() != 1:
            refuse_type(_WHERE, "rows", rows, fits)
        tokens = tokens.long()
        if len(tokens) and int(tokens.min()) < 0:
            refuse_value(_WHERE, "rows", rows, fits)
        return _of_counts(tokens, torch.tensor([len(row) for row in lists], dtype=torch.int64)).to(place)

    @staticmethod
    def from_padded(tokens: Tensor) -> Support:
        """Make a support of tokens (..., K) integers, where a negative one is padding; the leading dimensions are the rows."""
        _check_ids(_WHERE, "tokens", tokens)
        if tokens.dim() < 2:
            refuse_value(_WHERE, "tokens", tokens, "a shape (..., K) with at least one row")
        rows = tokens.flatten(0, -2)
        is_kept = rows >= 0
        return _of_counts(rows[is_kept], is_kept.sum(dim=1))

    @staticmethod
    def from_mask(kept: Tensor) -> Support:
        """Make a support of kept (..., V) bool; the leading dimensions are the rows."""
        check_local(_WHERE, "kept", kept)
        if kept.dtype != torch.bool or kept.dim() < 2:
            refuse_value(_WHERE, "kept", kept, "torch.bool (..., V) with at least one row")
        rows = kept.flatten(0, -2)
        return _of_counts(rows.nonzero()[:, 1], rows.sum(dim=1))

    @staticmethod
    def cat(parts: Iterable[Support]) -> Support:
        """The rows of the parts, one part after another, as in a packed batch."""
        fits = "Supports, at least one"
        if not isinstance(parts, Iterable):
            refuse_type(_WHERE, "parts", parts, fits)
        parts = list(parts)
        if not parts or not all(isinstance(part, Support) for part in parts):
            refuse_type(_WHERE, "parts", parts, fits)
        for part in parts:
            part.check(_WHERE)
        return _of_counts(torch.cat([part.tokens for part in parts]), torch.cat([part.counts for part in parts]))

    def pad_to(self, length: int) -> Support:
        """Append rows without tokens, up to `length` rows, as in a padded batch."""
        rows = len(self.check(_WHERE).offsets) - 1
        length = check_integer(_WHERE, "length", length, rows, fits=f"an int >= the support's {rows} rows")
        return self._replace(offsets=torch.cat([self.offsets, self.offsets[-1:].expand(length - rows)]))

    def select(self, index: Tensor | slice) -> Support:
        """The rows `index`, (n,) integers or (N,) bool, in that order; waits for the device."""
        counts = self.check(_WHERE).counts[index]
        if counts.dim() != 1:
            refuse_value(_WHERE, "index", index, "(n,) integers, (N,) bool or a slice")
        return _of_counts(spans(self.tokens, self.offsets[:-1][index], counts, int(counts.sum())), counts)

    def to(self, device: torch.device | str) -> Support:
        return Support(self.tokens.to(device), self.offsets.to(device))

    def fingerprint(self, live: Tensor | None, device: torch.device) -> Tensor:
        """A number (), float64, the same on ranks whose rows `live` (N,) bool keep the same tokens; None: all rows."""
        tokens, offsets = (x.to(device, torch.int64) for x in self)
        row = torch.searchsorted(offsets[1:].contiguous(), torch.arange(len(tokens), device=device), right=True)
        weight = row % 1009 + 1
        if live is not None:  # the number of rows is checked later, on every rank
            weight = weight * live[row.clamp(max=len(live) - 1)]
        return ((tokens.double() + 1) * weight).sum()

    def check(self, where: str) -> Support:
        """Check types and shapes, not values. Returns itself."""
        for name, value in self._asdict().items():
            _check_ids(where, f"support.{name}", value)
            if value.dim() != 1:
                refuse_value(where, f"support.{name}", value, "one dimension")
        if len(self.offsets) == 0:
            refuse_value(where, "support.offsets", self.offsets, "(N + 1,) integers for N rows")
        return self


def _check_ids(where: str, name: str, value: object) -> None:
    tensor = check_local(where, name, value)
    if tensor.dtype not in _INTEGERS:
        refuse_type(where, name, tensor, "torch.int64 or torch.int32")
    if tensor.is_meta:
        raise ValueError(f"{where}: {name} is on the meta device and holds no values")


def _of_counts(tokens: Tensor, counts: Tensor) -> Support:
    return Support(tokens, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def spans(values: Tensor, starts: Tensor, counts: Tensor, total: int) -> Tensor:
    """values[starts[i] : starts[i] + counts[i]] for each i, one after another, (total,)."""
    before = counts.cumsum(0) - counts
    shift = (starts - before).repeat_interleave(counts, output_size=total)
    return values[shift + torch.arange(total, device=values.device)]
