"""Rounds float32 tiles to a tensor's dtype: to nearest, or stochastically with words of the rounding stream."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

import triton
import triton.language as tl

from .noise import is_nvidia

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def widen(x):
    """Convert a tile of any dtype to float32."""
    if is_nvidia() and x.dtype == tl.bfloat16:
        # two elements at a time, one instruction each; the compiler would first split the word in halves
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_nearest(x, dtype: tl.constexpr):
    """Round to nearest, ties to even: one instruction on a GPU. Triton's interpreter truncates bfloat16, hence the bit code."""
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def round_stochastic(x, word, dtype: tl.constexpr):
    """Unbiased rounding to bfloat16 or float16: adds random bits below the last kept bit, then truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    if dtype == tl.bfloat16:
        rounded = ((bits + (word & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        rounded = ((bits + (word & 0x1FFF)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # below 2^-14 float16 is evenly spaced, in steps of 2^-24
        fraction = (word >> 8).to(tl.float32) * 5.9604644775390625e-08
        steps = tl.floor(tl.abs(x) * 16777216.0 + fraction) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(x < 0, -steps, steps), rounded)
    return tl.where(is_finite, rounded, x).to(dtype)
