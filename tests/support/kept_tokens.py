"""Rows with a few kept tokens, the exact logits of these, and the error that a float32 dot product may have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

COUNTS = {
    "no row": [],
    "no entry": [0, 0, 0],
    "one entry": [1],
    "empty rows at both ends": [0, 0, 5, 0, 1, 9, 0],
    "a prime number of entries": [13, 2, 0, 4, 1, 1, 16],
    "more entries than two blocks of any size": [300, 1, 230],
}
CHANNELS = [1, 3, 31, 32, 33, 64, 255, 256, 257, 520]
"""One; fewer than a vector; around one tile (32 in C++, 256 in Triton), two, and a rest."""


class Kept(NamedTuple):
    """The arguments of sparse_logits."""

    hidden: Tensor  # (n, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    counts: Tensor  # (n,) int64
    tokens: Tensor  # (m,) int32

    @property
    def rows(self) -> Tensor:
        """The row of each entry, (m,)."""
        return torch.arange(len(self.counts), device=self.counts.device).repeat_interleave(self.counts)

    def entries(self, chosen: Tensor) -> Kept:
        """Only the entries `chosen` (k,), increasing; all rows and tokens stay."""
        return self._replace(
            counts=torch.bincount(self.rows[chosen], minlength=len(self.counts)), tokens=self.tokens[chosen]
        )

    def on(self, device: torch.device) -> Kept:
        return Kept(*(None if part is None else part.to(device) for part in self))


def make_kept(
    counts: list[int], vocab: int, channels: int, dtype: torch.dtype, has_bias: bool = True, seed: int = 0
) -> Kept:
    """Distinct tokens in each row, in any order; half of them are frequent, so that rows share tokens."""
    g = torch.Generator().manual_seed(seed + channels)
    hidden, weight = (torch.randn(n, channels, generator=g).to(dtype) for n in (len(counts), vocab))
    chance = 1.0 / torch.arange(1, vocab + 1)
    tokens = [torch.multinomial(chance, count, generator=g) for count in counts if count]
    flat = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
    bias = torch.randn(vocab, generator=g).to(dtype) if has_bias else None
    return Kept(hidden, weight, bias, torch.tensor(counts, dtype=torch.int64), flat.int())


def assert_logits_are_right(x: Tensor, kept: Kept, roundings: int) -> None:
    """Assert that each logit's error is at most that of `roundings` float32 roundings in sequence.

    Each of them is at most 2^-24 of the sum of the terms' absolute values.
    """
    hidden, weight = kept.hidden[kept.rows].double(), kept.weight[kept.tokens.long()].double()
    bias = torch.zeros(len(x)) if kept.bias is None else kept.bias[kept.tokens.long()].double()
    exact, size = (hidden * weight).sum(1) + bias, (hidden * weight).abs().sum(1) + bias.abs()
    assert x.dtype == torch.float32 and x.shape == exact.shape
    error = (x.double() - exact).abs()
    assert (error <= roundings * 2.0**-24 * size).all(), f"{float((error / size).max() * 2**24)} roundings"
