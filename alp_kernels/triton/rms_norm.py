"""u = h + sigma * rms * eps and y = u rstd (offset + weight) in one kernel; rstd = 1 / sqrt(mean_d u^2 + norm_eps).

du, dy arrive; g = dy (offset + weight); x = u rstd;  dh = du + rstd (g - x mean(g x));  dsigma = sum(dh * rms * eps);
dweight = sum_n dy x.   h, u, y, du, dy, dh (N, D); weight, dweight (D,); rstd, rms (N,).   Derivation: docs/math.md, section 1

Forward: a program owns a row and keeps it in registers. Backward: a program walks the rows p, p + P, p + 2P, ... and keeps
its share of dweight in registers; a row's second look at dy, u and weight comes from the cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..noise import Stream
from ..reference import Norm
from .noise import STREAM_ARGS, four_normals, on_device, row_identity, stream_args, stream_words
from .perturb import RMS_BLOCK, ROUNDING_LAYER, _row_rms_kernel, perturb_bwd, perturb_fwd
from .rounding import round_nearest, round_stochastic

LONGEST_ROW = 8192
"""Channels of a row that 256 threads hold in registers, with its noise; longer ones go through perturb_fwd and PyTorch."""

PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _stored(h_ptr, u_ptr, d, in_row, size, eps, word, IS_STOCHASTIC: tl.constexpr):
    """Store channels d of u and return them as stored, in float32; 0 outside the row."""
    h = tl.load(h_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    u = tl.fma(tl.broadcast_to(size, eps.shape), eps, h)
    if IS_STOCHASTIC:
        u = round_stochastic(u, word, u_ptr.dtype.element_ty)
    else:
        u = round_nearest(u, u_ptr.dtype.element_ty)
    tl.store(u_ptr + d, u, mask=in_row)
    return tl.where(in_row, u.to(tl.float32), 0.0)


@triton.jit
def _store_norm(y_ptr, weight_ptr, d, in_row, u, rstd, offset):
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + d, round_nearest(u * rstd * weight, y_ptr.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=STREAM_ARGS)
def _perturb_rms_norm_fwd_kernel(
    h_ptr, weight_ptr, sigma_ptr, rms_ptr,  # (N, D), (D,), (), (N,) or None
    u_ptr, y_ptr, rstd_ptr, row_ids_ptr,  # (N, D), (N, D), (N,) float32, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    D, Q, norm_eps, offset,
    IS_STOCHASTIC: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    row = row_identity(n, row_ids_ptr, row_start, True)
    size = tl.load(sigma_ptr)
    if rms_ptr is not None:
        size = size * tl.load(rms_ptr + n)
    e0, e1, e2, e3 = four_normals(q, row, seed_lo, seed_hi, step, layer)
    w0, w1, w2, w3 = 0, 0, 0, 0
    if IS_STOCHASTIC:
        w0, w1, w2, w3 = stream_words(q, row, seed_lo, seed_hi, step, layer.to(tl.uint32) | ROUNDING_LAYER)
    h_ptr += n * D
    u_ptr += n * D
    y_ptr += n * D
    in_quarter = q < Q
    in_last = in_quarter & (3 * Q + q < D)  # of D = 5 and Q = 2 the third quarter is cut too
    in_third = in_quarter & (2 * Q + q < D)
    in_second = in_quarter & (Q + q < D)
    u0 = _stored(h_ptr, u_ptr, q, in_quarter, size, e0, w0, IS_STOCHASTIC)
    u1 = _stored(h_ptr, u_ptr, Q + q, in_second, size, e1, w1, IS_STOCHASTIC)
    u2 = _stored(h_ptr, u_ptr, 2 * Q + q, in_third, size, e2, w2, IS_STOCHASTIC)
    u3 = _stored(h_ptr, u_ptr, 3 * Q + q, in_last, size, e3, w3, IS_STOCHASTIC)
    square = tl.sum(tl.fma(u0, u0, tl.fma(u1, u1, tl.fma(u2, u2, u3 * u3))), axis=0)
    mean = tl.div_rn(square, D.to(tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(mean + tl.cast(norm_eps, tl.float32)))
    tl.store(rstd_ptr + n, rstd)
    offset = tl.cast(offset, tl.float32)
    _store_norm(y_ptr, weight_ptr, q, in_quarter, u0, rstd, offset)
    _store_norm(y_ptr, weight_ptr, Q + q, in_second, u1, rstd, offset)
    _store_norm(y_ptr, weight_ptr, 2 * Q + q, in_third, u2, rstd, offset)
    _store_norm(y_ptr, weight_ptr, 3 * Q + q, in_last, u3, rstd, offset)


def perturb_rms_norm_fwd(
    h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str, norm: Norm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """u, y (N, D) in h's dtype, rstd (N,) float32, and rms (N,) float32 or None. float64: the reference's."""
    if h.dtype == torch.float64:
        return reference.perturb_rms_norm_fwd(h, sigma, stream, scale, rounding, norm)
    num_rows, num_channels = h.shape
    if num_channels > LONGEST_ROW:
        u, rms = perturb_fwd(h, sigma, stream, scale, rounding)
        return *reference.rms_norm(u, norm), rms
    u, y = torch.empty_like(h), torch.empty_like(h)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=h.device)
    rms = torch.empty_like(rstd) if scale == "rms" else None
    quarter, block_q, num_warps = _tile(num_channels)
    if num_rows:
        with on_device(h):
            if rms is not None:
                _row_rms_kernel[(num_rows,)](h, rms, num_channels, RMS_BLOCK)
            _perturb_rms_norm_fwd_kernel[(num_rows,)](
                h, norm.weight, sigma, rms, u, y, rstd, *stream_args(stream), num_channels, quarter,
                float(norm.eps), float(norm.offset), rounding == "stochastic" and h.dtype != torch.float32, block_q,
                num_warps=num_warps,
            )  # fmt: skip
    return u, y, rstd, rms


@triton.jit
def _normed(dy_ptr, u_ptr, weight_ptr, d, in_row, rstd, offset):
    """dy, g and x of channels d."""
    dy = tl.load(dy_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    x = tl.load(u_ptr + d, mask=in_row, other=0.0).to(tl.float32) * rstd
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    return dy, dy * (weight + offset), x


@triton.jit(do_not_specialize=["N", *STREAM_ARGS])
def _perturb_rms_norm_bwd_kernel(
    du_ptr, dy_ptr, u_ptr, weight_ptr, rstd_ptr, rms_ptr,  # (N, D) three times, (D,), (N,), (N,) or None
    dh_ptr, dsigma_ptr, dweight_ptr, row_ids_ptr,  # (N, D), (N,) or None, (P, 4 Q) float32 or None, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    N, D, Q, offset,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    q = tl.arange(0, BLOCK_Q)
    in_quarter = q < Q
    offset = tl.cast(offset, tl.float32)
    dweight0 = tl.zeros([BLOCK_Q], tl.float32)
    dweight1 = tl.zeros([BLOCK_Q], tl.float32)
    dweight2 = tl.zeros([BLOCK_Q], tl.float32)
    dweight3 = tl.zeros([BLOCK_Q], tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        n = tl.cast(n, tl.int64)
        at = n * D
        rstd = tl.load(rstd_ptr + n)
        product = tl.zeros([BLOCK_Q], tl.float32)
        for j in tl.static_range(4):
            d = j * Q + q
            dy, g, x = _normed(dy_ptr + at, u_ptr + at, weight_ptr, d, in_quarter & (d < D), rstd, offset)
            product = tl.fma(g, x, product)
            if dweight_ptr is not None:
                if j == 0:
                    dweight0 = tl.fma(dy, x, dweight0)
                elif j == 1:
                    dweight1 = tl.fma(dy, x, dweight1)
                elif j == 2:
                    dweight2 = tl.fma(dy, x, dweight2)
                else:
                    dweight3 = tl.fma(dy, x, dweight3)
        mean = tl.div_rn(tl.sum(product, axis=0), D.to(tl.float32))
        eps = (0.0, 0.0, 0.0, 0.0)
        if dsigma_ptr is not None:
            row = row_identity(n, row_ids_ptr, row_start, True)
            eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
        dsigma = tl.zeros([BLOCK_Q], tl.float32)
        for j in tl.static_range(4):
            d = j * Q + q
            in_row = in_quarter & (d < D)
            _, g, x = _normed(dy_ptr + at, u_ptr + at, weight_ptr, d, in_row, rstd, offset)
            du = tl.load(du_ptr + at + d, mask=in_row, other=0.0).to(tl.float32)
            dh = tl.fma(rstd, tl.fma(-x, mean, g), du)
            tl.store(dh_ptr + at + d, round_nearest(dh, dh_ptr.dtype.element_ty), mask=in_row)
            if dsigma_ptr is not None:
                dsigma = tl.fma(dh, eps[j], dsigma)  # outside the row dh is 0
        if dsigma_ptr is not None:
            total = tl.sum(dsigma, axis=0)
            if rms_ptr is not None:
                total *= tl.load(rms_ptr + n)
            tl.store(dsigma_ptr + n, total)
    if dweight_ptr is not None:
        dweight_ptr += tl.program_id(0).to(tl.int64) * 4 * Q + q
        tl.store(dweight_ptr, dweight0, mask=in_quarter)
        tl.store(dweight_ptr + Q, dweight1, mask=in_quarter)
        tl.store(dweight_ptr + 2 * Q, dweight2, mask=in_quarter)
        tl.store(dweight_ptr + 3 * Q, dweight3, mask=in_quarter)


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
    """dh (N, D), dsigma () float32 from a partial sum a row, dweight (D,) from one a program, each in a fixed order."""
    num_rows, num_channels = u.shape
    if u.dtype == torch.float64:
        return reference.perturb_rms_norm_bwd(du, dy, u, rstd, rms, stream, norm, needs_dsigma, needs_dweight)
    if num_channels > LONGEST_ROW:
        total, dweight = reference.rms_norm_bwd(du, dy, u, rstd, norm, needs_dweight)
        return total.to(u.dtype), perturb_bwd(total, stream, rms) if needs_dsigma else None, dweight
    dh = torch.empty_like(u)
    quarter, block_q, num_warps = _tile(num_channels)
    programs = min(num_rows, _most_programs(u.device))
    dsigma = torch.empty(num_rows, dtype=torch.float32, device=u.device) if needs_dsigma else None
    dweight = torch.empty(programs, 4 * quarter, dtype=torch.float32, device=u.device) if needs_dweight else None
    if num_rows:
        with on_device(u):
            _perturb_rms_norm_bwd_kernel[(programs,)](
                du, dy, u, norm.weight, rstd, rms, dh, dsigma, dweight, *stream_args(stream),
                num_rows, num_channels, quarter, float(norm.offset), block_q, num_warps=2 * num_warps,
            )  # fmt: skip
    whole = None if dweight is None else dweight.sum(dim=0)[:num_channels].to(norm.weight.dtype)
    return dh, None if dsigma is None else dsigma.sum(), whole


def _tile(num_channels: int) -> tuple[int, int, int]:
    """Q, BLOCK_Q for a whole row, and warps for eight channel groups a thread: one 128-bit load of a 16-bit dtype."""
    quarter = triton.cdiv(num_channels, 4)
    block_q = max(16, triton.next_power_of_2(quarter))
    return quarter, block_q, max(1, block_q // 256)


def _most_programs(device: torch.device) -> int:
    """Enough for every multiprocessor of the device; few in the interpreter, so that a program walks several rows."""
    if device.type == "cpu":
        return PROGRAMS_PER_PROCESSOR
    properties = torch.get_device_module(device).get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * getattr(properties, "multi_processor_count", 64)
