// Philox words and normals of a tile of channel groups, and arrays of them. Word j of group q serves channel j * Q + q
// (see noise.py).
#pragma once

#include "interface.h"
#include "normal.h"

#define ALP_INLINE __attribute__((always_inline))

namespace {

using namespace alp;

constexpr int TILE = 32;      // groups, on every CPU
constexpr int V = TILE / W;   // vectors of a tile
constexpr int BLOCK = 128;    // groups at a time where their words or normals go through memory: they stay in L1
constexpr int LANES = 16;     // blocks are padded to this many groups, on every CPU

inline int64_t quarter_of(int64_t channels) { return (channels + 3) / 4; }

// Groups of the block at q0, rounded up to LANES; those past Q are computed and dropped.
inline int block_size(int64_t q0, int64_t quarter) {
    const int64_t left = quarter - q0;
    return left >= BLOCK ? BLOCK : static_cast<int>((left + LANES - 1) / LANES) * LANES;
}

// How many of stream j's groups among the `count` at q0 are channels of the row.
inline int stream_size(int j, int64_t q0, int count, int64_t quarter, int64_t channels) {
    const int64_t groups = quarter - q0 < count ? quarter - q0 : count;
    const int64_t left = channels - (j * quarter + q0);
    return static_cast<int>(left < 0 ? 0 : left < groups ? left : groups);
}

// ------------------------------------------------------------------ words

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;

// Philox's ten round keys, spread over the lanes once a row rather than once a round.
struct Keys {
    Wide k0[10], k1[10];
    U32 last_k0, last_k1;  // the last round's in both halves, for words that are put together already

    explicit Keys(uint64_t key) {
        for (uint32_t round = 0; round < 10; ++round) {
            k0[round] = Wide{} + (static_cast<uint32_t>(key) + round * 0x9E3779B9u);
            k1[round] = Wide{} + (static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u);
        }
        last_k0 = U32{} + static_cast<uint32_t>(k0[9][0]);
        last_k1 = U32{} + static_cast<uint32_t>(k1[9][0]);
    }
};

inline void philox_round(Wide c[4], const Keys& keys, int round) {
    const Wide p0 = multiply(c[0], Wide{} + M0), p1 = multiply(c[2], Wide{} + M1);
    c[0] = exclusive_or(high(p1), c[1], keys.k0[round]);
    c[1] = p1;
    c[2] = exclusive_or(high(p0), c[3], keys.k1[round]);
    c[3] = p0;
}

// A row's key, and its share of the counter as far as it runs through the rounds ahead of a group's: of the counter's
// four words only the first differs within a row, so half of the first two rounds is the row's.
struct RowStream {
    Keys keys;
    Wide round1, round2_0, round2_2, round3;

    RowStream(const Stream& stream, int64_t n, uint32_t layer_bits = 0) : keys(stream.seed) {
        const uint64_t id = static_cast<uint64_t>(stream.row_ids ? stream.row_ids[n] : stream.row_start + n);
        const uint32_t row = static_cast<uint32_t>(id);
        const uint32_t layer_row = stream.layer | layer_bits | static_cast<uint32_t>(id >> 32 << 16);
        const uint64_t p1 = static_cast<uint64_t>(layer_row) * M1;
        const uint64_t p0 = ((p1 >> 32) ^ row ^ keys.k0[0][0]) * M0;
        round1 = keys.k1[0] ^ stream.step;
        round2_0 = keys.k0[1] ^ (p1 & 0xFFFFFFFFu);
        round2_2 = keys.k1[1] ^ (p0 >> 32);
        round3 = keys.k1[2] ^ (p0 & 0xFFFFFFFFu);
    }
};

// Which element of a tile is lane `lane` of its vector v.
enum Order { IN_ORDER, IN_PAIRS };

constexpr int element_of(Order order, int v, int lane) {
    return order == IN_ORDER ? v * W + lane : v / 2 * 2 * W + 2 * lane + v % 2;  // pairs: even ones, then odd ones
}

// The groups of a tile. Lane i of counter[v][p] is lane 2 i + p of vector v, and holds its group times M0: the first
// product of the first round, which additions keep.
struct Counters {
    Wide counter[V][2];

