"""Logits x (n, V) -> log-probability of the target, entropy, and their gradient in place.   A program owns one row.

    z = (softcap tanh(scale x / softcap) + sigma eps) / temperature
    logp = z_t - lse(z)        H = -sum_v p_v ln p_v
    dz_v = dlogp (is_target_v - p_v) - dH p_v (ln p_v + H)        dsigma = sum_v dz_v eps_v / temperature

The row is walked in channel groups q, as noise is made: logits q, Q + q, 2Q + q, 3Q + q share one Philox call. Sums run
over the tokens other than the target, so that 1 - p of a near-certain one keeps its digits. Derivation: docs/math.md
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..objective import LOG_RATIO_CLAMP, LossRows, Objective
from ..reference import Head, HeadRows
from .noise import MAX_TILE, STREAM_ARGS, four_normals, log_accurate, on_device, row_identity, stream_args
from .rounding import round_nearest

LOG_RATIO_MAX = tl.constexpr(LOG_RATIO_CLAMP)
START = tl.constexpr(-1e30)
"""Running maximum before the first logit: finite, so that no difference of two is NaN."""
ABSENT = tl.constexpr(-2e30)
"""Stands for -inf and for lanes outside the row: exp(ABSENT - START) = 0."""


# ------------------------------------------------------------------ functions of one number


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
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, tl.fma(x2 * x, p, x), tl.where(x < 0, -far, far))


# ------------------------------------------------------------------ one row
# Two tuples go from kernel to helper:
#   head  = (scale, softcap or None, 1 / temperature)
#   noise = (sigma_ptr or None, sigma, row, seed_lo, seed_hi, step, layer); row: the row's global identity


@triton.jit
def _row_settings(n, logit_scale, temperature_ptr, sigma_ptr, row_ids_ptr, row_start):
    over_temperature = 1.0
    if temperature_ptr is not None:
        over_temperature = tl.div_rn(1.0, tl.load(temperature_ptr + n))
    sigma = 0.0
    if sigma_ptr is not None:
        sigma = tl.load(sigma_ptr)
    # float32 now: a compiler may pass scalars as float64 and widen the whole row
    return tl.cast(logit_scale, tl.float32), over_temperature, sigma, row_identity(n, row_ids_ptr, row_start, True)


@triton.jit
def _transform(x, eps, head, noise):
    """z and tanh (0 without a softcap) of raw logits."""
    scale, softcap, over_temperature = head
    z = x.to(tl.float32) * scale
    tanh = 0.0
    if softcap is not None:
        tanh = _tanh(z / tl.cast(softcap, tl.float32))
        z = tl.cast(softcap, tl.float32) * tanh
    if noise[0] is not None:
        z = tl.fma(tl.broadcast_to(noise[1], z.shape), eps, z)
    return z * over_temperature, tanh


@triton.jit
def _eps(q, noise):
    """Noise on logits q, Q + q, 2Q + q, 3Q + q."""
    sigma_ptr, _, row, seed_lo, seed_hi, step, layer = noise
    eps = (0.0, 0.0, 0.0, 0.0)
    if sigma_ptr is not None:
        eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
    return eps


@triton.jit
def _other_logit(x_ptr, j, q, eps, target, head, noise, V, Q):
    """z of tokens j*Q + q; ABSENT at the target, at -inf and outside the row. NaN stays NaN."""
    v = j * Q + q
    in_row = (q < Q) & (v < V)
    z, _ = _transform(tl.load(x_ptr + v, mask=in_row, other=0.0), eps, head, noise)
    return tl.where(in_row & (v != target) & ~(z < ABSENT), z, ABSENT)


@triton.jit
def _target_logit(x_ptr, target, head, noise, Q):
    e0, e1, e2, e3 = _eps(target % Q, noise)
    j = target // Q
    eps = tl.where(j == 0, e0, tl.where(j == 1, e1, tl.where(j == 2, e2, e3)))
    z, _ = _transform(tl.load(x_ptr + target), eps, head, noise)
    return z


@triton.jit
def _row_fwd(x_ptr, target, head, noise, V, Q, BLOCK_Q: tl.constexpr):
    """logp, entropy and lse of the row at x_ptr; every lane keeps its own maximum and sums, joined at the end."""
    target_z = _target_logit(x_ptr, target, head, noise, Q)
    top = tl.full([BLOCK_Q], START, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)  # sum of exp(z - top)
    weighted = tl.zeros([BLOCK_Q], tl.float32)  # sum of exp(z - top) (z - top)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        eps = _eps(q, noise)
        z0 = _other_logit(x_ptr, 0, q, eps[0], target, head, noise, V, Q)
        z1 = _other_logit(x_ptr, 1, q, eps[1], target, head, noise, V, Q)
        z2 = _other_logit(x_ptr, 2, q, eps[2], target, head, noise, V, Q)
        z3 = _other_logit(x_ptr, 3, q, eps[3], target, head, noise, V, Q)
        new_top = tl.maximum(top, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
        shrink = tl.exp(top - new_top)
        e0 = tl.exp(z0 - new_top)
        e1 = tl.exp(z1 - new_top)
        e2 = tl.exp(z2 - new_top)
        e3 = tl.exp(z3 - new_top)
        weighted = shrink * tl.fma(total, top - new_top, weighted)
        weighted = tl.fma(e0, z0 - new_top, tl.fma(e1, z1 - new_top, weighted))
        weighted = tl.fma(e2, z2 - new_top, tl.fma(e3, z3 - new_top, weighted))
        total = tl.fma(total, shrink, (e0 + e1) + (e2 + e3))
        top = new_top
    others_top = tl.max(top, axis=0)
    shrink = tl.exp(top - others_top)
    others = tl.sum(total * shrink, axis=0)
    others_weighted = tl.sum(shrink * tl.fma(total, top - others_top, weighted), axis=0)
    # join with the target; the largest term of the whole sum is 1 and stays out of `rest`, which enters by log1p
    is_top = target_z >= others_top
    whole_top = tl.where(is_top, target_z, others_top)
    shrink = tl.exp(others_top - whole_top)
    target_exp = tl.exp(target_z - whole_top)
    rest = tl.where(is_top, others * shrink, (others - 1.0) + target_exp)
    log_total = _log1p(rest)
    target_weighted = tl.where(target_exp > 0, target_exp * (target_z - whole_top), 0.0)
    whole_weighted = shrink * tl.fma(others, others_top - whole_top, others_weighted) + target_weighted
    entropy = log_total - whole_weighted / (1.0 + rest)
    return (target_z - whole_top) - log_total, entropy, whole_top + log_total


@triton.jit
def _row_bwd(
    x_ptr, target, head, noise, logp, entropy, lse, dlogp, dentropy, HAS_DENTROPY: tl.constexpr,
    V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Replace the row at x_ptr by its gradient; returns the row's part of dsigma (0 without noise)."""
    certain = dlogp * -_expm1(logp)  # dlogp (1 - p), without cancellation
    dsigma = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        eps = _eps(q, noise)
        for j in tl.static_range(4):
            v = j * Q + q
            in_row = (q < Q) & (v < V)
            z, tanh = _transform(tl.load(x_ptr + v, mask=in_row, other=0.0), eps[j], head, noise)
            log_p = tl.where(v == target, logp, z - lse)  # logp has the digits that z - lse lost
            p = tl.exp(log_p)
            dz = tl.where(v == target, certain, -dlogp * p)
            if HAS_DENTROPY:
                dz -= tl.where(p > 0, dentropy * p * (log_p + entropy), 0.0)
            dz *= head[2]
            if noise[0] is not None:
                dsigma = tl.where(in_row, tl.fma(dz, eps[j], dsigma), dsigma)
            dx = dz * head[0]
            if head[1] is not None:
                dx *= 1.0 - tanh * tanh
            tl.store(x_ptr + v, round_nearest(dx, x_ptr.dtype.element_ty), mask=in_row)
    return tl.sum(dsigma, axis=0)


