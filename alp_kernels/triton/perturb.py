"""u = h + sigma * rms * eps(seed, step, layer, row, channel).   h, u (N, D); sigma () float32; rms (N,) float32 or 1.

du arrives; dh = du; dsigma = sum(du * rms * eps).   Derivation: docs/math.md, section 1

A program owns BLOCK_N rows; in each it walks channel groups q, whose four channels q, Q + q, 2Q + q, 3Q + q share one
Philox call and lie in four contiguous streams. The sizes of the tiles change no bit of u.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..noise import ROUNDING_BIT, Stream
from .noise import STREAM_ARGS, four_normals, on_device, row_identity, stream_args, stream_words, tile
from .rounding import round_nearest, round_stochastic

ROUNDING_LAYER = tl.constexpr(ROUNDING_BIT)
RMS_BLOCK = 1024
"""Tile of the row's mean square. Fixed: another size would sum in another order."""


@triton.jit(do_not_specialize=["N", *STREAM_ARGS])
def _perturb_fwd_kernel(
    h_ptr, sigma_ptr, rms_ptr, u_ptr, row_ids_ptr,  # (N, D), (), (N,) or None, (N, D), (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    N, D, Q,
    IS_STOCHASTIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    in_tile = (n < N) & (q < Q)
    row = row_identity(n, row_ids_ptr, row_start, n < N)
    size = tl.load(sigma_ptr)
    if rms_ptr is not None:
        size = size * tl.load(rms_ptr + n, mask=n < N, other=0.0)
    eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
    if IS_STOCHASTIC:
        words = stream_words(q, row, seed_lo, seed_hi, step, layer.to(tl.uint32) | ROUNDING_LAYER)
    for j in tl.static_range(4):
        d = j * Q + q
        h = tl.load(h_ptr + n * D + d, mask=in_tile & (d < D), other=0.0).to(tl.float32)
        u = tl.fma(tl.broadcast_to(size, eps[j].shape), eps[j], h)
        if IS_STOCHASTIC:
            u = round_stochastic(u, words[j], u_ptr.dtype.element_ty)
        else:
            u = round_nearest(u, u_ptr.dtype.element_ty)
        tl.store(u_ptr + n * D + d, u, mask=in_tile & (d < D))


def perturb_fwd(h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str) -> tuple[Tensor, Tensor | None]:
    """u (N, D) in h's dtype, and rms (N,) float32 or None. float64: the reference's."""
    if h.dtype == torch.float64:
        return reference.perturb_fwd(h, sigma, stream, scale, rounding)
    num_rows, num_channels = h.shape
    u = torch.empty_like(h)
    rms = torch.empty(num_rows, dtype=torch.float32, device=h.device) if scale == "rms" else None
    is_stochastic = rounding == "stochastic" and h.dtype != torch.float32
    block_n, block_q = tile(num_channels)
    quarter = triton.cdiv(num_channels, 4)
    grid = (triton.cdiv(num_rows, block_n), triton.cdiv(quarter, block_q))
    if num_rows:
        with on_device(h):
            if rms is not None:
                _row_rms_kernel[(num_rows,)](h, rms, num_channels, RMS_BLOCK)
            _perturb_fwd_kernel[grid](
                h, sigma, rms, u, *stream_args(stream), num_rows, num_channels, quarter, is_stochastic, block_n, block_q
            )
    return u, rms


@triton.jit(do_not_specialize=["D"])
def _row_rms_kernel(h_ptr, rms_ptr, D, BLOCK_D: tl.constexpr):
    """rms_n = sqrt(mean_d h^2); its own kernel, so that no tile of the noise decides the order of the sum."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.fma(h, h, total)
    tl.store(rms_ptr + n, tl.sqrt_rn(tl.div_rn(tl.sum(total), D.to(tl.float32))))


@triton.jit(do_not_specialize=["N", *STREAM_ARGS])
def _perturb_bwd_kernel(
    du_ptr, rms_ptr, partials_ptr, row_ids_ptr,  # (N, D), (N,) or None, (N,) float32, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    N, D, Q,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    row = row_identity(n, row_ids_ptr, row_start, n < N)
    total = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
    for start in range(0, Q, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)[None, :]
        in_tile = (n < N) & (q < Q)
        eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
        for j in tl.static_range(4):
            d = j * Q + q
            du = tl.load(du_ptr + n * D + d, mask=in_tile & (d < D), other=0.0).to(tl.float32)
            total = tl.fma(du, eps[j], total)
    partial = tl.sum(total, axis=1)[:, None]
    if rms_ptr is not None:
        partial *= tl.load(rms_ptr + n, mask=n < N, other=0.0)
    tl.store(partials_ptr + n, partial, mask=n < N)


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma () float32: one partial sum a row, then their sum, both in a fixed order. float64: the reference's."""
    if du.dtype == torch.float64:
        return reference.perturb_bwd(du, stream, rms)
    num_rows, num_channels = du.shape
    partials = torch.empty(num_rows, dtype=torch.float32, device=du.device)
    block_n, block_q = tile(num_channels)
    grid = (triton.cdiv(num_rows, block_n),)
    if num_rows:
        with on_device(du):
            _perturb_bwd_kernel[grid](
                du, rms, partials, *stream_args(stream), num_rows, num_channels, triton.cdiv(num_channels, 4),
                block_n, block_q,
            )  # fmt: skip
    return partials.sum()
