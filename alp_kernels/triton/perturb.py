"""u = h + sigma * rms * eps(seed, step, layer, row, channel).   h, u (N, D); sigma () float32; rms (N,) float32 or 1.

Backward: dh = du; dsigma = sum(du * rms * eps).   Derivation: docs/math.md, section 1

A tile is BLOCK_N rows by BLOCK_Q channel groups q. A group's channels q, Q + q, 2Q + q, 3Q + q share one Philox call and
belong to four contiguous streams. A program processes `blocks` tiles, one below the other. Neither size changes a bit of
u. D is a compile-time constant, so the four streams are one address and three offsets, and whole tiles need no masks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..stream import ROUNDING_BIT, Stream
from .noise import (
    STREAM_ARGS,
    coordinates,
    four_normals,
    laid_out_like,
    multiprocessors,
    on_device,
    row_identity,
    stream_args,
    stream_words,
    tile,
)
from .rounding import round_nearest, round_stochastic, widen

ROUNDING_LAYER = tl.constexpr(ROUNDING_BIT)
RMS_BLOCK = 1024
"""Tile size of a row's mean square. Fixed, because another size would sum in another order."""
WAVE = 32
"""Target number of programs per multiprocessor: several rounds, so that the last one leaves little of it idle."""
MAX_BLOCKS = 8
"""Most tiles per program; from this number on the prologue costs less than one instruction per element."""


