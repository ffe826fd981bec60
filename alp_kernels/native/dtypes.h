// Loads and stores float32, bfloat16 and float16, one by one and in tiles. Conversions use integer arithmetic, or the
// CPU's float16 instructions, which give the same bits, so flush-to-zero modes do not affect float16's subnormals.
#pragma once

#include "functions.h"
#include "noise.h"

namespace {

struct Float32 {
    using Storage = float;
    static constexpr bool IS_16_BIT = false;
    static float load(float x) { return x; }
    static float nearest(float x) { return x; }
    static float stochastic(float x, uint32_t) { return x; }

    static constexpr Order ORDER = IN_ORDER;
    static void load_tile(const float* from, F32 x[V]) {
        for (int v = 0; v < V; ++v) x[v] = vector_at<F32>(from + v * W);
    }
    static void store_tile(const F32 x[V], float* to) {
        for (int v = 0; v < V; ++v) put(x[v], to + v * W);
    }
    static void store_tile(const F32 x[V], const U32[V], float* to) { store_tile(x, to); }
    static void load_floats(const float* from, F32 x[V]) { load_tile(from, x); }
    static void store_floats(const F32 x[V], float* to) { store_tile(x, to); }
};

struct BFloat16 {
    using Storage = uint16_t;
    static constexpr bool IS_16_BIT = true;
    static float load(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
    static uint16_t nearest(float x) {
        const uint32_t bits = bits_of(x);
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        return static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
    }
    static uint16_t stochastic(float x, uint32_t word) {
        const uint32_t bits = bits_of(x);
        const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
        return is_finite ? static_cast<uint16_t>((bits + (word & 0xFFFFu)) >> 16) : nearest(x);
    }

    // Neighbours share a 32-bit word, so splitting a tile into even and odd elements and joining them needs no shuffle.
    static constexpr Order ORDER = IN_PAIRS;
    static void load_tile(const uint16_t* from, F32 x[V]) {
        for (int v = 0; v < V; v += 2) {
            const U32 pairs = vector_at<U32>(from + v * W);
            x[v] = (F32)(pairs << 16);
            x[v + 1] = (F32)(pairs & 0xFFFF0000u);
        }
    }
    static U32 rounded(F32 x) {  // the result in the high half
        const U32 bits = (U32)x;
        return x == x ? bits + (((bits >> 16) & 1u) + 0x7FFFu) : U32{} + 0x7FC00000u;
    }
    static void load_floats(const float* from, F32 x[V]) {
        for (int v = 0; v < V; v += 2) {
            part_pairs(vector_at<F32>(from + v * W), vector_at<F32>(from + v * W + W), &x[v], &x[v + 1]);
        }
    }
    static void store_floats(const F32 x[V], float* to) {
        for (int v = 0; v < V; v += 2) {
            F32 first, last;
            join_pairs(x[v], x[v + 1], &first, &last);
            put(first, to + v * W);
            put(last, to + v * W + W);
        }
    }
    static void put_pairs(const U32 high[V], uint16_t* to) {
        for (int v = 0; v < V; v += 2) put((high[v] >> 16) | (high[v + 1] & 0xFFFF0000u), to + v * W);
    }
    static void store_tile(const F32 x[V], uint16_t* to) {
        U32 high[V];
        for (int v = 0; v < V; ++v) high[v] = rounded(x[v]);
        put_pairs(high, to);
    }
    static void store_tile(const F32 x[V], const U32 word[V], uint16_t* to) {
        U32 high[V];
        for (int v = 0; v < V; ++v) {
            const U32 bits = (U32)x[v];
            high[v] = (bits & 0x7F800000u) != 0x7F800000u ? bits + (word[v] & 0xFFFFu) : rounded(x[v]);
        }
        put_pairs(high, to);
    }
};

struct Float16 {
    using Storage = uint16_t;
    static constexpr bool IS_16_BIT = true;
    static float load(uint16_t x) {
        const uint32_t magnitude = x & 0x7FFFu;
        const uint32_t widened = (magnitude << 13) + (magnitude < 0x7C00u ? 112u << 23 : 224u << 23);
        const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
        const float value = magnitude < 0x400u ? subnormal : float_of(widened);
        return float_of(bits_of(value) | (static_cast<uint32_t>(x & 0x8000u) << 16));
    }
    static uint16_t nearest(float x) {
        const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
        const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
        // below 2^-14 float16 is evenly spaced: adding 1/2 leaves the multiple of 2^-24 in the low mantissa bits
        const uint32_t even = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        uint32_t half = magnitude < 0x38800000u ? even : normal;
        half = magnitude >= 0x477FF000u ? 0x7C00u : half;
        half = magnitude > 0x7F800000u ? 0x7E00u | ((magnitude >> 13) & 0x3FFu) : half;  // NaN's payload stays, as on CPUs
        return static_cast<uint16_t>(half | sign);
    }
    static uint16_t stochastic(float x, uint32_t word) {
        const uint32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
        const bool is_finite = magnitude < 0x7F800000u, is_subnormal = magnitude < 0x38800000u;
        const float small = is_subnormal ? float_of(magnitude) : 0.0f;
        const float noise = static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f;
        const int32_t steps = static_cast<int32_t>(small * 0x1p24f + noise);
        const uint16_t normal = nearest(float_of((bits + (word & 0x1FFFu)) & ~0x1FFFu));
        const uint16_t finite = is_subnormal ? static_cast<uint16_t>(static_cast<uint32_t>(steps) | sign) : normal;
        return is_finite ? finite : nearest(x);
    }

    static constexpr Order ORDER = IN_ORDER;
    static void load_tile(const uint16_t* from, F32 x[V]) {
#if defined(__AVX512F__)
        for (int v = 0; v < V; ++v) x[v] = (F32)_mm512_cvtph_ps(vector_at<__m256i>(from + v * W));
#elif defined(__F16C__)
        for (int v = 0; v < V; ++v) x[v] = (F32)_mm256_cvtph_ps(vector_at<__m128i>(from + v * W));
#else
        alignas(64) float buffer[TILE];
        for (int i = 0; i < TILE; ++i) buffer[i] = load(from[i]);
        Float32::load_tile(buffer, x);
#endif
    }
    static void store_tile(const F32 x[V], uint16_t* to) {
#if defined(__AVX512F__)
        for (int v = 0; v < V; ++v) put(_mm512_cvtps_ph((__m512)x[v], _MM_FROUND_TO_NEAREST_INT), to + v * W);
#elif defined(__F16C__)
        for (int v = 0; v < V; ++v) put(_mm256_cvtps_ph((__m256)x[v], _MM_FROUND_TO_NEAREST_INT), to + v * W);
#else
        alignas(64) float buffer[TILE];
        Float32::store_tile(x, buffer);
        for (int i = 0; i < TILE; ++i) to[i] = nearest(buffer[i]);
#endif
    }
    static void load_floats(const float* from, F32 x[V]) { Float32::load_tile(from, x); }
    static void store_floats(const F32 x[V], float* to) { Float32::store_tile(x, to); }
    static void store_tile(const F32 x[V], const U32 word[V], uint16_t* to) {
        alignas(64) float buffer[TILE];
        alignas(64) uint32_t words[TILE];
        Float32::store_tile(x, buffer);
        for (int v = 0; v < V; ++v) put(word[v], words + v * W);
#pragma omp simd
        for (int i = 0; i < TILE; ++i) to[i] = stochastic(buffer[i], words[i]);
    }
};

}  // namespace
