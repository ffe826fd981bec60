"""Logits x (n, V) -> log-probability of the target, entropy, and their gradient in place.   A program owns one row.

    z = (softcap tanh(scale x / softcap) + sigma eps) / temperature
    logp = z_t - lse(z)        H = -sum_v p_v ln p_v
    dz_v = dlogp (is_target_v - p_v) - dH p_v (ln p_v + H)        dsigma = sum_v dz_v eps_v / temperature

A program reads its row in channel groups q, as noise is drawn: logits q, Q + q, 2Q + q, 3Q + q share one Philox call.
Exponentials are powers of two, 2^(z log2 e - base). The base is set before the first exponential and rises if one would be
too large. Sums exclude the target, so that 1 - p of a near-certain target keeps its precision. Derivation: docs/math.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..objective import LOG_RATIO_CLAMP, LossRows, Objective
from ..reference import HeadRows, LogitTransform, is_plain
from .noise import (
    LN2,
    MAX_TILE,
    STREAM_ARGS,
    four_normals,
    is_nvidia,
    laid_out_like,
    log_accurate,
    multiprocessors,
    on_device,
    row_identity,
    stream_args,
)
from .rounding import round_nearest, widen

LOG_RATIO_MAX = tl.constexpr(LOG_RATIO_CLAMP)
EXPM1_MAX = tl.constexpr(math.expm1(LOG_RATIO_CLAMP))
LOG2E = tl.constexpr(1.4426950408889634)
ABSENT = tl.constexpr(-1e30)
"""Replaces -inf, the target and lanes outside the row. 2^ABSENT = 0, and ABSENT is finite, so 0 * ABSENT is 0."""
LIMIT = tl.constexpr(2.3538526683702e17)
"""e^40: a larger exponential raises the base. Up to it a row's coefficient times a hidden state is not subnormal."""

ROWS_A_MULTIPROCESSOR = 4
"""Programs of four warps whose registers fit a multiprocessor: 528 rows on 132 multiprocessors."""


# ------------------------------------------------------------------ functions of one number


@triton.jit
def _exp2(t):
    """2^t with a relative error below 2^-22; 0 if the result is subnormal.

    NVIDIA's CUDA programming guide bounds the hardware unit's error by 2 ulp (the constant part of __expf's bound).
    """
    if is_nvidia():
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], tl.float32, is_pure=True, pack=1)
    else:
        power = tl.exp2(t)
    return power


@triton.jit
def _log1p(x):
    """ln(1 + x) for x >= 0 with full relative precision."""
    y = 1.0 + x
    return tl.where(x < float("inf"), log_accurate(y) + (x - (y - 1.0)) / y, x)


@triton.jit
def _expm1(x):
    """e^x - 1 with full relative precision: the rounding of u = e^x cancels in (u - 1) x / ln u (Kahan)."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * x / log_accurate(u))
    return tl.where(u - 1.0 == -1.0, -1.0, near)


@triton.jit
def _tanh(x):
    # below 0.625 the quotient would cancel; minimax polynomial, relative error 5e-9
    x2 = x * x
    p = tl.fma(x2, -0.005717037, 0.020650579)
    p = tl.fma(x2, p, -0.053743497)
    p = tl.fma(x2, p, 0.13331491)
    p = tl.fma(x2, p, -0.33333284)
    decay = _exp2(tl.abs(x) * -2.8853900817779268)
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, tl.fma(x2 * x, p, x), tl.where(x < 0, -far, far))


# ------------------------------------------------------------------ one row
# Kernels pass two tuples to helpers:
#   head  = (gain, inner, softcap or None, sigma): z log2 e = gain y + sigma eps with y = x, or tanh(inner x)
#   noise = (sigma_ptr or None, row, seed_lo, seed_hi, step, layer); row: the row's global id


@triton.jit
def _row_settings(n, logit_scale, softcap, temperature_ptr, sigma_ptr, row_ids_ptr, row_start):
    """Returns gain, inner and sigma of `head`, and the row's global id, logit scale and 1 / temperature."""
    over_temperature = 1.0
    if temperature_ptr is not None:
        over_temperature = tl.div_rn(1.0, tl.load(temperature_ptr + n))
    # cast to float32 first: a compiler may pass scalars as float64 and widen the whole row
    scale = tl.cast(logit_scale, tl.float32)
    outer, inner = scale, scale
    if softcap is not None:
        outer = tl.cast(softcap, tl.float32)
        inner = tl.div_rn(scale, outer)
    sigma = 0.0
    if sigma_ptr is not None:
        sigma = tl.load(sigma_ptr) * over_temperature * LOG2E
    row = row_identity(n, row_ids_ptr, row_start, True)
    return outer * over_temperature * LOG2E, inner, sigma, row, scale, over_temperature


