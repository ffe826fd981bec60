"""Rows at the output head: their logits, what the loss needs of them, and their gradients.

x = h W' + bias;   dh = dx W;   dW += dx' h.   One N x V x D product each.

`Whole` computes a chunk's logits as one matrix; their gradient overwrites it. `Tiled` (tiled.py) has the same interface.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import memory
from ..dtypes import real
from ..objective import LossRows, Objective
from ..reference import HeadRows, LogitTransform, exp_coefficient, is_plain
from .plan import BLOCK_ROWS, Gradients, Needs, Operands
from .transfer import is_on_host

_WORTH_DROPPING = 0.95
"""Rows without a gradient are dropped from a chunk if fewer than this fraction have one; dropping copies the others."""


class Kept(NamedTuple):
    """What a forward pass keeps of a chunk for its backward pass."""

    tiles: list[Tensor]  # logits (n, width), or e^(logits - base) with 0 at the target
    bases: list[Tensor] | None  # (n,) float32 for each tile of exponentials; `Whole`: what head_exp returned
    rows: Tensor | None = None  # (n, D) of hidden; `Tiled` selects them again


class Sums:
    """The inputs, and the gradients of hidden, weight, bias and the logit noise; sums are in float32 or wider."""

    dweight: Tensor | None = None

    def __init__(self, operands: Operands, needs: Needs, num_parts: int) -> None:
        """num_parts: how often `backward` will be called (a single product is rounded once)."""
        self.hidden, self.weight, self.bias, self.plan = operands
        self.needs_dweight, self.num_parts = needs.weight, num_parts
        total = real(self.weight)
        self.dhidden = torch.zeros_like(self.hidden, dtype=gradient_dtype(self.hidden)) if needs.hidden else None
        self.dbias = torch.zeros_like(self.bias, dtype=total) if self.bias is not None and needs.bias else None
        sigma = self.plan.transform.sigma
        self.dsigma = torch.zeros_like(sigma) if sigma is not None and needs.log_sigma else None

    def gradients(self) -> Gradients:
        """Return the gradients; of sigma, not its logarithm. The caller rounds sums over several parts to the tensors' dtypes."""
        if self.needs_dweight and self.dweight is None:  # no row had a gradient
            self.dweight = torch.zeros_like(self.weight)
        return Gradients(self.dhidden, self.dweight, self.dbias, self.dsigma)


