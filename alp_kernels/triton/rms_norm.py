"""u = h + sigma * rms * eps and y = RMSNorm(u) (offset + weight) in one pass.   h, u, y (N, D); weight (D,); rstd, rms (N,)

g = dy (offset + weight);  x = u rstd;  dh = du + rstd (g - x mean(g x));  dsigma = sum(dh * rms * eps);  dweight = sum_n dy x

In the forward kernel a row of up to 4 * BLOCK_Q channels stays in registers; u of a longer row is read back twice. u is
bitwise equal to perturb_fwd's. Each backward program owns consecutive rows and writes one partial sum of dsigma and dweight.
A row whose dy is all zero has dh = du and adds nothing to dweight, even if its u is NaN or inf.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Norm
from ..stream import Stream
from .noise import STREAM_ARGS, four_normals, laid_out_like, multiprocessors, on_device, row_identity, stream_args
from .perturb import RMS_BLOCK, load_channels, perturbed, row_rms_kernel, store_channels
from .rounding import round_nearest

MAX_GROUPS = 2048
"""Most channel groups of a row that stay in registers: eight per thread for 256 threads."""
PROGRAMS = 4
"""Backward programs per multiprocessor."""


# ------------------------------------------------------------------ forward


@triton.jit
def _square_sum(u, total):
    for j in tl.static_range(4):
        x = u[j].to(tl.float32)
        total = tl.fma(x, x, total)
    return total


@triton.jit
def _normed(u, weight, rstd, offset, dtype: tl.constexpr):
    y0 = round_nearest(u[0].to(tl.float32) * rstd * (weight[0] + offset), dtype)
    y1 = round_nearest(u[1].to(tl.float32) * rstd * (weight[1] + offset), dtype)
    y2 = round_nearest(u[2].to(tl.float32) * rstd * (weight[2] + offset), dtype)
    y3 = round_nearest(u[3].to(tl.float32) * rstd * (weight[3] + offset), dtype)
    return y0, y1, y2, y3


@triton.jit
def _rstd(total, norm_eps, D: tl.constexpr):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total, tl.cast(D, tl.float32)) + norm_eps))


@triton.jit(do_not_specialize=["N", *STREAM_ARGS])
def _perturb_rms_norm_fwd_kernel(
    h_ptr, sigma_ptr, rms_ptr, weight_ptr,  # (N, D), (), (N,) or None, (D,)
    u_ptr, y_ptr, rstd_ptr, row_ids_ptr,  # (N, D), (N, D), (N,), (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    norm_eps, offset, N,
    D: tl.constexpr, IS_STOCHASTIC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = row_identity(n, row_ids_ptr, row_start, True)
    norm_eps = tl.cast(norm_eps, tl.float32)
    offset = tl.cast(offset, tl.float32)
    size = tl.load(sigma_ptr)
    if rms_ptr is not None:
        size = size * tl.load(rms_ptr + n)
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK_Q)
    total = tl.zeros([BLOCK_Q], dtype=tl.float32)
    if D <= 4 * BLOCK_Q:
        h = load_channels(h_ptr + n * D, n, lanes, N, D, 1, BLOCK_Q)
        u = perturbed(h, lanes, size, row, seed_lo, seed_hi, step, layer, dtype, IS_STOCHASTIC)
        store_channels(u_ptr + n * D, u, n, lanes, N, D, 1, BLOCK_Q)
        if D % (4 * BLOCK_Q) != 0:
            Q: tl.constexpr = (D + 3) // 4
            zero = tl.zeros([BLOCK_Q], dtype=dtype)  # clears the noise outside the row
            u = (
                tl.where(lanes < Q, u[0], zero),
                tl.where(Q + lanes < tl.minimum(2 * Q, D), u[1], zero),
                tl.where(2 * Q + lanes < tl.minimum(3 * Q, D), u[2], zero),
                tl.where(3 * Q + lanes < D, u[3], zero),
            )
        rstd = _rstd(tl.sum(_square_sum(u, total), axis=0), norm_eps, D)
        weight = load_channels(weight_ptr, n, lanes, N, D, 1, BLOCK_Q)
        y = _normed(u, weight, rstd, offset, dtype)
        store_channels(y_ptr + n * D, y, n, lanes, N, D, 1, BLOCK_Q)
    else:
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            h = load_channels(h_ptr + n * D, n, start + lanes, N, D, 1, BLOCK_Q)
            u = perturbed(h, start + lanes, size, row, seed_lo, seed_hi, step, layer, dtype, IS_STOCHASTIC)
            store_channels(u_ptr + n * D, u, n, start + lanes, N, D, 1, BLOCK_Q)
        tl.debug_barrier()  # what one thread stored, another may read
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            total = _square_sum(load_channels(u_ptr + n * D, n, start + lanes, N, D, 1, BLOCK_Q), total)
        rstd = _rstd(tl.sum(total, axis=0), norm_eps, D)
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            u = load_channels(u_ptr + n * D, n, start + lanes, N, D, 1, BLOCK_Q)
            weight = load_channels(weight_ptr, n, start + lanes, N, D, 1, BLOCK_Q)
            y = _normed(u, weight, rstd, offset, dtype)
            store_channels(y_ptr + n * D, y, n, start + lanes, N, D, 1, BLOCK_Q)
    tl.store(rstd_ptr + n, rstd)


def perturb_rms_norm_fwd(
    h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u, y (N, D) like h, rstd (N,) float32, and rms (N,) float32 or None. float64 uses the reference."""
    if h.dtype == torch.float64:
        return reference.perturb_rms_norm_fwd(h, sigma, stream, scale, rounding, norm)
    num_rows, num_channels = h.shape
    u, y = torch.empty_like(h), torch.empty_like(h)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=h.device)
    rms = torch.empty_like(rstd) if scale == "rms" else None
    block_q, num_warps = _row_tile(num_channels, 8)
    if num_rows:
        with on_device(h):
            if rms is not None:
                row_rms_kernel[(num_rows,)](h, rms, num_channels, RMS_BLOCK)
            _perturb_rms_norm_fwd_kernel[(num_rows,)](
                h, sigma, rms, norm.weight, u, y, rstd, *stream_args(stream), float(norm.eps), float(norm.offset),
                num_rows, num_channels, rounding == "stochastic" and h.dtype != torch.float32, block_q,
                num_warps=num_warps,
            )  # fmt: skip
    return u, y, rstd, rms


