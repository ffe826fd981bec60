"""Chooses the tokens that stand for each row's softmax (reference.select).   A program owns one row and reads it once.

    m_v = p_v 2^40 = 2^(z_v log2 e - base)      share_v = m_v rounded to an integer; 0 where p_v >= tau, and at the target
    end_v = share_0 + ... + share_v             point i lies in [i, i + 1) tau and hits the token with start <= point < end

Tiles follow the vocabulary's order. Sums of shares are exact in any order, so a tile without a kept token and without a
point needs only its sum. The other tiles write entries. Derivation: docs/math.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import MASS_BITS, Entries, HeadRows, LogitTransform, Points
from .head import LOG2E, _capped, _contiguous, _exp2, _row_settings
from .noise import STREAM_ARGS, is_nvidia, multiprocessors, on_device, stream_args, stream_words
from .rounding import widen

UNIT_BITS = tl.constexpr(MASS_BITS)
FLAG = tl.constexpr(1 << 50)
"""Added to a tile's mass by a thread with a large share: more than any mass, and 128 of them fit 63 bits."""

LOGITS_A_THREAD = 16
WARPS_A_MULTIPROCESSOR = 16
"""So many warps keep 16 KiB of loads in flight. Fewer rows get two or four warps each."""
PACK_BLOCK = 128


# ------------------------------------------------------------------ one row
# Kernels pass two tuples to helpers:
#   head   = (gain, inner, softcap or None, base, lost): m = 2^(gain y - base) lost with y = x, or tanh(inner x)
#   stream = (first, row, seed_lo, seed_hi, step, layer); row: the row's global id, first: number of its first interval


@triton.jit
def _masses(x, head):
    """p 2^40 of logits x, float32."""
    gain, _, _, base, lost = head
    return _exp2(tl.fma(_capped(widen(x), head), gain, -base)) * lost


@triton.jit
def _base(lse):
    """lse log2 e - 40 in float32, and 2^(its rounding error), for lse in float64."""
    exact = lse * LOG2E - UNIT_BITS
    base = tl.cast(exact, tl.float32)
    return base, _exp2(tl.cast(tl.cast(base, tl.float64) - exact, tl.float32))


@triton.jit
def _shares(m):
    """m >= 0 rounded to the nearest integer, ties to even; uint32, at least 2^31 if m is."""
    if is_nvidia():
        share = tl.inline_asm_elementwise("cvt.rni.u32.f32 $0, $1;", "=r,f", [m], tl.uint32, is_pure=True, pack=1)
    else:
        whole = 8388608.0  # 2^23: from here on a float32 is an integer
        share = tl.minimum(tl.where(m < whole, (m + whole) - whole, m), 2147483648.0).to(tl.uint32)
    return share


