// Two normals from two random words (Box and Muller 1958), a vector at a time; noise.py has the definition.
// Polynomials: minimax fits in 25 digits, rounded to float32 from the lowest order up; "fit" is the largest error of the
// rounded polynomial. Every step is rounded as IEEE says, a fused one once.
#pragma once

#include "lanes.h"

namespace {

// sqrt(-2 ln u) for u = float32(word) 2^-32 + 2^-33 in (0, 1]; 0 at u = 1.
inline F32 radius_of(U32 word) {
    const F32 u = fma(float_of_word(word), 0x1p-32f, 0x1p-33f);
    // u = 2^k m, m in [sqrt(1/2), sqrt(2)): near u = 1, k = 0 and g = -2 (m - 1) is exact
    const U32 bits = (U32)u, exponent = (bits - 0x3F3504F3u) & 0xFF800000u;  // k 2^23
    const F32 g = fma((F32)(bits - exponent), -2.0f, 2.0f);
    // -2 ln m = g + g^2 Q(g), fit 4.7e-7 in the radius
    F32 q = F32{} + 0x1.f4ac70p-10f;
    q = fma(q, g, 0x1.82edc4p-8f);
    q = fma(q, g, 0x1.a31218p-7f);
    q = fma(q, g, 0x1.fd8126p-6f);
    q = fma(q, g, 0x1.5528fap-4f);
    q = fma(q, g, 0x1.0002e2p-2f);
    const F32 rest = fma(float_of_int(exponent), F32{} - 0x1.62e430p-23f, g);  // -2 ln 2 in float32 is 3e-9 off
    return square_root(fma(g * g, q, rest));
}

// Cosine and sine of 2 pi word / 2^32, but for their common sign: negative where half_turn_sign has its bit set.
inline void cos_sin_of(U32 word, F32* cosine, F32* sine) {
    // t in [-1, 1) counts quarter turns from the nearest half turn: the shift drops the half turns, exactly
    const F32 t = float_of_int(word << 1) * 0x1p-31f, s = t * t;
    F32 sin = F32{} + 0x1.3912a8p-13f;  // sin(pi t / 2) = t S(t^2), fit 7.6e-9
    sin = fma(sin, s, -0x1.31fbf4p-8f);
    sin = fma(sin, s, 0x1.466504p-4f);
    sin = fma(sin, s, -0x1.4abba2p-1f);
    sin = fma(sin, s, 0x1.921fb4p+0f);
    F32 cos = F32{} + 0x1.c2939ap-11f;  // cos(pi t / 2) = 1 + t^2 C(t^2), fit 5.4e-8
    cos = fma(cos, s, -0x1.55020cp-6f);
    cos = fma(cos, s, 0x1.03bd9ap-2f);
    cos = fma(cos, s, -0x1.3bd3b0p+0f);
    *cosine = fma(cos, s, 1.0f);
    *sine = t * sin;
}

inline U32 half_turn_sign(U32 word) { return (word + 0x40000000u) & 0x80000000u; }

inline void box_muller(U32 radius_word, U32 angle_word, F32* cosine, F32* sine) {
    const F32 radius = (F32)((U32)radius_of(radius_word) ^ half_turn_sign(angle_word));
    F32 cos, sin;
    cos_sin_of(angle_word, &cos, &sin);
    *cosine = radius * cos;
    *sine = radius * sin;
}

}  // namespace
