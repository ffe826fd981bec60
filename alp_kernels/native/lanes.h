// The widest vectors of one build, and the few operations on them that GCC's vector extensions lack. Every operation here
// and in the files that include this one follows IEEE rounding at every width, so all builds give the same bits.
#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

using F32 = float __attribute__((vector_size(4 * W)));
using U32 = uint32_t __attribute__((vector_size(4 * W)));
using I32 = int32_t __attribute__((vector_size(4 * W)));
// Each 64-bit lane holds a 32-bit word in its low half and garbage in its high half, so products need no shuffles.
using Wide = uint64_t __attribute__((vector_size(4 * W)));

template <class Vector>
inline Vector vector_at(const void* from) {
    Vector x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

template <class Vector>
inline void put(Vector x, void* to) {
    __builtin_memcpy(to, &x, sizeof x);
}

// a b + c, rounded once, for results that are normal numbers. Contraction is off, so compilers fuse nothing else.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__SSE2__)
    // No fma instruction. The product is exact in float64; the sum rounds to float64, then to float32. The first rounding
    // matters only if it may have made a tie: such lanes, one in 2^29, call the library.
    const auto sum = [](__m128 x, __m128 y, __m128 z) {
        return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
    };
    const auto upper = [](F32 x) { return _mm_movehl_ps((__m128)x, (__m128)x); };
    const __m128d first = sum((__m128)a, (__m128)b, (__m128)c), last = sum(upper(a), upper(b), upper(c));
    const __m128i low = (__m128i)_mm_shuffle_ps((__m128)first, (__m128)last, 0x88);
    const __m128i is_tie =
        _mm_cmpeq_epi32(_mm_and_si128(low, _mm_set1_epi32(0x1FFFFFFF)), _mm_set1_epi32(0x10000000));
    F32 x = (F32)_mm_movelh_ps(_mm_cvtpd_ps(first), _mm_cvtpd_ps(last));
    if (__builtin_expect(_mm_movemask_epi8(is_tie) != 0, 0)) {
        for (int l = 0; l < W; ++l) x[l] = __builtin_fmaf(a[l], b[l], c[l]);
    }
    return x;
#else
    F32 x;
    for (int l = 0; l < W; ++l) x[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return x;
#endif
}

inline F32 fma(F32 a, F32 b, float c) { return fma(a, b, F32{} + c); }
inline F32 fma(F32 a, float b, float c) { return fma(a, F32{} + b, F32{} + c); }

inline F32 square_root(F32 x) {
#if defined(__AVX512F__)
    return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (F32)_mm_sqrt_ps((__m128)x);
#else
    F32 root;
    for (int l = 0; l < W; ++l) root[l] = __builtin_sqrtf(x[l]);
    return root;
#endif
}

inline F32 float_of_int(U32 word) { return __builtin_convertvector((I32)word, F32); }

inline F32 float_of_word(U32 word) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtepu32_ps((__m512i)word);
#else
    return float_of_int(word >> 16) * 65536.0f + float_of_int(word & 0xFFFFu);  // exact, exact, rounded once
#endif
}

// ------------------------------------------------------------------ wide lanes

inline Wide multiply(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// All of x's high halves, as words.
inline Wide high(Wide x) { return x >> 32; }

template <class Vector>
inline Vector exclusive_or(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
    return a ^ b ^ c;
#endif
}

// Word 2 i comes from a's low halves, word 2 i + 1 from b's (in memory order: little-endian).
inline U32 interleave_low(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (U32)_mm512_mask_moveldup_ps((__m512)a, 0xAAAA, (__m512)b);
#elif defined(__AVX2__)
    return (U32)_mm256_blend_ps((__m256)a, _mm256_moveldup_ps((__m256)b), 0xAA);
#else
    return (U32)((a & 0xFFFFFFFFu) | (b << 32));
#endif
}

// Like interleave_low, for the high halves.
inline U32 interleave_high(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (U32)_mm512_mask_movehdup_ps((__m512)b, 0x5555, (__m512)a);
#elif defined(__AVX2__)
    return (U32)_mm256_blend_ps(_mm256_movehdup_ps((__m256)a), (__m256)b, 0xAA);
#else
    return (U32)((a >> 32) | (b & 0xFFFFFFFF00000000u));
#endif
}

// ------------------------------------------------------------------ pairs

// Splits 2 W floats in memory order into even and odd ones.
inline void part_pairs(F32 first, F32 last, F32* even, F32* odd) {
#if defined(__AVX512F__)
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    *even = (F32)_mm512_permutex2var_ps((__m512)first, evens, (__m512)last);
    *odd = (F32)_mm512_permutex2var_ps((__m512)first, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), (__m512)last);
#else
    F32 a = {}, b = {};
    for (int l = 0; l < W; ++l) {
        a[l] = 2 * l < W ? first[2 * l] : last[2 * l - W];
        b[l] = 2 * l < W ? first[2 * l + 1] : last[2 * l + 1 - W];
    }
    *even = a;
    *odd = b;
#endif
}

inline void join_pairs(F32 even, F32 odd, F32* first, F32* last) {
#if defined(__AVX512F__)
    const __m512i firsts = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *first = (F32)_mm512_permutex2var_ps((__m512)even, firsts, (__m512)odd);
    *last = (F32)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(firsts, _mm512_set1_epi32(8)), (__m512)odd);
#else
    F32 a = {}, b = {};
    for (int l = 0; l < W; ++l) {
        a[l] = l % 2 ? odd[l / 2] : even[l / 2];
        b[l] = l % 2 ? odd[l / 2 + W / 2] : even[l / 2 + W / 2];
    }
    *first = a;
    *last = b;
#endif
}

}  // namespace
