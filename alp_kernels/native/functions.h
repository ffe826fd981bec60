// Elementary functions in float32 from additions, multiplications and bit operations alone: every operation is rounded
// as IEEE says and none is fused (-ffp-contract=off), so any vector width, and any CPU, gives the same bits.
// Polynomials: Remez fits in 40 digits, rounded to float32; "fit" is the largest error of the rounded polynomial.
#pragma once

#include <stdint.h>

namespace {

inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// sqrt(-2 ln u) for u = float32(word) 2^-32 + 2^-33 in (0, 1]; 0 at u = 1.
inline float radius_of(uint32_t word) {
    const float u = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
    // u = 2^k m, m in [sqrt(1/2), sqrt(2)): near u = 1, k = 0 and f = u - 1 is exact
    const uint32_t bits = bits_of(u);
    const int32_t k = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
    const float f = float_of(bits - (static_cast<uint32_t>(k) << 23)) - 1.0f;
    const float e = static_cast<float>(k);
    // -2 ln(1 + f) = -2 f + f^2 + f^3 P(f), fit 6.4e-9 relative
    float p = 0x1.38b5d4p-3f;
    p = p * f - 0x1.055b82p-2f;
    p = p * f + 0x1.0d853cp-2f;
    p = p * f - 0x1.22da18p-2f;
    p = p * f + 0x1.547244p-2f;
    p = p * f - 0x1.99a008p-2f;
    p = p * f + 0x1.000226p-1f;
    p = p * f - 0x1.555554p-1f;
    const float square = f * f;
    float log = p * (square * f) + square;
    log = log + e * 0x1.bd0106p-12f;  // -2 ln 2 in two parts: the first has 10 bits, so e times it is exact
    log = log - (f + f);
    log = log - e * 0x1.63p+0f;
    return __builtin_sqrtf(log);
}

// Cosine and sine of 2 pi word / 2^32.
inline void cos_sin_of(uint32_t word, float* cosine, float* sine) {
    // an eighth of a turn on: the top two bits are then the nearest quarter, the rest the way from it. t in [-1, 1)
    // counts eighths, in exact integers until the one conversion
    const uint32_t turned = word + 0x20000000u;
    const float t = static_cast<float>(static_cast<int32_t>(turned & 0x3FFFFFFFu) - 0x20000000) * 0x1p-29f;
    const float s = t * t;
    float sin = -0x1.33198ep-15f;  // sin(pi t / 4) = t S(t^2), fit 2.8e-8 relative
    sin = sin * s + 0x1.4680a4p-9f;
    sin = sin * s - 0x1.4abc24p-4f;
    sin = t * 0x1.921fb6p-1f + (t * s) * sin;
    float cos = 0x1.d4f7eep-19f;  // cos(pi t / 4) = 1 + t^2 C(t^2), fit 4.4e-10 relative
    cos = cos * s - 0x1.55b2b6p-12f;
    cos = cos * s + 0x1.03c1b0p-6f;
    cos = cos * s - 0x1.3bd3ccp-2f;
    cos = cos * s + 1.0f;
    const bool is_odd = turned & 0x40000000u;
    *cosine = float_of(bits_of(is_odd ? sin : cos) ^ ((turned + 0x40000000u) & 0x80000000u));
    *sine = float_of(bits_of(is_odd ? cos : sin) ^ (turned & 0x80000000u));
}

constexpr float EXP_FLOOR = -88.0f;  // exp_of is 0 here: callers clamp to it, in the form that lets NaN pass

// exp(x) for x in [-88, 88] or NaN; below -87.33, where float32 has only subnormals left, 0.
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