    Counters(int64_t q0, Order order) {
        for (int v = 0; v < V; ++v) {
            for (int p = 0; p < 2; ++p) {
                for (int i = 0; i < W / 2; ++i) {
                    counter[v][p][i] = static_cast<uint64_t>(q0 + element_of(order, v, 2 * i + p)) * M0;
                }
            }
        }
    }
    void advance() {
        for (auto& vector : counter) {
            for (Wide& part : vector) part += static_cast<uint64_t>(TILE) * M0;
        }
    }
};

// The four words of one vector of groups.
ALP_INLINE inline void row_words(const RowStream& row, const Wide counters[2], U32 word[4]) {
    Wide parts[2][4];
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
        Wide* c = parts[p];
        const Wide second = multiply(high(counters[p]) ^ row.round1, Wide{} + M1);       // round 2's p1
        const Wide p0 = multiply(high(second) ^ row.round2_0, Wide{} + M0);              // round 3
        const Wide p1 = multiply(counters[p] ^ row.round2_2, Wide{} + M1);
        c[0] = exclusive_or(high(p1), second, row.keys.k0[2]);
        c[1] = p1;
        c[2] = high(p0) ^ row.round3;
        c[3] = p0;
    }
#pragma GCC unroll 6
    for (int round = 3; round < 9; ++round) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) philox_round(parts[p], row.keys, round);
    }
    Wide(&a)[4] = parts[0], (&b)[4] = parts[1];
    const Wide p0_a = multiply(a[0], Wide{} + M0), p1_a = multiply(a[2], Wide{} + M1);
    const Wide p0_b = multiply(b[0], Wide{} + M0), p1_b = multiply(b[2], Wide{} + M1);
    word[0] = exclusive_or(interleave_high(p1_a, p1_b), interleave_low(a[1], b[1]), row.keys.last_k0);
    word[1] = interleave_low(p1_a, p1_b);
    word[2] = exclusive_or(interleave_high(p0_a, p0_b), interleave_low(a[3], b[3]), row.keys.last_k1);
    word[3] = interleave_low(p0_a, p0_b);
}

// word[j][v]: word j of the tile's groups.
ALP_INLINE inline void row_words(const RowStream& row, const Counters& counters, U32 word[4][V]) {
    for (int v = 0; v < V; ++v) {
        U32 four[4];
        row_words(row, counters.counter[v], four);
        for (int j = 0; j < 4; ++j) word[j][v] = four[j];
    }
}

// eps[j][v]: stream j's normals.
ALP_INLINE inline void row_normals(const RowStream& row, const Counters& counters, F32 eps[4][V]) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        U32 word[4];
        row_words(row, counters.counter[v], word);
        box_muller(word[0], word[1], &eps[0][v], &eps[1][v]);
        box_muller(word[2], word[3], &eps[2][v], &eps[3][v]);
    }
}

// ------------------------------------------------------------------ arrays

struct Words {
    alignas(64) uint32_t word[4][BLOCK];
};

struct Normals {
    alignas(64) float eps[4][BLOCK];
};

inline void random_block(const RowStream& row, int64_t q0, int count, Words& out) {
    Counters counters(q0, IN_ORDER);
    for (int i = 0; i < count; i += TILE, counters.advance()) {
        U32 word[4][V];
        row_words(row, counters, word);
        for (int j = 0; j < 4; ++j) {
            for (int v = 0; v < V; ++v) put(word[j][v], out.word[j] + i + v * W);
        }
    }
}

inline void normal_block(const RowStream& row, int64_t q0, int count, Normals& out) {
    Counters counters(q0, IN_ORDER);
    for (int i = 0; i < count; i += TILE, counters.advance()) {
        F32 eps[4][V];
        row_normals(row, counters, eps);
        for (int j = 0; j < 4; ++j) {
            for (int v = 0; v < V; ++v) put(eps[j][v], out.eps[j] + i + v * W);
        }
    }
}

}  // namespace
