"""The sampled backward in C++: the choice of a row's tokens, and the two sparse products."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from .. import reference
from ..reference import Entries, HeadRows, LogitTransform, Points, SparseRows
from . import library as c
from .arguments import DTYPES, at, floats, row_ids_of, stream_argument, vector
from .head import HeadArguments


def select(x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, points: Points) -> Entries:
    """Choose the tokens of each row of logits x (n, V) that get a gradient: see reference.select."""
    if x.dtype == torch.float64:
        return reference.select(x, targets, transform, rows, points)
    return _head_select(x, targets, transform, points, rows)[1]


def head_select(x: Tensor, targets: Tensor, transform: LogitTransform, points: Points) -> tuple[HeadRows, Entries]:
    """head_fwd and select of each row while it is in cache; select reads only the blocks of tokens that have an entry."""
    if x.dtype == torch.float64:
        return reference.head_select(x, targets, transform, points)
    return _head_select(x, targets, transform, points, None)


def _head_select(
    x: Tensor, targets: Tensor, transform: LogitTransform, points: Points, rows: HeadRows | None
) -> tuple[HeadRows, Entries]:
    """rows: of a vocabulary of which x is a part; None: x's own."""
    (num_rows, vocab), args = x.shape, HeadArguments(x, targets, transform)
    room, pieces = reference.room_for_entries(points, vocab), -(-vocab // reference.MASS_BLOCK)
    out = HeadRows(floats(num_rows), floats(num_rows), floats(num_rows))
    sums, bases = floats(num_rows, pieces), floats(num_rows, pieces)
    logp, lse = (vector(v, torch.float32, num_rows) for v in (rows or out)[::2])
    tokens, p = torch.empty(num_rows, room, dtype=torch.int32, device="cpu"), floats(num_rows, room)
    counts = torch.empty(num_rows, dtype=torch.int64, device="cpu")
    row_ids = row_ids_of(points.stream, num_rows)
    forward = c.HeadFwd(*map(at, out), None, None, at(sums), at(bases), pieces)
    chosen = c.Select(*map(at, (logp, lse, sums, bases, tokens, p, counts)), room, pieces, points.first, points.bits)
    c.library.alp_head_select(
        byref(stream_argument(points.stream, row_ids)),
        byref(args.head),
        byref(forward),
        byref(chosen),
        num_rows,
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    total = reference.check_entries(counts, room)
    packed = Entries(counts, torch.empty(total, dtype=torch.int32, device="cpu"), floats(total))
    c.library.alp_pack(byref(chosen), at(packed.tokens), at(packed.p), num_rows)
    return out, packed


def sparse_products(
    dx: SparseRows, hidden: Tensor, weight: Tensor, needs_dhidden: bool, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dh, dW and dbias of a sparse gradient of the logits: see reference.sparse_products. A row of `weight` is read once."""
    if weight.dtype == torch.float64:
        return reference.sparse_products(dx, hidden, weight, needs_dhidden, needs_dweight, needs_dbias)
    (num_rows, channels), vocab, total = hidden.shape, len(weight), len(dx.tokens)
    hidden, weight, values = hidden.contiguous(), weight.contiguous(), dx.values.to(torch.float32)
    starts = torch.empty(vocab + 1, dtype=torch.int64, device="cpu")
    rows, sorted_values = torch.empty(total, dtype=torch.int32, device="cpu"), floats(total)
    c.library.alp_by_token(
        *map(at, (dx.counts, dx.tokens, values)), num_rows, vocab, *map(at, (starts, rows, sorted_values))
    )
    dhidden = torch.zeros(num_rows, channels, dtype=torch.float32, device="cpu") if needs_dhidden else None
    dweight = dbias = None
    if needs_dweight:
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        dweight = torch.empty(vocab, channels, dtype=dtype, device="cpu")
    if dhidden is not None or dweight is not None:
        sizes = (num_rows, vocab, channels)
        args = c.Sparse(*map(at, (starts, rows, sorted_values, hidden, weight, dhidden, dweight)), *sizes)
        c.library.alp_sparse_products(byref(args), DTYPES[weight.dtype], torch.get_num_threads())
    if needs_dbias:
        dbias = torch.zeros(vocab, dtype=torch.float32, device="cpu").index_add_(0, dx.tokens, values)
    return dhidden, dweight, dbias
