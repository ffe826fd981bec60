// Philox words and normals for a block of channel groups: words[j][i] serves channel j * Q + q0 + i (see noise.py).
#pragma once

#include "functions.h"
#include "interface.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

using namespace alp;

constexpr int BLOCK = 128;  // groups at a time: 4 streams of 128 floats, and all that belongs to them, stay in L1
constexpr int LANES = 16;   // blocks are padded to this many groups, on every CPU

struct Words {
    alignas(64) uint32_t word[4][BLOCK];
};

struct Normals {
    alignas(64) float eps[4][BLOCK];
};

inline int64_t quarter_of(int64_t channels) { return (channels + 3) / 4; }

// Groups of the block at q0, rounded up to LANES; those past Q are computed and dropped.
inline int block_size(int64_t q0, int64_t quarter) {
    const int64_t left = quarter - q0;
    return left >= BLOCK ? BLOCK : static_cast<int>((left + LANES - 1) / LANES) * LANES;
}

// How many of stream j's groups in that block are channels of the row.
inline int stream_size(int j, int64_t q0, int count, int64_t quarter, int64_t channels) {
    const int64_t groups = quarter - q0 < count ? quarter - q0 : count;
    const int64_t left = channels - (j * quarter + q0);
    return static_cast<int>(left < 0 ? 0 : left < groups ? left : groups);
}

// A 32-bit word in each 64-bit lane, its upper half garbage that the multiplication ignores: no shuffles in the rounds.
#if defined(__AVX512F__)
using Wide = uint64_t __attribute__((vector_size(64)));
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
using Wide = uint64_t __attribute__((vector_size(32)));
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
using Wide = uint64_t __attribute__((vector_size(16)));
inline Wide multiply(Wide a, Wide b) { return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
using Wide = uint64_t __attribute__((vector_size(16)));
inline Wide multiply(Wide a, Wide b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif
constexpr int WIDTH = sizeof(Wide) / sizeof(uint64_t);

// Philox's ten round keys, spread over the lanes once a row rather than once a round.
struct Keys {
    Wide k0[10], k1[10];

    explicit Keys(uint64_t key) {
        for (uint32_t round = 0; round < 10; ++round) {
            k0[round] = Wide{} + (static_cast<uint32_t>(key) + round * 0x9E3779B9u);
            k1[round] = Wide{} + (static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u);
        }
    }
};

inline void philox(Wide c[4], const Keys& keys) {
    const Wide m0 = Wide{} + 0xD2511F53u, m1 = Wide{} + 0xCD9E8D57u;
    for (int round = 0; round < 10; ++round) {
        const Wide p0 = multiply(c[0], m0), p1 = multiply(c[2], m1);
        c[0] = (p1 >> 32) ^ c[1] ^ keys.k0[round];
        c[1] = p1;
        c[2] = (p0 >> 32) ^ c[3] ^ keys.k1[round];
        c[3] = p0;
    }
}

// A row's share of the counter, and its key.
struct RowStream {
    Keys keys;
    uint32_t row, layer_row, step;

    RowStream(const Stream& stream, int64_t n, uint32_t layer_bits = 0) : keys(stream.seed) {
        const uint64_t id = static_cast<uint64_t>(stream.row_ids ? stream.row_ids[n] : stream.row_start + n);
        row = static_cast<uint32_t>(id);
        layer_row = stream.layer | layer_bits | static_cast<uint32_t>(id >> 32 << 16);
        step = stream.step;
    }
};

inline void random_block(const RowStream& stream, int64_t q0, int count, Words& out) {
    // even groups in one vector, odd ones in another: put together, their words lie in order without a shuffle
    Wide even = {};
    for (int i = 0; i < WIDTH; ++i) even[i] = static_cast<uint64_t>(q0 + 2 * i);
    const Wide row = Wide{} + stream.row, layer_row = Wide{} + stream.layer_row, step = Wide{} + stream.step;
    for (int i = 0; i < count; i += 2 * WIDTH) {
        Wide a[4] = {even, row, layer_row, step}, b[4] = {even + 1, row, layer_row, step};
        philox(a, stream.keys);
        philox(b, stream.keys);
        for (int j = 0; j < 4; ++j) {
            const Wide both = (a[j] & 0xFFFFFFFFu) | (b[j] << 32);  // in memory order: little-endian
            __builtin_memcpy(out.word[j] + i, &both, sizeof both);
        }
        even += 2 * WIDTH;
    }
}

inline void box_muller(const uint32_t* radius_word, const uint32_t* angle_word, float* cosine, float* sine, int count) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const float radius = radius_of(radius_word[i]);
        float cos, sin;
        cos_sin_of(angle_word[i], &cos, &sin);
        cosine[i] = radius * cos;
        sine[i] = radius * sin;
    }
}

inline void normal_block(const RowStream& stream, int64_t q0, int count, Normals& out) {
    Words words;
    random_block(stream, q0, count, words);
    box_muller(words.word[0], words.word[1], out.eps[0], out.eps[1], count);
    box_muller(words.word[2], words.word[3], out.eps[2], out.eps[3], count);
}

}  // namespace
