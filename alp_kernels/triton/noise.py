"""(seed, step, layer, row, channel) -> Philox words -> four normals, for tiles of any shape.   Layout: ../stream.py

    w0..w3 = Philox4x32-10((q, row low, layer | row high << 16, step), seed)
    eps    = sqrt(-2 ln u(w0)) (cos, sin)(2 pi w1 / 2^32),  sqrt(-2 ln u(w2)) (cos, sin)(2 pi w3 / 2^32)

NVIDIA GPUs use their special function units; everything else is portable Triton. Every multiply-add is written as tl.fma
or is exact without it, so a compiler cannot change the rounding: the bits of eps do not depend on the kernel or tile that
computes it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..stream import Stream

STREAM_ARGS = ("row_start", "seed_lo", "seed_hi", "step", "layer")
"""Kernel arguments that change from step to step: never specialised, so that no step recompiles."""

MAX_TILE = 1024
"""Channel groups in one tile: eight per thread for 128 threads, one 128-bit load of a 16-bit dtype."""

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 tiles (Salmon et al., SC'11)."""
    for _ in tl.static_range(10):
        # one widening product, not umulhi and a second multiply
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def log_accurate(x):
    """ln x of normal positive float32: relative error below 2e-7, also near x = 1, where tl.log has no relative precision."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = m * 2^exponent with m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # ln(1 + f) = f - f^2 / 2 + f^3 p(f); minimax, relative error 3e-8
    p = tl.fma(f, 0.0870036, -0.14267476)
    p = tl.fma(f, p, 0.14914787)
    p = tl.fma(f, p, -0.16577587)
    p = tl.fma(f, p, 0.19963062)
    p = tl.fma(f, p, -0.25001338)
    p = tl.fma(f, p, 0.3333391)
    p = tl.fma(f, p, -0.5)
    return tl.fma(exponent.to(tl.float32), LN2, tl.fma(f * f, p, f))


@triton.constexpr_function
def is_nvidia():
    """Whether the kernel being compiled is for an NVIDIA GPU and may contain inline PTX."""
    return not triton.knobs.runtime.interpret and tl.target_info.is_cuda()


@triton.jit
def squared_radius(u, log2_u):
    """0.34780172 (-2 ln u) from log2_u, whose absolute error of up to 2^-22 is too large near u = 1.

    Takes the larger of two lower bounds: log2_u less its worst error, and a polynomial that is close only near u = 1.
    """
    v = 1.0 - u
    return tl.maximum(tl.fma(log2_u, -0.48215556, -1.1529e-07), v * tl.fma(v, 0.35145363, 0.6956034))


@triton.jit
def scaled_radius(word):
    """0.58974717 sqrt(-2 ln u(word)); scaled to below 4, where the last bit of the square root matters least.

    docs/kernels.md shows why the approximate units stay within NORMAL_BOUND.
    """
    u = tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # w 2^-32 + 2^-33
    if is_nvidia():
        log2_u = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, is_pure=True, pack=1)
        squared = squared_radius(u, log2_u)
        radius = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [squared], tl.float32, is_pure=True, pack=1
        )
    else:
        radius = tl.sqrt(log_accurate(u) * -0.69560343)
    return radius


@triton.jit
def on_circle(radius, angle_word):
    """(cos, sin)(2 pi angle_word / 2^32) times the radius; the argument is the radius scaled by 0.58974717."""
    # angle = pi k + y with y in [-pi/2, pi/2); |y| = pi/4 + (pi/2) a with a in [-1/2, 1/2]
    # the top bit of the angle is the sign of the sine; xor with the next bit, the sign of y, gives the cosine's sign
    doubled = angle_word << 1
    y = doubled.to(tl.int32, bitcast=True).to(tl.float32)
    sin_radius = radius.to(tl.uint32, bitcast=True) ^ (angle_word & 0x80000000)
    cos_radius = sin_radius ^ (doubled & 0x80000000)
    a = tl.fma(tl.abs(y), 4.656612873077393e-10, -0.5)
    a2 = a * a
    # (cos, sin)(pi a / 2) * 1.1990: undoes the radius's scale, includes the eighth turn's sqrt(1/2); minimax, error 2e-9
    c = tl.fma(a2, 0.0010811893, -0.025010282)
    c = tl.fma(a2, c, 0.30414924)
    c = tl.fma(a2, c, -1.4792068)
    c = tl.fma(a2, c, 1.1989999)
    s = tl.fma(a2, -0.005505402, 0.095531225)
    s = tl.fma(a2, s, -0.7745095)
    s = tl.fma(a2, s, 1.8833846)
    cos = cos_radius.to(tl.float32, bitcast=True) * tl.fma(a * -1.0, s, c)  # Triton 3.6 compiles -a as zero minus a
    return cos, sin_radius.to(tl.float32, bitcast=True) * tl.fma(a, s, c)


@triton.jit
def normal_pair(radius_word, angle_word):
    """Box-Muller: two normals from two uint32 tiles, within stream.NORMAL_BOUND of the float64 value."""
    return on_circle(scaled_radius(radius_word), angle_word)


@triton.jit
def laid_out_like(q, x):
    """q in the register layout of the float32 tile x, so noise computed from q combines with x without shared memory.

    The assembler sees a plain copy of q. On GPUs other than NVIDIA's the compiler chooses the layout.
    """
    if is_nvidia():
        q = tl.inline_asm_elementwise("mov.b32 $0, $1; // $2", "=r,r,f", [q, x], tl.int32, is_pure=True, pack=1)
    return q


@triton.jit
def row_identity(n, row_ids_ptr, row_start, in_rows):
    """The global ids of rows n, int64: row_ids[n], or row_start + n if row_ids_ptr is None."""
    row = n + row_start.to(tl.int64)
    if row_ids_ptr is not None:
        row = tl.load(row_ids_ptr + n, mask=in_rows, other=0)
    return row


@triton.jit
def coordinates(at_ptr, step, row_start):
    """step and row_start: loaded from at_ptr, (2,) int64, or the arguments if at_ptr is None."""
    if at_ptr is not None:
        step = tl.load(at_ptr).to(tl.uint32)
        row_start = tl.load(at_ptr + 1)
    return step, row_start


@triton.jit
def stream_words(q, row, seed_lo, seed_hi, step, layer):
    """The four uint32 words of channel group q of rows `row` (int64): word j belongs to channel j*Q + q."""
    # adding zero gives every word the tile's shape
    zero = (q + row).to(tl.uint32) * 0
    c0 = q.to(tl.uint32) + zero
    c1 = row.to(tl.uint32) + zero
    c2 = (((row >> 32) << 16).to(tl.uint32) | layer.to(tl.uint32)) + zero
    c3 = step.to(tl.uint32) + zero
    return philox_words(c0, c1, c2, c3, seed_lo.to(tl.uint32), seed_hi.to(tl.uint32))


@triton.jit
def four_normals(q, row, seed_lo, seed_hi, step, layer):
    """eps of channels q, Q + q, 2Q + q, 3Q + q of rows `row`, four float32 tiles."""
    w0, w1, w2, w3 = stream_words(q, row, seed_lo, seed_hi, step, layer)
    e0, e1 = normal_pair(w0, w1)
    e2, e3 = normal_pair(w2, w3)
    return e0, e1, e2, e3


@triton.jit(do_not_specialize=["N", *STREAM_ARGS])
def _normal_kernel(
    eps_ptr, row_ids_ptr,  # (N, D) float32, (N,) int64 or None
    row_start: tl.int64, seed_lo: tl.uint32, seed_hi: tl.uint32, step: tl.uint32, layer: tl.uint32,
    N, D, Q,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    row = row_identity(n, row_ids_ptr, row_start, n < N)
    eps = four_normals(q, row, seed_lo, seed_hi, step, layer)
    for j in tl.static_range(4):
        d = j * Q + q
        tl.store(eps_ptr + n * D + d, eps[j], mask=(n < N) & (q < Q) & (d < D))


def normal(num_rows: int, num_channels: int, stream: Stream, device: torch.device) -> Tensor:
    """eps, (num_rows, num_channels) float32."""
    eps = torch.empty(num_rows, num_channels, dtype=torch.float32, device=device)
    block_n, block_q = tile(num_channels)
    quarter = triton.cdiv(num_channels, 4)
    grid = (triton.cdiv(num_rows, block_n), triton.cdiv(quarter, block_q))
    if num_rows:
        with on_device(eps):
            _normal_kernel[grid](eps, *stream_args(stream), num_rows, num_channels, quarter, block_n, block_q)
    return eps


@triton.jit(do_not_specialize=["k0", "k1", "M"])
def _philox_kernel(counter_ptr, words_ptr, k0: tl.uint32, k1: tl.uint32, M, BLOCK: tl.constexpr):
    """counter, words (4, M) int64."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c0 = tl.load(counter_ptr + m, mask=m < M, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + M + m, mask=m < M, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * M + m, mask=m < M, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * M + m, mask=m < M, other=0).to(tl.uint32)
    words = philox_words(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    for j in tl.static_range(4):
        tl.store(words_ptr + j * M + m, words[j].to(tl.int64), mask=m < M)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of int64 tensors that hold uint32 words; returns four like them. For tests against published vectors."""
    counters = torch.stack(torch.broadcast_tensors(*counter))
    words = torch.empty_like(counters)
    size = counters[0].numel()
    if size:
        with on_device(words):
            _philox_kernel[(triton.cdiv(size, 256),)](counters, words, *key, size, 256)
    return tuple(words.unbind())


def stream_args(stream: Stream) -> tuple[Tensor | int | None, ...]:
    """A stream as kernel arguments: row_ids_ptr, then STREAM_ARGS. `at` is a separate kernel argument."""
    row_ids = None if stream.row_ids is None else stream.row_ids.contiguous()
    return row_ids, stream.row_start, *stream.key, stream.step, stream.layer


def tile(num_channels: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_Q) of MAX_TILE groups: the BLOCK_Q with the fewest idle lanes, the largest at a tie."""
    quarter = triton.cdiv(num_channels, 4)
    sizes = (1024, 512, 256, 128) if quarter > 128 else (triton.next_power_of_2(quarter),)
    block_q = min(sizes, key=lambda size: triton.cdiv(quarter, size) * size)
    return MAX_TILE // block_q, block_q


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: kernels launch on the current device, which may be another one."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The device's number of multiprocessors; 1 for Triton's interpreter."""
    if device.type == "cpu":
        return 1
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or properties.gpu_subslice_count)