# ------------------------------------------------------------------ forward


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_fwd_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr,  # (n,) float32
    sigma_ptr, row_ids_ptr,  # () float32 or None: no noise, (n,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,  # softcap: None, or a float
    V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    scale, over_temperature, sigma, row = _row_settings(
        n, logit_scale, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (scale, softcap, over_temperature)
    noise = (sigma_ptr, sigma, row, seed_lo, seed_hi, step, layer)
    target = tl.load(targets_ptr + n).to(tl.int32)
    logp, entropy, lse = _row_fwd(x_ptr + n * V, target, head, noise, V, Q, BLOCK_Q)
    tl.store(logp_ptr + n, logp)
    tl.store(entropy_ptr + n, entropy)
    tl.store(lse_ptr + n, lse)


def head_fwd(x: Tensor, targets: Tensor, head: Head) -> HeadRows:
    """Log-probability, entropy and log-sum-exp of each row of x (n, V), x left as it is. float64: the reference's."""
    if x.dtype == torch.float64:
        return reference.head_fwd(x, targets, head)
    out = _empty_rows(x)
    if len(x):
        with on_device(x):
            _head_fwd_kernel[(len(x),)](x, *_contiguous(targets, head.temperature), *out, *_head_args(x, head))
    return out


# ------------------------------------------------------------------ backward


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_bwd_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr,  # (n,) float32
    dlogp_ptr, dentropy_ptr, dsigma_ptr,  # (n,), (n,) or None, (n,) or None
    sigma_ptr, row_ids_ptr,
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,
    V, Q, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    scale, over_temperature, sigma, row = _row_settings(
        n, logit_scale, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (scale, softcap, over_temperature)
    noise = (sigma_ptr, sigma, row, seed_lo, seed_hi, step, layer)
    dentropy = 0.0
    if dentropy_ptr is not None:
        dentropy = tl.load(dentropy_ptr + n)
    dsigma = _row_bwd(
        x_ptr + n * V, tl.load(targets_ptr + n).to(tl.int32), head, noise,
        tl.load(logp_ptr + n), tl.load(entropy_ptr + n), tl.load(lse_ptr + n), tl.load(dlogp_ptr + n),
        dentropy, dentropy_ptr is not None, V, Q, BLOCK_Q,
    )  # fmt: skip
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + n, dsigma)


def head_bwd(
    x: Tensor, targets: Tensor, head: Head, rows: HeadRows, dlogp: Tensor, dentropy: Tensor | None
) -> Tensor | None:
    """Replace logits x (n, V) by their gradient, in place; returns dsigma () or None. float64: the reference's."""
    if x.dtype == torch.float64:
        return reference.head_bwd(x, targets, head, rows, dlogp, dentropy)
    dsigma = _empty_dsigma(x, head)
    if len(x):
        with on_device(x):
            _head_bwd_kernel[(len(x),)](
                x, *_contiguous(targets, head.temperature, *rows, dlogp, dentropy), dsigma, *_head_args(x, head)
            )
    return None if dsigma is None else dsigma.sum()


# ------------------------------------------------------------------ the token-level loss, in one launch


@triton.jit
def _clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays NaN


@triton.jit
def _larger(a, b):
    """The part of the gradient of max(a, b) that goes to a: 1, 1/2 where they tie, 0; as torch.maximum has it."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _dsurrogate(ell, advantage, clip_min, clip_max, dual_clip):
    """The derivative of objective.surrogate by the log-ratio `ell`."""
    rho = tl.exp(_clamp(ell, -LOG_RATIO_MAX, LOG_RATIO_MAX))
    free = -advantage * rho
    clipped = -advantage * _clamp(rho, clip_min, clip_max)
    # between the bounds, and on them, both branches follow rho
    slope = tl.where((rho >= clip_min) & (rho <= clip_max), 1.0, _larger(free, clipped))
    if dual_clip is not None:
        cap = -advantage * tl.cast(dual_clip, tl.float32)
        loss = tl.where(free < clipped, clipped, free)
        slope = tl.where(advantage < 0, slope * _larger(cap, loss), slope)
    # NaN fails every comparison and comes through `free`
    return tl.where((ell < -LOG_RATIO_MAX) | (ell > LOG_RATIO_MAX), 0.0, slope * free)


@triton.jit
def _dkl(log_ratio, KL: tl.constexpr):
    """The derivative of objective.kl_estimate by logp."""
    slope = log_ratio  # k2, and k3+ which borrows its gradient
    if KL == "k1":
        slope = log_ratio * 0.0 + 1.0
    elif KL == "k3":
        is_outside = (log_ratio < -LOG_RATIO_MAX) | (log_ratio > LOG_RATIO_MAX)
        slope = tl.where(is_outside, 0.0, -_expm1(-_clamp(log_ratio, -LOG_RATIO_MAX, LOG_RATIO_MAX)))
    return slope


@triton.jit(do_not_specialize=STREAM_ARGS)
def _head_token_loss_kernel(
    x_ptr, targets_ptr, temperature_ptr,  # (n, V), (n,) int64, (n,) float32 or None
    logp_ptr, entropy_ptr, lse_ptr, dsigma_ptr,  # (n,) float32, the last may be None
    denominator_ptr, advantages_ptr, weight_ptr, is_weight_ptr, ref_logp_ptr,  # (n,) float32, the last two may be None
    clip_min, clip_max, dual_clip, kl_coef, entropy_coef,  # the last three: None, or a float
    sigma_ptr, row_ids_ptr,
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    logit_scale, softcap,
    V, Q, BLOCK_Q: tl.constexpr,
    KL: tl.constexpr,  # Objective.kl
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    scale, over_temperature, sigma, row = _row_settings(
        n, logit_scale, temperature_ptr, sigma_ptr, row_ids_ptr, row_start
    )
    head = (scale, softcap, over_temperature)
    noise = (sigma_ptr, sigma, row, seed_lo, seed_hi, step, layer)
    target = tl.load(targets_ptr + n).to(tl.int32)
    logp, entropy, lse = _row_fwd(x_ptr + n * V, target, head, noise, V, Q, BLOCK_Q)
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
        dlogp += tl.cast(kl_coef, tl.float32) * _dkl(logp - tl.load(ref_logp_ptr + n), KL)
    dentropy = 0.0
    if entropy_coef is not None:
        dentropy = -tl.cast(entropy_coef, tl.float32) * weight
    dsigma = _row_bwd(
        x_ptr + n * V, target, head, noise, logp, entropy, lse, dlogp * weight,
        dentropy, entropy_coef is not None, V, Q, BLOCK_Q,
    )  # fmt: skip
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + n, dsigma)


def head_token_loss(
    x: Tensor, targets: Tensor, head: Head, rows: LossRows, objective: Objective
) -> tuple[HeadRows, Tensor | None]:
    """Replace logits x (n, V) by the gradient of sum(weight * row_loss), in one launch. float64: the reference's.

    Returns what head_fwd returns, and dsigma () or None.
    """
    if x.dtype == torch.float64:
        return reference.head_token_loss(x, targets, head, rows, objective)
    out = _empty_rows(x)
    dsigma = _empty_dsigma(x, head)
    dual_clip, kl_coef, entropy_coef = objective.dual_clip, objective.kl_coef, objective.entropy_coef
    if len(x):
        with on_device(x):
            _head_token_loss_kernel[(len(x),)](
                x, *_contiguous(targets, head.temperature), *out, dsigma,
                *_contiguous(rows.denominator, rows.advantages, rows.weight, rows.is_weight),
                *_contiguous(rows.ref_logp if kl_coef > 0 else None),
                float(1 - objective.clip_low), float(1 + objective.clip_high),
                None if dual_clip is None else float(dual_clip),
                float(kl_coef) if kl_coef > 0 else None,
                float(entropy_coef) if entropy_coef != 0 else None,
                *_head_args(x, head), objective.kl,
            )  # fmt: skip
    return out, None if dsigma is None else dsigma.sum()


# ------------------------------------------------------------------ launching


def _head_args(x: Tensor, head: Head) -> tuple[Tensor | float | int | None, ...]:
    """sigma_ptr, the stream, logit_scale, softcap, V, Q, BLOCK_Q."""
    vocabulary = x.shape[1]
    quarter = triton.cdiv(vocabulary, 4)
    stream = (None, 0, 0, 0, 0, 0) if head.sigma is None or head.stream is None else stream_args(head.stream)
    softcap = None if head.softcap is None else float(head.softcap)
    # four groups a thread: one 128-bit load of float32, and registers enough for Philox and both pairs of normals
    largest = MAX_TILE if head.sigma is None else MAX_TILE // 2
    block_q = min(largest, triton.next_power_of_2(quarter))
    return head.sigma, *stream, float(head.logit_scale), softcap, vocabulary, quarter, block_q


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The rows' numbers as the kernels read them, one after another: an expanded scalar is not."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _empty_rows(x: Tensor) -> HeadRows:
    return HeadRows(*(torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(3)))


def _empty_dsigma(x: Tensor, head: Head) -> Tensor | None:
    """One partial sum a row, added up in a fixed order afterwards."""
    return None if head.sigma is None else torch.empty(len(x), dtype=torch.float32, device=x.device)