@triton.jit
def _tile_mass(share, WIDTH: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of a tile's shares, int64; at least FLAG if a token may be kept or a sum of 16 shares exceeds 32 bits.

    A thread holds VECTOR neighbours of each of several stretches of the tile. It adds them in 32 bits.
    """
    parts = tl.reshape(share, [share.shape[0] // (THREADS * VECTOR), THREADS, VECTOR])
    own = tl.sum(tl.sum(parts, axis=2), axis=0)
    bits = tl.reduce_or(tl.reduce_or(parts, axis=2), axis=0)
    large: tl.constexpr = 1 << min(28, WIDTH)
    return tl.sum(own.to(tl.int64) + tl.where(bits >= large, FLAG, 0), axis=0)


@triton.jit
def _point(i, stream, WIDTH: tl.constexpr):
    """The point of interval i, int64, in units of 2^-40 from the row's start."""
    first, row, seed_lo, seed_hi, step, layer = stream
    number = first + i
    w0, w1, w2, w3 = stream_words(number >> 2, row, seed_lo, seed_hi, step, layer)
    j = number & 3
    word = tl.where(j < 2, tl.where(j == 0, w0, w1), tl.where(j == 2, w2, w3))
    return (i.to(tl.int64) << WIDTH) + (word >> (32 - WIDTH)).to(tl.int64)


@triton.jit
def _write_kept(room_ptr, count, cap, kept, V):
    """Write the tokens of tile `kept` that are not V, in order; returns the count of entries."""
    token = tl.min(kept, axis=0)
    while token < V:
        tl.store(room_ptr + count, token, mask=count < cap)
        count += 1
        token = tl.min(tl.where(kept > token, kept, V), axis=0)
    return count


@triton.jit
def _write_hits(room_ptr, count, cap, start, ends, stop, point, i, stream, WIDTH: tl.constexpr):
    """Write the tokens that the points below `stop` hit; returns the count of entries, the next point and its interval."""
    while point < stop:
        hit = start + tl.sum((ends <= point).to(tl.int32), axis=0)
        tl.store(room_ptr + count, hit, mask=count < cap)
        count += 1
        i += 1
        point = _point(i, stream, WIDTH)
    return count, point, i


@triton.jit
def _select_tile(
    x_ptr, room_ptr, start, target, head, stream, done, point, i, count, V, cap,
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Write the entries of a tile; returns done, point, i and count, moved on.

    done: the mass before the tile; point: the first point from there on, of interval i; count: entries so far.
    """
    v = start + tl.arange(0, BLOCK_V)
    if IS_LAST:
        x = tl.load(x_ptr + v, mask=v < V, other=0.0)
        m = tl.where(v < V, _masses(x, head), 0.0)
    else:
        x = tl.load(x_ptr + v)
        m = _masses(x, head)
    share = _shares(m)
    mass = _tile_mass(share, WIDTH, THREADS, 128 // x.dtype.primitive_bitwidth)
    # a comparison with the target at each logit would cost two instructions
    mass = tl.where((target >= start) & (target < start + BLOCK_V), FLAG, mass)
    if mass > point - done:
        if mass >= FLAG:
            tau: tl.constexpr = float(1 << WIDTH)
            m = tl.where(v == target, 0.0, m)
            share = tl.where((m >= tau) | (v == target), 0, share)
            mass = tl.sum(share.to(tl.int64), axis=0)
            count = _write_kept(room_ptr, count, cap, tl.where(m >= tau, v, V), V)
        if mass > point - done:
            ends = done + tl.cumsum(share.to(tl.int64), axis=0)
            count, point, i = _write_hits(room_ptr, count, cap, start, ends, done + mass, point, i, stream, WIDTH)
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
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, THREADS: tl.constexpr,
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
    tl.store(room_ptr, target)
    stop = tl.where(tl.abs(lse) < float("inf"), V, 0)  # a row without a distribution has the target's entry alone
    last = stop // BLOCK_V * BLOCK_V
    i = tl.program_id(0) * 0
    done, point, count = i.to(tl.int64), _point(i, stream, WIDTH), i + 1
    for start in range(0, last, BLOCK_V):
        done, point, i, count = _select_tile(
            x_ptr, room_ptr, start, target, head, stream, done, point, i, count, V, cap, WIDTH, BLOCK_V, THREADS, False
        )
    if last < stop:
        done, point, i, count = _select_tile(
            x_ptr, room_ptr, last, target, head, stream, done, point, i, count, V, cap, WIDTH, BLOCK_V, THREADS, True
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
        p = _masses(x, head) * 9.094947017729282e-13  # 2^-40
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
    cap = room(vocabulary, points.bits)
    space = torch.empty(num_rows, cap, dtype=torch.int32, device=x.device)
    counts = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    if num_rows == 0:
        return Entries(counts, space.view(-1), torch.empty(0, device=x.device))
    columns, temperature, logp, lse = _contiguous(targets, transform.temperature, rows.logp, rows.lse.double())
    softcap = None if transform.softcap is None else float(transform.softcap)
    settings = (float(transform.logit_scale), softcap, vocabulary, cap)
    wanted = triton.cdiv(WARPS_A_MULTIPROCESSOR * multiprocessors(x.device), num_rows)
    num_warps = min(4, triton.next_power_of_2(wanted))
    threads = 32 * num_warps
    with on_device(x):
        _select_kernel[(num_rows,)](
            x, columns, temperature, lse, space, counts, *stream_args(points.stream.read()), points.first, *settings,
            MASS_BITS - points.bits, LOGITS_A_THREAD * threads, threads, num_warps=num_warps,
        )  # fmt: skip
        ends = counts.cumsum(0)
        size, most = torch.stack([ends[-1], counts.max()]).tolist()
        if most > cap:
            raise RuntimeError(
                f"select: a row has {most} entries; threshold 2^-{points.bits} needs at most {cap}: the row's "
                "probabilities sum to more than 1"
            )
        tokens = torch.empty(size, dtype=torch.int32, device=x.device)
        p = torch.empty(size, dtype=torch.float32, device=x.device)
        _pack_kernel[(num_rows,)](x, temperature, logp, lse, space, ends, tokens, p, *settings, PACK_BLOCK)
    return Entries(counts, tokens, p)


def room(vocabulary: int, bits: int) -> int:
    """The most entries of a row: one for each token, or for each 2^-bits of its mass; and the target's.

    The mass may exceed 1 by the rounding of p; a row has room for 1/64 more.
    """
    return 1 + min(vocabulary, (1 << bits) + (1 << bits - 6) + 8)
