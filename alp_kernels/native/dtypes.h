// float32, bfloat16 and float16 as they lie in memory: integer arithmetic only, so no CPU needs its own path, and
// flush-to-zero modes cannot reach the subnormals of float16.
#pragma once

#include "functions.h"
#include "interface.h"

namespace {

struct Float32 {
    using Storage = float;
    static constexpr bool IS_16_BIT = false;
    static float load(float x) { return x; }
    static float nearest(float x) { return x; }
    static float stochastic(float x, uint32_t) { return x; }
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
        // below 2^-14 the grid is even: adding 1/2 leaves the multiple of 2^-24 in the low mantissa bits
        const uint32_t even = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        uint32_t half = magnitude < 0x38800000u ? even : normal;
        half = magnitude >= 0x477FF000u ? 0x7C00u : half;
        half = magnitude > 0x7F800000u ? 0x7E00u : half;
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
};

}  // namespace
