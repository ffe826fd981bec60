"""Chooses the tokens that stand for each row's softmax (reference.select).   A program owns one row and reads it once.

    p_v = 2^(z_v log2 e - base)      S_b = sum of the small p_v of block b      M_b = S_b 2^40 rounded to an integer
    end_b = M_0 + ... + M_b          point i lies in [i, i + 1) tau and hits the block with end_b - M_b <= point < end_b

A tile is a few blocks, in the vocabulary's order. Its sums alone tell whether it can have an entry: a kept token makes its
block's sum tau or more. The other tiles cost no comparison at each logit. Derivation: docs/math.md, section 5
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import (
    MASS_BITS,
    MASS_BLOCK,
    Entries,
    HeadRows,
    LogitTransform,
    Points,
    check_entries,
    room_for_entries,
)
from .head import LOG2E, _capped, _contiguous, _exp2, _row_settings, head_fwd
from .noise import STREAM_ARGS, multiprocessors, on_device, stream_args, stream_words
from .rounding import widen

UNITS = tl.constexpr(2.0**MASS_BITS)
BLOCK = tl.constexpr(MASS_BLOCK)
ONE_BITS = tl.constexpr(MASS_BITS)

LOGITS_A_THREAD = 16
WARPS_A_MULTIPROCESSOR = 16
"""So many warps keep 16 KiB of loads in flight. Fewer rows get two or four warps each."""
PACK_BLOCK = 128


# ------------------------------------------------------------------ one row
# Kernels pass two tuples to helpers:
#   head   = (gain, inner, softcap or None, base, lost): p = 2^(gain y - base) lost with y = x, or tanh(inner x)
#   stream = (first, row, seed_lo, seed_hi, step, layer); row: the row's global id, first: number of its first interval


@triton.jit
def _powers(x, head):
    """p / lost of logits x, float32."""
    gain, _, _, base, _ = head
    return _exp2(tl.fma(_capped(widen(x), head), gain, -base))


@triton.jit
def _probabilities(x, head):
    """p of logits x, float32."""
    return _powers(x, head) * head[4]


@triton.jit
def _base(lse):
    """lse log2 e in float32, and 2^(its rounding error), for lse in float64."""
    exact = lse * LOG2E
    base = tl.cast(exact, tl.float32)
    return base, _exp2(tl.cast(tl.cast(base, tl.float64) - exact, tl.float32))


@triton.jit
def _masses(sums):
    """Blocks' sums as integers, in units of 2^-40: int64, to nearest. From 2^23 on a float32 is an integer."""
    units = sums * UNITS
    return tl.where(units < 8388608.0, (units + 8388608.0) - 8388608.0, units).to(tl.int64)


@triton.jit
def _point(i, stream, WIDTH: tl.constexpr):
    """The point of interval i, int64, in units of 2^-40 from the row's start."""
    first, row, seed_lo, seed_hi, step, layer = stream
    number = first + i
    w0, w1, w2, w3 = stream_words(number >> 2, row, seed_lo, seed_hi, step, layer)
    j = number & 3
    word = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
    if WIDTH > 32:
        part = word.to(tl.int64) << (WIDTH - 32)
    else:
        part = (word >> (32 - WIDTH)).to(tl.int64)
    return (i.to(tl.int64) << WIDTH) + part


@triton.jit
def _write_kept(room_ptr, count, cap, kept, target, V):
    """Write the tokens of tile `kept` that are not V or the target, in order; returns the count of entries."""
    token = tl.min(kept, axis=0)
    while token < V:
        tl.store(room_ptr + count, token, mask=(token != target) & (count < cap))
        count += (token != target).to(tl.int32)
        token = tl.min(tl.where(kept > token, kept, V), axis=0)
    return count


@triton.jit
def _load(x_ptr, v, V, CHECKED: tl.constexpr):
    """Logits v; 0 outside the row, if CHECKED."""
    return tl.load(x_ptr + v, mask=v < V, other=0.0) if CHECKED else tl.load(x_ptr + v)