@triton.jit
def _eps(q, noise):
    """Noise on logits q, Q + q, 2Q + q, 3Q + q."""
    sigma_ptr, row, seed_lo, seed_hi, step, layer = noise
    eps = (0.0, 0.0, 0.0, 0.0)
    if sigma_ptr is not None:
        eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
    return eps


@triton.jit
def _capped(x, head):
    """y of float32 logits x."""
    y = x
    if head[2] is not None:
        y = _tanh(x * head[1])
    return y


@triton.jit
def _power(y, eps, head, noise, base):
    """z log2 e - base, rounded once (fma), so the rounding error of base cancels in differences between logits."""
    t = tl.fma(y, head[0], -base)
    if noise[0] is not None:
        t = tl.fma(tl.broadcast_to(head[3], t.shape), eps, t)
    return t


@triton.jit
def _tile(x_ptr, start, target, head, noise, base, V, Q, BLOCK_Q: tl.constexpr, IS_LAST: tl.constexpr):
    """Four tiles each of powers z log2 e - base, y and eps, for logits q, Q + q, 2Q + q, 3Q + q from q = start on.

    A power is ABSENT at -inf, at the target and, in a row's last tile, outside the row. NaN stays NaN.
    """
    q = start + tl.arange(0, BLOCK_Q)
    if IS_LAST:
        in_row = q < Q
        x0 = tl.load(x_ptr + q, mask=in_row, other=0.0)
        x1 = tl.load(x_ptr + Q + q, mask=in_row & (Q + q < V), other=0.0)
        x2 = tl.load(x_ptr + 2 * Q + q, mask=in_row & (2 * Q + q < V), other=0.0)
        x3 = tl.load(x_ptr + 3 * Q + q, mask=in_row & (3 * Q + q < V), other=0.0)
    else:
        x0 = tl.load(x_ptr + q)
        x1 = tl.load(x_ptr + Q + q)
        x2 = tl.load(x_ptr + 2 * Q + q)
        x3 = tl.load(x_ptr + 3 * Q + q)
    y0 = _capped(widen(x0), head)
    y1 = _capped(widen(x1), head)
    y2 = _capped(widen(x2), head)
    y3 = _capped(widen(x3), head)
    eps = _eps(laid_out_like(q, y0), noise)
    t0 = _at_least_absent(_power(y0, eps[0], head, noise, base))
    t1 = _at_least_absent(_power(y1, eps[1], head, noise, base))
    t2 = _at_least_absent(_power(y2, eps[2], head, noise, base))
    t3 = _at_least_absent(_power(y3, eps[3], head, noise, base))
    if IS_LAST:
        t0 = tl.where(in_row, t0, ABSENT)
        t1 = tl.where(in_row & (Q + q < V), t1, ABSENT)
        t2 = tl.where(in_row & (2 * Q + q < V), t2, ABSENT)
        t3 = tl.where(in_row & (3 * Q + q < V), t3, ABSENT)
    # only one tile per row takes this branch; a comparison in every tile would cost two instructions per logit
    if (target % Q >= start) & (target % Q < start + BLOCK_Q):
        t0 = tl.where(q == target, ABSENT, t0)
        t1 = tl.where(Q + q == target, ABSENT, t1)
        t2 = tl.where(2 * Q + q == target, ABSENT, t2)
        t3 = tl.where(3 * Q + q == target, ABSENT, t3)
    return (t0, t1, t2, t3), (y0, y1, y2, y3), eps