class Whole(Sums):
    """Logits of a chunk as one matrix (n, V)."""

    _room: Tensor | None = None  # for each chunk's logits in turn

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.hidden.dtype

    def parts(self, index: Tensor) -> Sequence[Tensor]:
        """Split rows whose logits are not kept into chunks; no chunk if there are no rows."""
        return index.split(self.plan.chunk_rows) if len(index) else ()

    def logprob(self, index: Tensor) -> HeadRows:
        return self.head_fwd(self.logits(index), self.plan.targets[index], self.plan.transform.rows(index))

    def keep(self, index: Tensor, has_dentropy: bool) -> tuple[HeadRows, Kept]:
        """Return log-probabilities of rows `index`, and what `backward` needs; has_dentropy: it will get an entropy gradient."""
        rows, targets, transform = self.hidden[index], self.plan.targets[index], self.plan.transform.rows(index)
        x = self._logits(rows)
        if self.plan.keeps_exponentials and is_plain(transform, x.dtype, has_dentropy):
            out, whole = self.plan.engine.head_exp(x, targets, transform)
            return out, Kept([x], [whole], rows)
        return self.head_fwd(x, targets, transform), Kept([x], None, rows)

    def token_loss(self, index: Tensor, rows: LossRows, objective: Objective) -> HeadRows:
        """Add the gradients of the token-level loss of rows `index`; one launch turns their logits into the loss's gradient."""
        hidden = self.hidden[index]
        x = self._logits(hidden)
        out, dsigma, c = self.plan.engine.head_token_loss(
            x, self.plan.targets[index], self.plan.transform.rows(index), rows, objective
        )
        self._add(index, hidden, x, c, dsigma)
        return out

    def backward(self, index: Tensor, kept: Kept | None, out: HeadRows, dlogp: Tensor, dentropy: Tensor | None) -> None:
        """Add the gradients of rows `index` from their logits (None: recomputed); the CPU drops rows without a gradient."""
        rows = self.hidden[index] if kept is None or kept.rows is None else kept.rows
        x = self._logits(rows) if kept is None else kept.tiles.pop()
        whole = None if kept is None or kept.bases is None else kept.bases[0]
        if is_on_host(x):  # on a device the count would make the host wait
            keep = graded_rows(dlogp, dentropy)
            if len(keep) < _WORTH_DROPPING * len(x):
                x, rows, index, dlogp = x.index_select(0, keep), rows[keep], index[keep], dlogp[keep]
                out, dentropy = HeadRows(*(v[keep] for v in out)), None if dentropy is None else dentropy[keep]
                whole = None if whole is None else whole[keep]
        if len(index) == 0:
            return
        transform, c = self.plan.transform.rows(index), None
        if whole is not None:
            self._add(index, rows, x, exp_coefficient(dlogp, transform, whole), None)
            return
        if x.dtype == torch.float16:
            c = _units(dlogp, dentropy, transform)
            dlogp, dentropy = dlogp / c, None if dentropy is None else dentropy / c
        dsigma = self._head_bwd(x, self.plan.targets[index], transform, out, dlogp, dentropy)
        self._add(index, rows, x, c, dsigma if c is None or dsigma is None else dsigma * c[0])

    def head_fwd(self, x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows:
        """As reference.head_fwd, for whole rows even if this rank holds only some of their columns."""
        engine, shard = self.plan.engine, self.plan.shard
        return (
            engine.head_fwd(x, targets, transform) if shard is None else shard.head_fwd(engine, x, targets, transform)
        )

    def logits(self, index: Tensor) -> Tensor:
        """The logits of rows `index`, (n, V), until the next call."""
        return self._logits(self.hidden[index])

    def _head_bwd(
        self,
        x: Tensor,
        targets: Tensor,
        transform: LogitTransform,
        rows: HeadRows,
        dlogp: Tensor,
        dentropy: Tensor | None,
    ) -> Tensor | None:
        engine, shard = self.plan.engine, self.plan.shard
        if shard is not None:
            shard.head_bwd(engine, x, targets, transform, rows, dlogp, dentropy)
            return None
        return engine.head_bwd(x, targets, transform, rows, dlogp, dentropy)

    def _logits(self, rows: Tensor) -> Tensor:
        """Compute the logits of rows of hidden, in the memory of the previous chunk's."""
        x = self._empty_logits(rows)
        if self.bias is None:
            return torch.mm(rows, self.weight.t(), out=x)
        return torch.addmm(self.bias, rows, self.weight.t(), out=x)

    def _empty_logits(self, rows: Tensor) -> Tensor:
        """Memory for the logits of `rows`, in their dtype; the previous chunk's if it fits."""
        vocab = len(self.weight)
        size = len(rows) if is_on_host(rows) else -(-len(rows) // BLOCK_ROWS) * BLOCK_ROWS
        if self._room is None or len(self._room) < len(rows) * vocab:
            self._room = None  # free it before the next is allocated
            self._room = memory.empty(min(size, max(len(rows), self.plan.chunk_rows)) * vocab, like=rows)
        return self._room[: len(rows) * vocab].view(len(rows), vocab)

    def _add(self, index: Tensor, rows: Tensor, dx: Tensor, c: Tensor | None, dsigma: Tensor | None) -> None:
        """Add the contribution of rows `index`, given the gradient of their logits: dx, or c dx with one coefficient per row."""
        if self.dhidden is not None:
            product = self._times_weight(dx, c is not None)
            self.dhidden[index] = (
                product.to(self.dhidden.dtype) if c is None else scaled(product, c, self.dhidden.dtype)
            )
        if self.needs_dweight:
            self._add_weight(dx.t(), rows, c)
        if self.dbias is not None:
            self.dbias += dx.sum(dim=0, dtype=self.dbias.dtype) if c is None else _summed(dx, c)
        if self.dsigma is not None and dsigma is not None:
            self.dsigma += dsigma

    def _times_weight(self, dx: Tensor, is_scaled: bool) -> Tensor:
        """dx W (n, D); is_scaled: rows will still be scaled, so a float32 product is not rounded yet."""
        return _product(dx, self.weight) if is_scaled else dx @ self.weight

    def _add_weight(self, a: Tensor, rows: Tensor, c: Tensor | None) -> None:
        """dW += a @ (c rows). A single product is rounded once whatever its dtype; several are added in float32 or wider.

        float16 products are always added in float32: their sum may leave float16's range where dW does not.
        """
        if a.dtype == torch.float16:
            if self.dweight is None:
                self.dweight = torch.zeros_like(self.weight, dtype=torch.float32)
            assert c is not None
            _add_scaled_product(self.dweight, a, rows, c)
            return
        b, is_exact = rows if c is None else scaled(rows, c, rows.dtype), a.dtype in (torch.float32, torch.float64)
        if self.dweight is None and (is_exact or self.num_parts == 1):
            self.dweight = a @ b
        elif is_exact:
            assert self.dweight is not None
            self.dweight.addmm_(a, b)
        elif self.dweight is None and _has_mixed_products(a):
            self.dweight = torch.mm(a, b, out_dtype=torch.float32)
        else:
            if self.dweight is None:
                self.dweight = torch.zeros_like(self.weight, dtype=torch.float32)
            _add_product(self.dweight, a, b)


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which gradients of `tensor` are formed: float32 for float16, whose range is small, else its own."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


_UNIT_BITS, _SMALLEST_UNIT = 7, -126  # exponents of 2


def _units(dlogp: Tensor, dentropy: Tensor | None, transform: LogitTransform) -> Tensor:
    """Return each row's unit for its logits' gradient in float16, (n,): a power of two.

    Divided by it, the row's largest possible gradient at one logit is in [64, 128): small probabilities do not underflow, and
    sums over the vocabulary do not overflow. Noise on the logits has one gradient for all rows, so they share a unit.
    """
    size = dlogp.abs() if dentropy is None else torch.maximum(dlogp.abs(), dentropy.abs())
    size = size * abs(transform.logit_scale)
    if transform.temperature is not None:
        size = size / transform.temperature
    if transform.sigma is not None:
        size = size.amax().expand(len(size))
    # a row without a gradient has the smallest unit, so that it does not set the largest
    exponent = torch.where(size == 0, _SMALLEST_UNIT, torch.frexp(size).exponent - _UNIT_BITS).clamp(min=_SMALLEST_UNIT)
    return torch.ldexp(torch.ones_like(size), exponent)


def _has_mixed_products(a: Tensor) -> bool:
    """Whether PyTorch multiplies 16-bit matrices on a's device into a float32 one."""
    return a.is_cuda and torch.version.hip is None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b; in float32 for float16, whose range a sum may leave, and for bfloat16 where PyTorch multiplies so.

    Elsewhere bfloat16 stays in 16 bits: products of widened matrices would be far slower.
    """
    if a.itemsize == 2 and _has_mixed_products(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype != torch.float16:
        return a @ b
    total = a.new_zeros(len(a), b.shape[1], dtype=torch.float32)
    for start in range(0, len(b), 16384):  # a block at a time: widened copies take memory
        total.addmm_(a[:, start : start + 16384].float(), b[start : start + 16384].float())
    return total


def scaled(rows: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Return c * rows, rounded once to `dtype`."""
    return torch.mul(rows, c[:, None], out=torch.empty_like(rows, dtype=dtype))


def _summed(e: Tensor, c: Tensor) -> Tensor:
    """sum_n c_n e_n, (V,) float32 or wider."""
    if e.itemsize > 2:
        return c @ e
    if e.dtype == torch.float16:  # c may be below its range
        largest = c.amax()
        return _summed_parts(e, c / largest) * largest
    return _summed_parts(e, c)


def _summed_parts(e: Tensor, c: Tensor) -> Tensor:
    high = c.to(e.dtype)
    middle = (c - high).to(e.dtype)
    low = (c - high - middle).to(e.dtype)  # the three sum to c
    sums = torch.zeros(e.shape[1], 3, dtype=torch.float32, device=e.device)
    _add_product(sums, e.t(), torch.stack([high, middle, low], dim=1))
    return sums.sum(dim=1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (float32) += a @ b of 16-bit matrices."""
    if _has_mixed_products(a) and _adds_mixed_products(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return
    for start in range(0, len(a), 16384):  # a block of rows at a time: widened copies take memory
        block = slice(start, start + 16384)
        if _has_mixed_products(a):
            total[block] += torch.mm(a[block], b, out_dtype=torch.float32)
        else:
            total[block].addmm_(a[block].float(), b.float())


def _add_scaled_product(total: Tensor, a: Tensor, rows: Tensor, c: Tensor) -> None:
    """total (float32) += a @ (c rows) of float16 matrices; c (n,) float32: powers of two, which change no digit of a row."""
    is_mixed, largest = _has_mixed_products(a), c.amax()
    b = scaled(rows, c / largest, rows.dtype) if is_mixed else scaled(rows, c, total.dtype)
    for start in range(0, len(a), 16384):
        block = slice(start, start + 16384)
        if is_mixed:
            total[block].addcmul_(torch.mm(a[block], b, out_dtype=torch.float32), largest)
        else:
            total[block].addmm_(a[block].float(), b)


@functools.cache
def _adds_mixed_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of 16-bit matrices to a float32 one in place; tested once.

    PyTorch 2.8 refuses to add to a float32 matrix, or overwrites it (pytorch/pytorch issue 154086, fixed by 167931).
    """
    total, one = torch.ones(16, 16, device=device), torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def graded_rows(dlogp: Tensor, dentropy: Tensor | None) -> Tensor:
    """Return the rows with a nonzero gradient, (m,) int64; NaN counts as nonzero."""
    return (dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)).nonzero().squeeze(1)


def room_for(room: Tensor | None, like: Tensor, size: int) -> Tensor:
    """Return `room` if it has at least `size` elements, else new memory of that size."""
    return room if room is not None and len(room) >= size else memory.empty(size, like=like)