# ------------------------------------------------------------------ backward


@triton.jit
def _dot(u, dy, weight, rstd, offset, total, bits):
    """Adds g x to total; bits collects dy's, so that a row of zeros can be told."""
    for j in tl.static_range(4):
        total = tl.fma(dy[j] * (weight[j] + offset), u[j] * rstd, total)
        bits = bits | dy[j].to(tl.int32, bitcast=True)
    return total, bits


@triton.jit
def _unless(is_off, u):
    """u, or zeros."""
    u0 = tl.where(is_off, 0.0, u[0])
    u1 = tl.where(is_off, 0.0, u[1])
    u2 = tl.where(is_off, 0.0, u[2])
    u3 = tl.where(is_off, 0.0, u[3])
    return u0, u1, u2, u3


@triton.jit
def _total(du, dy, u, weight, rstd, offset, mean):
    """du + rstd (g - x mean)."""
    return tl.fma(rstd, tl.fma(-(u * rstd), mean, dy * (weight + offset)), du)


@triton.jit(do_not_specialize=["N", "rows", *STREAM_ARGS])
def _perturb_rms_norm_bwd_kernel(
    du_ptr, dy_ptr, u_ptr, weight_ptr, rstd_ptr, rms_ptr,  # (N, D) thrice, (D,), (N,), (N,) or None
    dh_ptr, dsigma_ptr, dweight_ptr, row_ids_ptr,  # (N, D), (P,) or None, (P, D) float32 or None, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    offset, N, rows,
    D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    offset = tl.cast(offset, tl.float32)
    lanes = tl.arange(0, BLOCK_Q)
    first = tl.program_id(0) * rows
    dsigma = tl.zeros([BLOCK_Q], dtype=tl.float32)
    zero = tl.zeros([BLOCK_Q], dtype=tl.float32)
    if dweight_ptr is not None:
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            store_channels(dweight_ptr + p * D, (zero, zero, zero, zero), p, start + lanes, p + 1, D, 1, BLOCK_Q)
    for i in range(first, tl.minimum(first + rows, N)):
        n = tl.cast(i, tl.int64)
        row = row_identity(n, row_ids_ptr, row_start, True)
        rstd = tl.load(rstd_ptr + n)
        dot = tl.zeros([BLOCK_Q], dtype=tl.float32)
        bits = tl.zeros([BLOCK_Q], dtype=tl.int32)
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            u = load_channels(u_ptr + n * D, n, start + lanes, N, D, 1, BLOCK_Q)
            dy = load_channels(dy_ptr + n * D, n, start + lanes, N, D, 1, BLOCK_Q)
            weight = load_channels(weight_ptr, n, start + lanes, N, D, 1, BLOCK_Q)
            dot, bits = _dot(u, dy, weight, rstd, offset, dot, bits)
        mean = tl.div_rn(tl.sum(dot, axis=0), tl.cast(D, tl.float32))
        is_off = tl.max(bits & 0x7FFFFFFF, axis=0) == 0  # dy is zero, of either sign
        rstd = tl.where(is_off, 0.0, rstd)
        mean = tl.where(is_off, 0.0, mean)
        of_row = tl.zeros([BLOCK_Q], dtype=tl.float32)
        for start in range(0, (D + 3) // 4, BLOCK_Q):
            q = start + lanes
            du = load_channels(du_ptr + n * D, n, q, N, D, 1, BLOCK_Q)
            dy = load_channels(dy_ptr + n * D, n, q, N, D, 1, BLOCK_Q)
            u = load_channels(u_ptr + n * D, n, q, N, D, 1, BLOCK_Q)
            u = _unless(is_off, u)
            weight = load_channels(weight_ptr, n, q, N, D, 1, BLOCK_Q)
            t0 = _total(du[0], dy[0], u[0], weight[0], rstd, offset, mean)
            t1 = _total(du[1], dy[1], u[1], weight[1], rstd, offset, mean)
            t2 = _total(du[2], dy[2], u[2], weight[2], rstd, offset, mean)
            t3 = _total(du[3], dy[3], u[3], weight[3], rstd, offset, mean)
            dtype: tl.constexpr = dh_ptr.dtype.element_ty
            dh = (
                round_nearest(t0, dtype),
                round_nearest(t1, dtype),
                round_nearest(t2, dtype),
                round_nearest(t3, dtype),
            )
            store_channels(dh_ptr + n * D, dh, n, q, N, D, 1, BLOCK_Q)
            if dsigma_ptr is not None:
                e0, e1, e2, e3 = four_normals(laid_out_like(q, t0), row, seed_lo, seed_hi, step, layer)
                of_row = tl.fma(t0, e0, tl.fma(t1, e1, tl.fma(t2, e2, tl.fma(t3, e3, of_row))))
            if dweight_ptr is not None:
                sums = load_channels(dweight_ptr + p * D, n, q, N, D, 1, BLOCK_Q)
                s0 = tl.fma(dy[0], u[0] * rstd, sums[0])
                s1 = tl.fma(dy[1], u[1] * rstd, sums[1])
                s2 = tl.fma(dy[2], u[2] * rstd, sums[2])
                s3 = tl.fma(dy[3], u[3] * rstd, sums[3])
                store_channels(dweight_ptr + p * D, (s0, s1, s2, s3), n, q, N, D, 1, BLOCK_Q)
        if rms_ptr is not None:
            of_row = tl.where(of_row == 0.0, 0.0, of_row * tl.load(rms_ptr + n))
        dsigma += of_row
    if dsigma_ptr is not None:
        tl.store(dsigma_ptr + p, tl.sum(dsigma, axis=0))


def perturb_rms_norm_bwd(
    du: Tensor,
    dy: Tensor,
    u: Tensor,
    rstd: Tensor,
    rms: Tensor | None,
    stream: Stream,
    norm: Norm,
    needs_dsigma: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh (N, D) like du, dsigma () float32 or None, dweight (D,) like weight or None. float64 uses the reference."""
    if u.dtype == torch.float64:
        return reference.perturb_rms_norm_bwd(du, dy, u, rstd, rms, stream, norm, needs_dsigma, needs_dweight)
    num_rows, num_channels = u.shape
    rows = max(1, triton.cdiv(num_rows, PROGRAMS * multiprocessors(u.device)))
    programs = triton.cdiv(num_rows, rows)
    dh = torch.empty_like(du)
    dsigma = torch.empty(programs, dtype=torch.float32, device=u.device) if needs_dsigma else None
    dweight = torch.empty(programs, num_channels, dtype=torch.float32, device=u.device) if needs_dweight else None
    # groups per thread; with eight groups of 16-bit tensors, combining them with their noise would need shared memory
    block_q, num_warps = _row_tile(num_channels, 8 if u.dtype == torch.float32 else 4)
    if num_rows:
        with on_device(u):
            _perturb_rms_norm_bwd_kernel[(programs,)](
                du, dy, u, norm.weight, rstd, rms, dh, dsigma, dweight, *stream_args(stream), float(norm.offset),
                num_rows, rows, num_channels, block_q, num_warps=num_warps,
            )  # fmt: skip
    return (
        dh,
        None if dsigma is None else dsigma.sum(),
        None if dweight is None else dweight.sum(dim=0).to(norm.weight.dtype),
    )


def _row_tile(num_channels: int, groups_a_thread: int) -> tuple[int, int]:
    """BLOCK_Q and its number of warps; a row too long for registers is split into smaller pieces, which do not spill."""
    quarter = triton.cdiv(num_channels, 4)
    block_q = triton.next_power_of_2(quarter) if quarter <= MAX_GROUPS else MAX_GROUPS // 2
    return block_q, max(1, min(8, block_q // (32 * groups_a_thread)))