@triton.jit
def _write_hits(
    x_ptr, room_ptr, start, target, head, stream, done, masses, point, i, count, V, cap,
    WIDTH: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Write the tokens of a tile that points hit; returns the count of entries, the next point and its interval.

    masses: of the tile's blocks. The logits of a block with a point are read again, from the cache.
    """
    tau: tl.constexpr = 2.0 ** (WIDTH - ONE_BITS)
    begin = done
    for b in range(masses.shape[0]):
        mass = tl.sum(tl.where(tl.arange(0, masses.shape[0]) == b, masses, 0), axis=0)
        if point < begin + mass:
            v = start + b * BLOCK + tl.arange(0, BLOCK)
            p = _probabilities(_load(x_ptr, v, V, IS_LAST), head)
            small = tl.where((p < tau) & (v != target) & (v < V), p, 0.0)
            inside = tl.cumsum(small, axis=0)
            total = tl.sum(small, axis=0)
            while point < begin + mass:
                goal = total * ((point - begin).to(tl.float32) / mass.to(tl.float32))
                # a parallel scan may rise by a rounding error where small is 0
                token = tl.min(tl.where((inside > goal) & (small > 0.0), v, V), axis=0)
                if token == V:  # the part rounds to 1
                    token = tl.max(tl.where(small > 0.0, v, 0), axis=0)
                tl.store(room_ptr + count, token, mask=count < cap)
                count += 1
                i += 1
                point = _point(i, stream, WIDTH)
        begin += mass
    return count, point, i


@triton.jit
def _select_tile(
    x_ptr, room_ptr, start, target, head, stream, done, point, i, count, V, cap,
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Write the entries of a tile; returns done, point, i and count, moved on.

    done: the mass before the tile; point: the first point from there on, of interval i; count: entries so far.
    """
    tau: tl.constexpr = 2.0 ** (WIDTH - ONE_BITS)
    blocks: tl.constexpr = BLOCK_V // BLOCK
    lost = head[4]
    v = start + tl.arange(0, BLOCK_V)
    power = _powers(_load(x_ptr, v, V, IS_LAST), head)
    if IS_LAST:
        power = tl.where(v < V, power, 0.0)
    sums = tl.sum(tl.reshape(power, [blocks, BLOCK]), axis=1) * lost
    # a comparison with the target at each logit would cost two instructions
    may_keep = (tl.max(sums, axis=0) >= tau) | ((target >= start) & (target < start + BLOCK_V))
    masses = _masses(sums)
    mass = tl.sum(masses, axis=0)
    if may_keep | (mass > point - done):
        if may_keep:
            p = power * lost
            count = _write_kept(room_ptr, count, cap, tl.where(p >= tau, v, V), target, V)
            small = tl.where((p < tau) & (v != target), p, 0.0)
            masses = _masses(tl.sum(tl.reshape(small, [blocks, BLOCK]), axis=1))
            mass = tl.sum(masses, axis=0)
        if mass > point - done:
            count, point, i = _write_hits(
                x_ptr, room_ptr, start, target, head, stream, done, masses, point, i, count, V, cap, WIDTH, IS_LAST
            )
    done += mass
    return done, point, i, count


@triton.jit(do_not_specialize=["first", *STREAM_ARGS])
def _select_kernel(
    x_ptr, targets_ptr, temperature_ptr, lse_ptr,  # (n, V), (n,) int64, (n,) float32 or None, (n,) float64
    room_ptr, counts_ptr,  # (n, cap) int32, (n,) int64
    row_ids_ptr,  # (n,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    first,
    logit_scale, softcap,  # softcap: None, or a float
    V, cap,
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gain, inner, _, row, _, _ = _row_settings(n, logit_scale, softcap, temperature_ptr, None, row_ids_ptr, row_start)
    lse = tl.load(lse_ptr + n)
    base, lost = _base(lse)
    head = (gain, inner, softcap, base, lost)
    stream = (first, row, seed_lo, seed_hi, step, layer)
    target = tl.load(targets_ptr + n).to(tl.int32)
    x_ptr += n * V
    room_ptr += n * cap
    tl.store(room_ptr, tl.maximum(target, 0))
    stop = tl.where(tl.abs(lse) < float("inf"), V, 0)  # a row without a distribution has the target's entry alone
    last = stop // BLOCK_V * BLOCK_V
    i = tl.program_id(0) * 0
    done, point, count = i.to(tl.int64), _point(i, stream, WIDTH), i + 1
    for start in range(0, last, BLOCK_V):
        done, point, i, count = _select_tile(
            x_ptr, room_ptr, start, target, head, stream, done, point, i, count, V, cap, WIDTH, BLOCK_V, False
        )
    if last < stop:
        done, point, i, count = _select_tile(
            x_ptr, room_ptr, last, target, head, stream, done, point, i, count, V, cap, WIDTH, BLOCK_V, True
        )
    tl.store(counts_ptr + n, count.to(tl.int64))


@triton.jit
def _pack_kernel(
    x_ptr, temperature_ptr, logp_ptr, lse_ptr,  # (n, V), (n,) float32 or None, (n,) float32, (n,) float64
    room_ptr, ends_ptr, tokens_ptr, p_ptr,  # (n, cap) int32, (n,) int64, (m,) int32, (m,) float32
    logit_scale, softcap,
    V, cap,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gain, inner, _, _, _, _ = _row_settings(n, logit_scale, softcap, temperature_ptr, None, None, n * 0)
    base, lost = _base(tl.load(lse_ptr + n))
    head = (gain, inner, softcap, base, lost)
    begin = tl.load(ends_ptr + n - 1, mask=n > 0, other=0)
    count = (tl.load(ends_ptr + n) - begin).to(tl.int32)
    of_target = tl.exp(tl.load(logp_ptr + n))
    for start in range(0, count, BLOCK_E):
        k = start + tl.arange(0, BLOCK_E)
        token = tl.load(room_ptr + n * cap + k, mask=k < count, other=0)
        x = tl.load(x_ptr + n * V + token, mask=(k > 0) & (k < count), other=0.0)
        p = _probabilities(x, head)
        tl.store(tokens_ptr + begin + k, token, mask=k < count)
        tl.store(p_ptr + begin + k, tl.where(k == 0, of_target, p), mask=k < count)


def select(x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, points: Points) -> Entries:
    """Choose the tokens of each row of logits x (n, V) that get a gradient (reference.select). float64 uses the reference.

    Waits once for the device, to know the number of entries.

    Raises:
        RuntimeError: a row's probabilities sum to more than 1; rows.lse is not the logits' log-sum-exp.
    """
    if x.dtype == torch.float64:
        return reference.select(x, targets, transform, rows, points)
    num_rows, vocabulary = x.shape
    cap = room_for_entries(points, vocabulary)
    space = torch.empty(num_rows, cap, dtype=torch.int32, device=x.device)
    counts = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    if num_rows == 0:
        return Entries(counts, space.view(-1), torch.empty(0, device=x.device))
    columns, temperature, logp, lse = _contiguous(targets, transform.temperature, rows.logp, rows.lse.double())
    softcap = None if transform.softcap is None else float(transform.softcap)
    settings = (float(transform.logit_scale), softcap, vocabulary, cap)
    wanted = triton.cdiv(WARPS_A_MULTIPROCESSOR * multiprocessors(x.device), num_rows)
    num_warps = min(4, triton.next_power_of_2(wanted))
    with on_device(x):
        _select_kernel[(num_rows,)](
            x, columns, temperature, lse, space, counts, *stream_args(points.stream.read()), points.first, *settings,
            MASS_BITS - points.bits, LOGITS_A_THREAD * 32 * num_warps, num_warps=num_warps,
        )  # fmt: skip
        ends, size = counts.cumsum(0), check_entries(counts, cap)
        tokens = torch.empty(size, dtype=torch.int32, device=x.device)
        p = torch.empty(size, dtype=torch.float32, device=x.device)
        _pack_kernel[(num_rows,)](x, temperature, logp, lse, space, ends, tokens, p, *settings, PACK_BLOCK)
    return Entries(counts, tokens, p)


def head_select(x: Tensor, targets: Tensor, transform: LogitTransform, points: Points) -> tuple[HeadRows, Entries]:
    """head_fwd and select."""
    rows = head_fwd(x, targets, transform)
    return rows, select(x, targets, transform, rows, points)