@triton.jit
def load_channels(
    row_ptr, n, q, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Channels q, Q + q, 2Q + q, 3Q + q of rows n in float32, 0 outside the tensor."""
    Q: tl.constexpr = (D + 3) // 4
    if BLOCK_N == 1 and D % (4 * BLOCK_Q) == 0:
        x0 = tl.load(row_ptr + q)
        x1 = tl.load(row_ptr + (Q + q))
        x2 = tl.load(row_ptr + (2 * Q + q))
        x3 = tl.load(row_ptr + (3 * Q + q))
    else:
        in_tile = q < Q
        if BLOCK_N > 1:
            in_tile = in_tile & (n < N)
        x0 = tl.load(row_ptr + q, mask=in_tile, other=0.0)
        x1 = tl.load(row_ptr + (Q + q), mask=in_tile & (Q + q < D), other=0.0)
        x2 = tl.load(row_ptr + (2 * Q + q), mask=in_tile & (2 * Q + q < D), other=0.0)
        x3 = tl.load(row_ptr + (3 * Q + q), mask=in_tile & (3 * Q + q < D), other=0.0)
    return widen(x0), widen(x1), widen(x2), widen(x3)


@triton.jit
def store_channels(row_ptr, x, n, q, N, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The reverse of load_channels, for tiles in the tensor's dtype."""
    Q: tl.constexpr = (D + 3) // 4
    for j in tl.static_range(4):
        if BLOCK_N == 1 and D % (4 * BLOCK_Q) == 0:
            tl.store(row_ptr + (j * Q + q), x[j])
        elif BLOCK_N == 1:
            tl.store(row_ptr + (j * Q + q), x[j], mask=(q < Q) & (j * Q + q < D))
        else:
            tl.store(row_ptr + (j * Q + q), x[j], mask=(n < N) & (q < Q) & (j * Q + q < D))


@triton.jit
def perturbed(
    h, q, size, row, seed_lo, seed_hi, step, layer, dtype: tl.constexpr, IS_STOCHASTIC: tl.constexpr
):  # fmt: skip
    """h + size * eps for four float32 tiles, rounded to dtype."""
    groups = laid_out_like(q, h[0])
    e0, e1, e2, e3 = four_normals(groups, row, seed_lo, seed_hi, step, layer)
    size = tl.broadcast_to(size, e0.shape)
    u0 = tl.fma(size, e0, h[0])
    u1 = tl.fma(size, e1, h[1])
    u2 = tl.fma(size, e2, h[2])
    u3 = tl.fma(size, e3, h[3])
    if IS_STOCHASTIC:
        w0, w1, w2, w3 = stream_words(groups, row, seed_lo, seed_hi, step, layer.to(tl.uint32) | ROUNDING_LAYER)
        u0 = round_stochastic(u0, w0, dtype)
        u1 = round_stochastic(u1, w1, dtype)
        u2 = round_stochastic(u2, w2, dtype)
        u3 = round_stochastic(u3, w3, dtype)
    else:
        u0 = round_nearest(u0, dtype)
        u1 = round_nearest(u1, dtype)
        u2 = round_nearest(u2, dtype)
        u3 = round_nearest(u3, dtype)
    return u0, u1, u2, u3


def launch_tiles(
    num_rows: int, num_channels: int, device: torch.device
) -> tuple[tuple[int, int], int, tuple[int, int]]:
    """The grid, the number of tiles per program, and (BLOCK_N, BLOCK_Q)."""
    block_n, block_q = tile(num_channels)
    down, across = triton.cdiv(num_rows, block_n), triton.cdiv(triton.cdiv(num_channels, 4), block_q)
    blocks = max(1, min(MAX_BLOCKS, down * across // (WAVE * multiprocessors(device))))
    return (triton.cdiv(down, blocks), across), blocks, (block_n, block_q)


@triton.jit(do_not_specialize=["N", "blocks", *STREAM_ARGS])
def _perturb_fwd_kernel(
    h_ptr, sigma_ptr, rms_ptr, u_ptr, row_ids_ptr,  # (N, D), (), (N,) or None, (N, D), (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    at_ptr,  # (2,) int64 or None
    N, blocks,
    D: tl.constexpr, IS_STOCHASTIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    sigma = tl.load(sigma_ptr)
    step, row_start = coordinates(at_ptr, step, row_start)
    first = tl.program_id(0) * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(N, BLOCK_N))):
        n = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        row = row_identity(n, row_ids_ptr, row_start, n < N)
        size = sigma
        if rms_ptr is not None:
            size = size * tl.load(rms_ptr + n, mask=n < N, other=0.0)
        h = load_channels(h_ptr + n * D, n, q, N, D, BLOCK_N, BLOCK_Q)
        u = perturbed(h, q, size, row, seed_lo, seed_hi, step, layer, u_ptr.dtype.element_ty, IS_STOCHASTIC)
        store_channels(u_ptr + n * D, u, n, q, N, D, BLOCK_N, BLOCK_Q)


def perturb_fwd(h: Tensor, sigma: Tensor, stream: Stream, scale: str, rounding: str) -> tuple[Tensor, Tensor | None]:
    """u like h (..., D), and rms (N,) float32 or None. float64 uses the reference."""
    if h.dtype == torch.float64:
        return reference.perturb_fwd(h, sigma, stream, scale, rounding)
    num_rows, num_channels = h.numel() // h.shape[-1], h.shape[-1]
    u = torch.empty_like(h)
    rms = torch.empty(num_rows, dtype=torch.float32, device=h.device) if scale == "rms" else None
    is_stochastic = rounding == "stochastic" and h.dtype != torch.float32
    grid, blocks, tiles = launch_tiles(num_rows, num_channels, h.device)
    if num_rows:
        with on_device(h):
            if rms is not None:
                row_rms_kernel[(num_rows,)](h, rms, num_channels, RMS_BLOCK)
            _perturb_fwd_kernel[grid](
                h, sigma, rms, u, *stream_args(stream), stream.at, num_rows, blocks, num_channels, is_stochastic, *tiles
            )
    return u, rms


@triton.jit
def row_rms_kernel(h_ptr, rms_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """rms_n = sqrt(mean_d h^2); a separate kernel, so that the order of the sum does not depend on the noise tiles."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = tl.fma(h, h, total)
    tl.store(rms_ptr + n, tl.sqrt_rn(tl.div_rn(tl.sum(total), tl.cast(D, tl.float32))))


@triton.jit(do_not_specialize=["N", "blocks", *STREAM_ARGS])
def _perturb_bwd_kernel(
    du_ptr, rms_ptr, partials_ptr, row_ids_ptr,  # (N, D), (N,) or None, (programs,) float32, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    at_ptr,  # (2,) int64 or None
    N, blocks,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    step, row_start = coordinates(at_ptr, step, row_start)
    first = tl.program_id(0) * blocks
    total = tl.zeros([BLOCK_N, BLOCK_Q], dtype=tl.float32)
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(N, BLOCK_N))):
        n = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        row = row_identity(n, row_ids_ptr, row_start, n < N)
        du = load_channels(du_ptr + n * D, n, q, N, D, BLOCK_N, BLOCK_Q)
        eps = four_normals(laid_out_like(q, du[0]), row, seed_lo, seed_hi, step, layer)
        of_row = tl.fma(du[0], eps[0], tl.fma(du[1], eps[1], tl.fma(du[2], eps[2], du[3] * eps[3])))
        if rms_ptr is None:
            total += of_row
        else:
            rms = tl.load(rms_ptr + n, mask=n < N, other=0.0)
            # a row whose du is zero adds nothing, even if its rms is NaN or inf
            total = tl.where(of_row == 0.0, total, tl.fma(tl.broadcast_to(rms, of_row.shape), of_row, total))
    tl.store(partials_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.sum(total, axis=1)))


def perturb_bwd(du: Tensor, stream: Stream, rms: Tensor | None) -> Tensor:
    """dsigma () float32: one partial sum per program, then their sum, both in a fixed order. float64 uses the reference."""
    if du.dtype == torch.float64:
        return reference.perturb_bwd(du, stream, rms)
    num_rows, num_channels = du.numel() // du.shape[-1], du.shape[-1]
    grid, blocks, tiles = launch_tiles(num_rows, num_channels, du.device)
    partials = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=du.device)
    if num_rows:
        with on_device(du):
            _perturb_bwd_kernel[grid](
                du, rms, partials, *stream_args(stream), stream.at, num_rows, blocks, num_channels, *tiles
            )
    return partials.sum()


@triton.jit
def _measure_kernel(
    h_ptr, u_ptr, sums_ptr,  # (N, D), (N, D), (programs, 3) float32
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    noise = tl.zeros([BLOCK_D], dtype=tl.float32)
    changed = tl.zeros([BLOCK_D], dtype=tl.float32)
    size = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        difference = tl.load(u_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32) - h
        noise = tl.fma(difference, difference, noise)
        changed += (difference != 0.0).to(tl.float32)
        size = tl.fma(h, h, size)
    tl.store(sums_ptr + 3 * n, tl.sum(noise))
    tl.store(sums_ptr + (3 * n + 1), tl.sum(changed))
    tl.store(sums_ptr + (3 * n + 2), tl.sum(size))


def measure(h: Tensor, u: Tensor, num_rows: int) -> Tensor:
    """(num_rows, 3) float32, sums over each row: (u - h)^2, number of differing elements, h^2. float64 uses the reference."""
    if h.dtype == torch.float64:
        return reference.measure(h, u, num_rows)
    sums = torch.empty(num_rows, 3, dtype=torch.float32, device=h.device)
    if num_rows:
        with on_device(h):
            _measure_kernel[(num_rows,)](h, u, sums, h.shape[-1], RMS_BLOCK)
    return sums
