"""A float32 head over 16-bit hidden states: products of the weight's rows, widened to float32 a chunk of them at a time.

Widening is exact, so logits, dh and dW are those of float32 copies of hidden and weight; dh and dW are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import memory
from .plan import Needs, Operands
from .products import Whole, scaled

WIDENED_BYTES = 64 << 20
"""Memory for the widened rows of the weight. At D 4096 they are 4096 tokens, enough for whole waves of a device's tiles."""


class Widened(Whole):
    """Float32 logits (n, V) of 16-bit hidden and weight."""

    _wide: Tensor | None = None  # for each chunk of the weight's rows in turn, (tokens, D) float32

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32

    def _logits(self, rows: Tensor) -> Tensor:
        rows = rows.float()
        x = self._empty_logits(rows)
        for chunk, weight in self._weights():
            if self.bias is None:
                torch.mm(rows, weight.t(), out=x[:, chunk])
            else:
                torch.addmm(self.bias[chunk].float(), rows, weight.t(), out=x[:, chunk])
        return x

    def _times_weight(self, dx: Tensor, is_scaled: bool) -> Tensor:
        total = dx.new_zeros(len(dx), self.weight.shape[1])
        for chunk, weight in self._weights():
            total.addmm_(dx[:, chunk], weight)
        return total

    def _add_weight(self, a: Tensor, rows: Tensor, c: Tensor | None) -> None:
        """dW += a @ (c rows): in float32, or at once in bfloat16 if it is a single product."""
        b = rows.float() if c is None else scaled(rows, c, torch.float32)
        if self.num_parts == 1 and self.weight.dtype == torch.bfloat16:
            self.dweight = memory.empty(*self.weight.shape, like=self.weight)
            for chunk, product in self._rooms():
                self.dweight[chunk] = torch.mm(a[chunk], b, out=product)
            return
        if self.dweight is None:
            self.dweight = torch.zeros_like(self.weight, dtype=torch.float32)
        self.dweight.addmm_(a, b)

    def _weights(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight's rows chunk by chunk, widened; each until the next."""
        for chunk, room in self._rooms():
            yield chunk, room.copy_(self.weight[chunk])

    def _rooms(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows of the weight form a chunk, and float32 memory for them, which all chunks share."""
        vocab, channels = self.weight.shape
        size = min(vocab, max(1, WIDENED_BYTES // (4 * channels)))
        if self._wide is None:
            self._wide = memory.empty(size, channels, like=self.weight, dtype=torch.float32)
        for start in range(0, vocab, size):
            stop = min(start + size, vocab)
            yield slice(start, stop), self._wide[: stop - start]


def whole(operands: Operands, needs: Needs, num_parts: int) -> Whole:
    """Whole or Widened, for one pass over the rows."""
    return (Widened if operands.plan.widens(operands.weight.dtype) else Whole)(operands, needs, num_parts)