@triton.jit
def _at_least_absent(t):
    return tl.maximum(t, ABSENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store(x_ptr, value, j: tl.constexpr, start, V, Q, BLOCK_Q: tl.constexpr, IS_LAST: tl.constexpr):
    """Overwrite the j-th of a tile's four groups of logits."""
    q = start + tl.arange(0, BLOCK_Q)
    if IS_LAST:
        tl.store(x_ptr + j * Q + q, value, mask=(q < Q) & (j * Q + q < V))
    else:
        tl.store(x_ptr + j * Q + q, value)


@triton.jit
def _last_start(V, Q, BLOCK_Q: tl.constexpr):
    """The start of the first tile that is not entirely inside the row: the last tile, or the row's end."""
    return tl.maximum(V - 3 * Q, 0) // BLOCK_Q * BLOCK_Q


@triton.jit
def _at_target(x_ptr, target, head, noise, Q):
    """y and eps of the target."""
    e0, e1, e2, e3 = _eps(target % Q, noise)
    j = target // Q
    return _capped(tl.load(x_ptr + target).to(tl.float32), head), tl.where(
        j == 0, e0, tl.where(j == 1, e1, tl.where(j == 2, e2, e3))
    )


@triton.jit
def _largest(t):
    return tl.max(tl.maximum(tl.maximum(t[0], t[1]), tl.maximum(t[2], t[3])), axis=0)


@triton.jit
def _exponentials(t, dtype: tl.constexpr):
    """e = 2^t of four tiles, rounded to dtype, and the sums over the four tiles of e and e t before rounding."""
    e0, e1, e2, e3 = _exp2(t[0]), _exp2(t[1]), _exp2(t[2]), _exp2(t[3])
    weighted = tl.fma(e0, t[0], tl.fma(e1, t[1], tl.fma(e2, t[2], e3 * t[3])))
    rounded = (round_nearest(e0, dtype), round_nearest(e1, dtype), round_nearest(e2, dtype), round_nearest(e3, dtype))
    return rounded, (e0 + e1) + (e2 + e3), weighted


@triton.jit
def _rescale(x_ptr, stop, by, V, Q, BLOCK_Q: tl.constexpr):
    """Multiply the tiles before `stop` by `by`."""
    tl.debug_barrier()
    for start in range(0, stop, BLOCK_Q):
        for j in tl.static_range(4):
            scaled = widen(tl.load(x_ptr + j * Q + start + tl.arange(0, BLOCK_Q))) * by
            _store(x_ptr, round_nearest(scaled, x_ptr.dtype.element_ty), j, start, V, Q, BLOCK_Q, False)


@triton.jit
def _sums(
    x_ptr, start, stop, target, head, noise, base, total, weighted, V, Q,
    BLOCK_Q: tl.constexpr, IS_LAST: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """base and the sums of e = 2^t and e t, with tiles `start` to `stop` added; IN_PLACE: e overwrites the logits."""
    while start < stop:
        t, _, _ = _tile(x_ptr, start, target, head, noise, base, V, Q, BLOCK_Q, IS_LAST)
        e, tile, weighted_tile = _exponentials(t, x_ptr.dtype.element_ty)
        if tl.max(tile, axis=0) > LIMIT:  # also if infinite, not if NaN: repeat the tile, its largest power as base
            z, _, _ = _tile(x_ptr, start, target, head, noise, 0.0, V, Q, BLOCK_Q, IS_LAST)
            new_base = _largest(z)
            shrink = _exp2(base - new_base)
            weighted = shrink * tl.fma(total, base - new_base, weighted)
            total *= shrink
            if IN_PLACE:
                _rescale(x_ptr, start, shrink, V, Q, BLOCK_Q)
            base = new_base
        else:
            if IN_PLACE:
                for j in tl.static_range(4):
                    _store(x_ptr, e[j], j, start, V, Q, BLOCK_Q, IS_LAST)
            total += tile
            weighted += weighted_tile
            start += BLOCK_Q
    return base, total, weighted


@triton.jit
def _row_fwd(x_ptr, target, head, noise, V, Q, BLOCK_Q: tl.constexpr, IN_PLACE: tl.constexpr):
    """logp, entropy and lse of the row at x_ptr, and the sum of its exponentials e = exp(z - base).

    IN_PLACE: the exponentials overwrite the row; the target's entry becomes minus the sum of the others.
    """
    target_y, target_eps = _at_target(x_ptr, target, head, noise, Q)
    z, _, _ = _tile(x_ptr, 0, target, head, noise, 0.0, V, Q, BLOCK_Q, True)
    target_z = _power(target_y, target_eps, head, noise, 0.0)
    base = tl.maximum(_largest(z), _at_least_absent(target_z))
    total = tl.zeros([BLOCK_Q], tl.float32)
    weighted = tl.zeros([BLOCK_Q], tl.float32)
    last = _last_start(V, Q, BLOCK_Q)
    base, total, weighted = _sums(
        x_ptr, last * 0, last, target, head, noise, base, total, weighted, V, Q, BLOCK_Q, False, IN_PLACE
    )
    base, total, weighted = _sums(
        x_ptr, last, Q, target, head, noise, base, total, weighted, V, Q, BLOCK_Q, True, IN_PLACE
    )
    others = tl.sum(total, axis=0)
    others_weighted = tl.sum(weighted, axis=0)
    # if the target is among the largest, values are relative to it from here on: its term 1 is the 1 of log1p, so the
    # logarithm of a near-certain row keeps its precision
    t = _power(target_y, target_eps, head, noise, base)
    e = _exp2(t)
    whole = others + e
    is_near = t > -1.0
    shift = tl.where(is_near, t, 0.0)
    log_whole = tl.where(is_near, _log1p(others * _exp2(-shift)), log_accurate(whole))
    log_whole = tl.where(whole > 0.0, log_whole, float("nan"))  # NaN in the row, or only -inf
    logp = tl.fma(t - shift, LN2, -log_whole)
    spread = tl.fma(shift, others, -others_weighted) + tl.where(e > 0.0, e * (shift - t), 0.0)
    entropy = tl.fma(spread / whole, LN2, log_whole)
    if IN_PLACE:
        tl.debug_barrier()
        tl.store(x_ptr + target, round_nearest(-others, x_ptr.dtype.element_ty))
    # float64: in float32 it would be off by |lse| 2^-24, and so would every probability that backward computes from it
    lse = (tl.cast(base, tl.float64) + tl.cast(shift, tl.float64)) / LOG2E + tl.cast(log_whole, tl.float64)
    return logp, entropy, lse, whole


@triton.jit
def _bwd_tile(
    x_ptr, start, target, head, noise, lse, factor, by_entropy, dsigma, V, Q,
    BLOCK_Q: tl.constexpr, IS_LAST: tl.constexpr, HAS_DENTROPY: tl.constexpr,
):  # fmt: skip
    """Overwrite a tile with p (factor + by_entropy t) dz/dx, and add its part to dsigma."""
    t, y, eps = _tile(x_ptr, start, target, head, noise, lse, V, Q, BLOCK_Q, IS_LAST)
    for j in tl.static_range(4):
        slope = factor
        if HAS_DENTROPY:
            slope = tl.fma(tl.broadcast_to(by_entropy, t[j].shape), t[j], factor)
        d = _exp2(t[j]) * slope
        if noise[0] is not None:
            dsigma = tl.fma(d, eps[j], dsigma)
        if head[2] is not None:
            d *= 1.0 - y[j] * y[j]
        _store(x_ptr, round_nearest(d, x_ptr.dtype.element_ty), j, start, V, Q, BLOCK_Q, IS_LAST)
    return dsigma


@triton.jit
def _row_bwd(
    x_ptr, target, head, noise, scale, over_temperature, logp, entropy, lse, dlogp, dentropy,
    HAS_DENTROPY: tl.constexpr, V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Overwrite the row at x_ptr with its gradient; returns the row's part of dsigma (0 without noise)."""
    target_y, target_eps = _at_target(x_ptr, target, head, noise, Q)
    tl.debug_barrier()  # all threads have read the target before one overwrites it
    to_x = scale * over_temperature
    exact = lse * LOG2E  # float64
    base = tl.cast(exact, tl.float32)
    apart = tl.cast(tl.cast(base, tl.float64) - exact, tl.float32)  # the rounding error of base
    lost = _exp2(apart)
    factor = -to_x * lost * dlogp
    by_entropy = -to_x * lost * LN2 * dentropy
    if HAS_DENTROPY:
        factor -= to_x * lost * dentropy * tl.fma(apart, LN2, entropy)
    dsigma = tl.zeros([BLOCK_Q], tl.float32)
    last = _last_start(V, Q, BLOCK_Q)
    for start in range(0, last, BLOCK_Q):
        dsigma = _bwd_tile(
            x_ptr, start, target, head, noise, base, factor, by_entropy, dsigma, V, Q, BLOCK_Q, False, HAS_DENTROPY
        )
    if last < Q:
        dsigma = _bwd_tile(
            x_ptr, last, target, head, noise, base, factor, by_entropy, dsigma, V, Q, BLOCK_Q, True, HAS_DENTROPY
        )
    # the target separately: logp is more precise than z - lse, and 1 - p does not cancel
    d = dlogp * -_expm1(logp)
    if HAS_DENTROPY:
        p = tl.exp(logp)
        d -= tl.where(p > 0.0, dentropy * p * (logp + entropy), 0.0)
    d *= to_x
    row_dsigma = tl.sum(dsigma, axis=0) + d * target_eps
    if head[2] is not None:
        d *= 1.0 - target_y * target_y
    tl.debug_barrier()
    tl.store(x_ptr + target, round_nearest(d, x_ptr.dtype.element_ty))
    return row_dsigma / scale


# ------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_fwd_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr, whole_ptr,  # (n,) float32, lse float64; whole_ptr None: x is unchanged
    sigma_ptr, row_ids_ptr,  # () float32 or None: no noise, (n,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,  # softcap: None, or a float
    V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gain, inner, sigma, row, _, _ = _row_settings(
        n, logit_scale, softcap, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (gain, inner, softcap, sigma)
    noise = (sigma_ptr, row, seed_lo, seed_hi, step, layer)
    target = tl.load(targets_ptr + n).to(tl.int32)
    logp, entropy, lse, whole = _row_fwd(x_ptr + n * V, target, head, noise, V, Q, BLOCK_Q, whole_ptr is not None)
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(lse_ptr + n, lse)
    if whole_ptr is not None:
        tl.store(whole_ptr + n, whole)


def head_fwd(x: Tensor, targets: Tensor, transform: LogitTransform) -> HeadRows:
    """Log-probability, entropy and log-sum-exp of each row of x (n, V); x is unchanged. float64 uses the reference."""
    if x.dtype == torch.float64:
        return reference.head_fwd(x, targets, transform)
    out = _empty_rows(x)
    if len(x):
        args, options = _head_args(x, transform)
        with on_device(x):
            _head_fwd_kernel[(len(x),)](x, *_contiguous(targets, transform.temperature), *out, None, *args, **options)
    return out


def head_exp(x: Tensor, targets: Tensor, transform: LogitTransform) -> tuple[HeadRows, Tensor]:
    """head_fwd; exponentials overwrite x, and their sum (n,) is returned (reference.head_exp). float64 uses the reference."""
    if x.dtype == torch.float64:
        return reference.head_exp(x, targets, transform)
    assert is_plain(transform, x.dtype, False)
    out, whole = _empty_rows(x), _empty(x)
    if len(x):
        args, options = _head_args(x, transform)
        with on_device(x):
            _head_fwd_kernel[(len(x),)](x, *_contiguous(targets, transform.temperature), *out, whole, *args, **options)
    return out, whole


# ------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_bwd_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr,  # (n,) float32, the last float64
    dlogp_ptr, dentropy_ptr, dsigma_ptr,  # (n,), (n,) or None, (n,) or None
    sigma_ptr, row_ids_ptr,
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,
    V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gain, inner, sigma, row, scale, over_temperature = _row_settings(
        n, logit_scale, softcap, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (gain, inner, softcap, sigma)
    noise = (sigma_ptr, row, seed_lo, seed_hi, step, layer)
    dentropy = 0.0
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + n)
    dsigma = _row_bwd(
        x_ptr + n * V, tl.load(targets_ptr + n).to(tl.int32), head, noise, scale, over_temperature,
        tl.load(logp_ptr + n), tl.load(entropy_ptr + n), tl.load(lse_ptr + n), tl.load(dlogp_ptr + n),
        dentropy, dentropy_ptr is not None, V, Q, BLOCK_Q,
    )  # fmt: skip
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + n, dsigma)


def head_bwd(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Replace logits x (n, V) by their gradient, in place; returns dsigma () or None. float64 uses the reference."""
    if x.dtype == torch.float64:
        return reference.head_bwd(x, targets, transform, rows, dlogp, dentropy)
    dsigma = None if transform.sigma is None else _empty(x)  # one part per row, summed in a fixed order afterwards
    if len(x):
        args, options = _head_args(x, transform)
        given = rows._replace(lse=rows.lse.double())
        numbers = _contiguous(targets, transform.temperature, *given, dlogp, dentropy)
        with on_device(x):
            _head_bwd_kernel[(len(x),)](x, *numbers, dsigma, *args, **options)
    return None if dsigma is None else dsigma.sum()


# ------------------------------------------------------------------ the token-level loss, in one launch


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays NaN


@triton.jit
def _larger(a, b):
    """The derivative of max(a, b) with respect to a: 1, 1/2 at a tie, or 0, as in torch.maximum."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _dsurrogate(ell, advantage, clip_min, clip_max, dual_clip):
    """The derivative of objective.surrogate with respect to the log-ratio `ell`."""
    rho = tl.exp(_clamp(ell, -LOG_RATIO_MAX, LOG_RATIO_MAX))
    free = -advantage * rho
    clipped = -advantage * _clamp(rho, clip_min, clip_max)
    # between the bounds, and on them, both branches follow rho
    slope = tl.where((rho >= clip_min) & (rho <= clip_max), 1.0, _larger(free, clipped))
    if dual_clip is not None:
        cap = -advantage * tl.cast(dual_clip, tl.float32)
        loss = tl.where(free < clipped, clipped, free)
        slope = tl.where(advantage < 0, slope * _larger(cap, loss), slope)
    # NaN fails every comparison and propagates through `free`
    return tl.where((ell < -LOG_RATIO_MAX) | (ell > LOG_RATIO_MAX), 0.0, slope * free)


@triton.jit
def _kl(log_ratio, KL: tl.constexpr):
    """objective.kl_estimate for log_ratio = logp - ref_logp."""
    value = log_ratio  # k1
    if KL == "k2":
        value = 0.5 * log_ratio * log_ratio
    elif KL != "k1":  # k3, and k3+, which has k3's value
        below = tl.where(-log_ratio > LOG_RATIO_MAX, LOG_RATIO_MAX, -log_ratio)
        above = tl.where(-log_ratio > LOG_RATIO_MAX, -log_ratio - LOG_RATIO_MAX, 0.0)
        value = _expm1(below) - below + EXPM1_MAX * above
    return value


@triton.jit
def _dkl(log_ratio, KL: tl.constexpr):
    """The derivative of objective.kl_estimate with respect to logp."""
    slope = log_ratio  # k2, and k3+, which has k2's gradient
    if KL == "k1":
        slope = log_ratio * 0.0 + 1.0
    elif KL == "k3":
        slope = -_expm1(tl.where(-log_ratio > LOG_RATIO_MAX, LOG_RATIO_MAX, -log_ratio))
    return slope


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_token_loss_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr,  # (n,) float32, the last float64
    coefficient_ptr, dsigma_ptr,  # (n,) float32 or None
    denominator_ptr, advantages_ptr, weight_ptr,  # (n,) float32
    is_weight_ptr, ref_logp_ptr, entropy_weight_ptr,  # (n,) float32 or None
    clip_min, clip_max, dual_clip, kl_coef, entropy_coef,  # the last three: None, or a float
    sigma_ptr, row_ids_ptr,
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,
    V, Q, BLOCK_Q: tl.constexpr,
    KL: tl.constexpr,  # Objective.kl
    KL_CORRECTED: tl.constexpr,  # Objective.kl_bias_correction
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    gain, inner, sigma, row, scale, over_temperature = _row_settings(
        n, logit_scale, softcap, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (gain, inner, softcap, sigma)
    noise = (sigma_ptr, row, seed_lo, seed_hi, step, layer)
    target = tl.load(targets_ptr + n).to(tl.int32)
    logp, entropy, lse, whole = _row_fwd(x_ptr + n * V, target, head, noise, V, Q, BLOCK_Q, coefficient_ptr is not None)
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(lse_ptr + n, lse)

    weight = tl.load(weight_ptr + n)
    ell = logp - tl.load(denominator_ptr + n)
    dlogp = _dsurrogate(
        ell, tl.load(advantages_ptr + n), tl.cast(clip_min, tl.float32), tl.cast(clip_max, tl.float32), dual_clip
    )
    if is_weight_ptr is not None:
        dlogp *= tl.load(is_weight_ptr + n)
    if kl_coef is not None:
        log_ratio = logp - tl.load(ref_logp_ptr + n)
        dkl = _dkl(log_ratio, KL)
        if KL_CORRECTED:
            is_outside = (ell < -LOG_RATIO_MAX) | (ell > LOG_RATIO_MAX)
            rho = tl.exp(_clamp(ell, -LOG_RATIO_MAX, LOG_RATIO_MAX))
            dkl = rho * (dkl + tl.where(is_outside, 0.0, _kl(log_ratio, KL)))
        dlogp += tl.cast(kl_coef, tl.float32) * dkl
    dlogp *= weight
    if coefficient_ptr is not None:
        tl.store(coefficient_ptr + n, -dlogp * scale * over_temperature / whole)
    else:
        dentropy = 0.0
        if entropy_coef is not None:
            entropy_weight = weight
            if entropy_weight_ptr is not None:
                entropy_weight = tl.load(entropy_weight_ptr + n)
            dentropy = -tl.cast(entropy_coef, tl.float32) * entropy_weight
        dsigma = _row_bwd(
            x_ptr + n * V, target, head, noise, scale, over_temperature, logp, entropy, lse, dlogp,
            dentropy, entropy_coef is not None, V, Q, BLOCK_Q,
        )  # fmt: skip
        if dsigma_ptr is not None:
            tl.store(dsigma_ptr + n, dsigma)


def head_token_loss(
    x: Tensor, targets: Tensor, transform: LogitTransform, rows: LossRows, objective: Objective
) -> tuple[HeadRows, Tensor | None, Tensor | None]:
    """Token-level loss of a chunk and its gradient, in one launch (reference.head_token_loss). float64 uses the reference."""
    if x.dtype == torch.float64:
        return reference.head_token_loss(x, targets, transform, rows, objective)
    out = _empty_rows(x)
    dsigma = None if transform.sigma is None else _empty(x)
    coefficient = _empty(x) if is_plain(transform, x.dtype, objective.entropy_coef != 0) else None
    dual_clip, kl_coef, entropy_coef = objective.dual_clip, objective.kl_coef, objective.entropy_coef
    if len(x):
        args, options = _head_args(x, transform)
        with on_device(x):
            _head_token_loss_kernel[(len(x),)](
                x, *_contiguous(targets, transform.temperature), *out, coefficient, dsigma,
                *_contiguous(rows.denominator, rows.advantages, rows.weight, rows.is_weight),
                *_contiguous(rows.ref_logp if kl_coef > 0 else None, rows.entropy_weight),
                float(1 - objective.clip_low), float(1 + objective.clip_high),
                None if dual_clip is None else float(dual_clip),
                float(kl_coef) if kl_coef > 0 else None,
                float(entropy_coef) if entropy_coef != 0 else None,
                *args, objective.kl, objective.kl_bias_correction, **options,
            )  # fmt: skip
    return out, None if dsigma is None else dsigma.sum(), coefficient


# ------------------------------------------------------------------ launching


def _head_args(x: Tensor, transform: LogitTransform) -> tuple[tuple[Tensor | float | int | None, ...], dict[str, int]]:
    """Kernel arguments sigma_ptr, the stream, logit_scale, softcap, V, Q, BLOCK_Q, and the launch options."""
    num_rows, vocabulary = x.shape
    quarter = triton.cdiv(vocabulary, 4)
    stream = (
        (None, 0, 0, 0, 0, 0) if transform.sigma is None or transform.stream is None else stream_args(transform.stream)
    )
    softcap = None if transform.softcap is None else float(transform.softcap)
    # 128-bit loads, and enough registers for Philox and both pairs of normals
    largest = MAX_TILE if transform.sigma is None else MAX_TILE // 2
    # rows that fill the device take four warps each; fewer rows take eight warps and tiles of twice the size
    more = 1 if num_rows >= ROWS_A_MULTIPROCESSOR * multiprocessors(x.device) else 2
    block_q = min(more * largest, triton.next_power_of_2(quarter))
    return (transform.sigma, *stream, float(transform.logit_scale), softcap, vocabulary, quarter, block_q), {
        "num_warps": 4 * more
    }


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors made contiguous, as the kernels need them; an expanded scalar is not contiguous."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(len(x), dtype=torch.float32, device=x.device)


def _empty_rows(x: Tensor) -> HeadRows:
    return HeadRows(_empty(x), _empty(x), _empty(x).double())
