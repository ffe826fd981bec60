// Elementary functions in float32, built only from IEEE arithmetic and bit operations: every operation follows IEEE
// rounding and none is fused (-ffp-contract=off), so every vector width and every CPU gives the same bits.
// Polynomials: Remez fits in 40 digits, rounded to float32; "fit" is the largest error of the rounded polynomial.
#pragma once

#include <stdint.h>

namespace {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr float EXP_FLOOR = -88.0f;  // exp_of is 0 here; callers clamp to it with a comparison that lets NaN pass

// exp(x) for x in [-88, 88] or NaN; 0 below -87.33, where the result is subnormal.
inline float exp_of(float x) {
    const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;  // the integer nearest x / ln 2, in the low mantissa bits
    const float n = shifted - 0x1.8p+23f;
    const float r = (x - n * 0x1.63p-1f) - n * -0x1.bd0106p-13f;
    float p = 0x1.6ac756p-10f;  // exp(r) = 1 + r + r^2 E(r), fit 3.2e-9 relative
    p = p * r + 0x1.123de0p-7f;
    p = p * r + 0x1.555858p-5f;
    p = p * r + 0x1.55548cp-3f;
    p = p * r + 0x1.fffffcp-2f;
    p = 1.0f + (r + (r * r) * p);
    const float e = p * float_of((bits_of(shifted) + 127u) << 23);
    return x < -87.33f ? 0.0f : e;
}

inline float tanh_of(float x) {
    float a = float_of(bits_of(x) & 0x7FFFFFFFu);
    a = a > 10.0f ? 10.0f : a;
    const float far = 1.0f - 2.0f / (exp_of(2.0f * a) + 1.0f);
    const float s = a * a;
    float p = -0x1.8287760p-8f;  // tanh(a) = a + a s T(s) for a < 0.6, fit 2.8e-9 relative
    p = p * s + 0x1.54c3c2p-6f;
    p = p * s - 0x1.b89abap-5f;
    p = p * s + 0x1.1109bep-3f;
    p = p * s - 0x1.55553ep-2f;
    const float near = a + a * (s * p);
    return float_of(bits_of(a < 0.6f ? near : far) | (bits_of(x) & 0x80000000u));
}

}  // namespace
