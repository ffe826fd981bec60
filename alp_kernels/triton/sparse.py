"""Single logits of each row (reference.sparse_logits), and the two products of a sparse gradient of logits (sparse_products).

    x_e = h_row(e) . w_token(e) + bias_token(e), entries e row after row

A program computes the logits of LOGITS_E consecutive entries, whatever their rows: it gathers LOGITS_D channels of their rows of
h and w at a time, and has a sum for each of these channels. A logit's bits depend on its two rows and D alone.

    dh_n = sum_e value_e w_token(e), over the entries e of row n      dw_v = sum_e value_e h_row(e), over those of token v

A program sums one row's or one token's entries for BLOCK_D channels: it gathers BLOCK_E rows at a time and keeps the sum in
registers, so every sum has a fixed order. Consecutive programs share their channels, whose part of the gathered matrix then
stays in cache. For dw the entries are sorted by token first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import SparseRows
from .noise import on_device
from .rounding import round_nearest, widen

BLOCK_E = 8
BLOCK_D = 256
"""Channels of one warp: eight for each thread, a 128-bit load of a 16-bit dtype."""
TOKENS = 8
"""Tokens of one program; most have no entry, and a program for each would cost more than its zeros."""
LOGITS_E, LOGITS_D = 4, 256
"""Entries of one warp, and channels at a time: a float32 sum for each takes 32 registers."""


@triton.jit
def _gathered_sum(
    begin, end, index_ptr, values_ptr, matrix_ptr, d, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums over entries e in [begin, end): value_e times channels d of the matrix's row index_e, and value_e.

    matrix_ptr None: the first sum is 0. An entry of value 0 reads no row.
    """
    total = tl.zeros([BLOCK_D], tl.float32)
    values = tl.zeros([BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        value = tl.load(values_ptr + e, mask=e < end, other=0.0)
        values += value
        if matrix_ptr is not None:
            index = tl.load(index_ptr + e, mask=e < end, other=0).to(tl.int64)
            is_live = (value != 0.0)[:, None] & (d < D)[None, :]
            rows = tl.load(matrix_ptr + (index * D)[:, None] + d[None, :], mask=is_live, other=0.0)
            total += tl.sum(value[:, None] * widen(rows), axis=0)
    return total, tl.sum(values, axis=0)


@triton.jit
def _dhidden_kernel(
    ends_ptr, tokens_ptr, values_ptr,  # (n,) int64, (m,) int32, (m,) float32
    weight_ptr, dhidden_ptr,  # (V, D), (n, D) float32
    D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(ends_ptr + n - 1, mask=n > 0, other=0)
    total, _ = _gathered_sum(begin, tl.load(ends_ptr + n), tokens_ptr, values_ptr, weight_ptr, d, D, BLOCK_E, BLOCK_D)
    tl.store(dhidden_ptr + n * D + d, total, mask=d < D)


@triton.jit
def _dweight_kernel(
    begins_ptr, rows_ptr, values_ptr,  # (V + 1,) int64, (m,) int32, (m,) float32, sorted by token
    hidden_ptr, dweight_ptr, dbias_ptr,  # (n, D), (V, D), (V,) float32; the first two, or the third, None
    V, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for k in range(TOKENS):
        v = first + k
        if v < V:
            begin, end = tl.load(begins_ptr + v), tl.load(begins_ptr + v + 1)
            total, values = _gathered_sum(begin, end, rows_ptr, values_ptr, hidden_ptr, d, D, BLOCK_E, BLOCK_D)
            if dweight_ptr is not None:
                tl.store(dweight_ptr + v * D + d, round_nearest(total, dweight_ptr.dtype.element_ty), mask=d < D)
            if dbias_ptr is not None and tl.program_id(1) == 0:
                tl.store(dbias_ptr + v, values)


@triton.jit(do_not_specialize=["m"])
def _logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr,  # (n, D), (V, D), (V,) or None
    rows_ptr, tokens_ptr, x_ptr,  # (m,) int32, (m,) int32, (m,) float32
    m, D,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_entry = e < m
    row = tl.load(rows_ptr + e, mask=is_entry, other=0).to(tl.int64)
    token = tl.load(tokens_ptr + e, mask=is_entry, other=0).to(tl.int64)
    sums = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_live = is_entry[:, None] & (d < D)[None, :]
        h = tl.load(hidden_ptr + (row * D)[:, None] + d[None, :], mask=is_live, other=0.0)
        w = tl.load(weight_ptr + (token * D)[:, None] + d[None, :], mask=is_live, other=0.0)
        sums += widen(h) * widen(w)
    x = tl.sum(sums, axis=1)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + token, mask=is_entry, other=0.0).to(tl.float32)
    tl.store(x_ptr + e, x, mask=is_entry)


def sparse_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, tokens: Tensor) -> Tensor:
    """The logits of each row's tokens, row after row (reference.sparse_logits). float64 uses the reference."""
    if weight.dtype == torch.float64:
        return reference.sparse_logits(hidden, weight, bias, counts, tokens)
    total = len(tokens)
    x = torch.empty(total, dtype=torch.float32, device=hidden.device)
    if total:
        rows = _rows_of(counts, total)
        with on_device(hidden):
            _logits_kernel[(triton.cdiv(total, LOGITS_E),)](
                hidden, weight, bias, rows, tokens, x, total, hidden.shape[1], LOGITS_E, LOGITS_D, num_warps=1
            )
    return x


def _rows_of(counts: Tensor, total: int) -> Tensor:
    """The row of each of `total` entries, int32."""
    row = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    return row.repeat_interleave(counts, output_size=total)


def sparse_products(
    dx: SparseRows, hidden: Tensor, weight: Tensor, needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh = dx W, dW = dx' h, dbias = dx' 1; None if not needed (reference.sparse_products). float64 uses the reference."""
    if weight.dtype == torch.float64:
        return reference.sparse_products(dx, hidden, weight, needs_dhidden, needs_dweight, needs_dbias)
    dhidden = dweight = dbias = None
    num_rows, channels = hidden.shape
    vocabulary, blocks = len(weight), triton.cdiv(channels, BLOCK_D)
    if needs_dhidden:
        dhidden = torch.empty(num_rows, channels, dtype=torch.float32, device=hidden.device)
        if num_rows:
            with on_device(hidden):
                _dhidden_kernel[num_rows, blocks](
                    dx.counts.cumsum(0), dx.tokens, dx.values, weight, dhidden, channels, BLOCK_E, BLOCK_D, num_warps=1
                )
    if needs_dweight or needs_dbias:
        begins, rows, values = _by_token(dx, vocabulary)
        if needs_dweight:
            kind = torch.float32 if weight.dtype == torch.float16 else weight.dtype
            dweight = torch.empty(vocabulary, channels, dtype=kind, device=hidden.device)
        if needs_dbias:
            dbias = torch.empty(vocabulary, dtype=torch.float32, device=hidden.device)
        with on_device(hidden):
            _dweight_kernel[triton.cdiv(vocabulary, TOKENS), blocks if needs_dweight else 1](
                begins, rows, values, hidden if needs_dweight else None, dweight, dbias,
                vocabulary, channels, BLOCK_E, BLOCK_D, TOKENS, num_warps=1,
            )  # fmt: skip
    return dhidden, dweight, dbias


def _by_token(dx: SparseRows, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries sorted by token, then by row: where each token's begin (V + 1,) int64, rows (m,) int32, values (m,)."""
    tokens, order = dx.tokens.sort(stable=True)
    every = torch.arange(vocabulary + 1, dtype=tokens.dtype, device=tokens.device)
    return torch.searchsorted(tokens, every), _rows_of(dx.counts, len(tokens))[order], dx.values[order]
