// Two normals from two random words (Box and Muller 1958); stream.py has the definition. N vectors are computed side by
// side, because every step has a latency of several cycles.
// Polynomials: minimax fits in 25 digits, rounded to float32 from the lowest order up; "fit" is the largest error of the
// rounded polynomial. Every step follows IEEE rounding; a fused one rounds once.
#pragma once

#include "lanes.h"

#define ALP_INLINE __attribute__((always_inline))

namespace {

// p x + c, a step of Horner's rule.
template <int N>
ALP_INLINE inline void step(F32 p[N], const F32 x[N], float c) {
    for (int n = 0; n < N; ++n) p[n] = fma(p[n], x[n], c);
}

// sqrt(-2 ln u) for u = float32(word) 2^-32 + 2^-33 in (0, 1]; 0 at u = 1.
template <int N>
ALP_INLINE inline void radius_of(const U32 word[N], F32 radius[N]) {
    F32 g[N], q[N];
    U32 exponent[N];
    for (int n = 0; n < N; ++n) {
        const F32 u = fma(float_of_word(word[n]), 0x1p-32f, 0x1p-33f);
        // u = 2^k m, m in [sqrt(1/2), sqrt(2)): near u = 1, k = 0 and g = -2 (m - 1) is exact
        exponent[n] = ((U32)u - 0x3F3504F3u) & 0xFF800000u;  // k 2^23
        g[n] = fma((F32)((U32)u - exponent[n]), -2.0f, 2.0f);
        q[n] = F32{} + 0x1.f4ac70p-10f;
    }
    // -2 ln m = g + g^2 Q(g), fit 4.7e-7 in the radius
    step<N>(q, g, 0x1.82edc4p-8f);
    step<N>(q, g, 0x1.a31218p-7f);
    step<N>(q, g, 0x1.fd8126p-6f);
    step<N>(q, g, 0x1.5528fap-4f);
    step<N>(q, g, 0x1.0002e2p-2f);
    for (int n = 0; n < N; ++n) {
        const F32 rest = fma(float_of_int(exponent[n]), F32{} - 0x1.62e430p-23f, g[n]);  // 2 ln 2 in float32 is 4e-9 off
        radius[n] = square_root(fma(g[n] * g[n], q[n], rest));
    }
}

// Cosine and sine of 2 pi word / 2^32, without the sign they share.
template <int N>
ALP_INLINE inline void cos_sin_of(const U32 word[N], F32 cosine[N], F32 sine[N]) {
    F32 t[N], s[N];
    for (int n = 0; n < N; ++n) {
        // t in [-1, 1) counts quarter turns from the nearest half turn: the shift drops the half turns, exactly
        t[n] = float_of_int(word[n] << 1) * 0x1p-31f;
        s[n] = t[n] * t[n];
        sine[n] = F32{} + 0x1.3912a8p-13f;
        cosine[n] = F32{} + 0x1.c2939ap-11f;
    }
    // sin(pi t / 2) = t S(t^2), fit 7.6e-9;  cos(pi t / 2) = 1 + t^2 C(t^2), fit 5.4e-8
    step<N>(sine, s, -0x1.31fbf4p-8f);
    step<N>(cosine, s, -0x1.55020cp-6f);
    step<N>(sine, s, 0x1.466504p-4f);
    step<N>(cosine, s, 0x1.03bd9ap-2f);
    step<N>(sine, s, -0x1.4abba2p-1f);
    step<N>(cosine, s, -0x1.3bd3b0p+0f);
    step<N>(sine, s, 0x1.921fb4p+0f);
    step<N>(cosine, s, 1.0f);
    for (int n = 0; n < N; ++n) sine[n] *= t[n];
}

template <int N>
ALP_INLINE inline void box_muller(const U32 radius_word[N], const U32 angle_word[N], F32 cosine[N], F32 sine[N]) {
    F32 radius[N];
    radius_of<N>(radius_word, radius);
    cos_sin_of<N>(angle_word, cosine, sine);
    for (int n = 0; n < N; ++n) {
        const U32 sign = (angle_word[n] + 0x40000000u) & 0x80000000u;  // negative around a half turn
        const F32 signed_radius = (F32)((U32)radius[n] ^ sign);
        cosine[n] *= signed_radius;
        sine[n] *= signed_radius;
    }
}

}  // namespace
