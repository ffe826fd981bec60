// Philox words and normals for a tile of channel groups, in registers and in arrays. Word j of group q serves channel
// j * Q + q (see stream.py).
#pragma once

#include "interface.h"
#include "normal.h"

namespace {

using namespace alp;

constexpr int TILE = 32;      // groups per tile, on every CPU
constexpr int V = TILE / W;   // vectors per tile
constexpr int BLOCK = 128;    // groups per block where words or normals go through memory: a block stays in L1
constexpr int LANES = 16;     // blocks are padded to this many groups, on every CPU

inline int64_t quarter_of(int64_t channels) { return (channels + 3) / 4; }

// Groups in the block at q0, rounded up to LANES; groups past Q are computed and dropped.
inline int block_size(int64_t q0, int64_t quarter) {
    const int64_t left = quarter - q0;
    return left >= BLOCK ? BLOCK : static_cast<int>((left + LANES - 1) / LANES) * LANES;
}

// How many of the `count` groups at q0 have a channel of the row in stream j.
inline int stream_size(int j, int64_t q0, int count, int64_t quarter, int64_t channels) {
    const int64_t groups = quarter - q0 < count ? quarter - q0 : count;
    const int64_t left = channels - (j * quarter + q0);
    return static_cast<int>(left < 0 ? 0 : left < groups ? left : groups);
}

// ------------------------------------------------------------------ words

constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u;

// Philox's ten round keys, broadcast to all lanes once instead of in every round.
struct Keys {
    Wide k0[10], k1[10];
    U32 last_k0, last_k1;  // the last round's keys in both halves, for words that are interleaved already

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

// A stream's keys, and the part of Philox's first rounds that depends only on the row. Only the first of the counter's
// four words differs within a row, so half of the first two rounds is computed once per row.
struct RowStream {
    Keys keys;
    Wide round1, round2_0, round2_2, round3;

    RowStream(const Stream& stream, int64_t n, uint32_t layer_bits = 0) : keys(stream.seed) {
        to_row(stream, n, layer_bits);
    }
    void to_row(const Stream& stream, int64_t n, uint32_t layer_bits = 0) {
        const uint64_t id = static_cast<uint64_t>(stream.row_ids ? stream.row_ids[n] : stream.row_start + n);
        const uint32_t row = static_cast<uint32_t>(id);
        const uint32_t layer_row = stream.layer | layer_bits | static_cast<uint32_t>(id >> 32 << 16);
        const uint64_t p1 = static_cast<uint64_t>(layer_row) * M1;
        const uint64_t p0 = ((p1 >> 32) ^ row ^ static_cast<uint32_t>(stream.seed)) * M0;
        round1 = keys.k1[0] ^ stream.step;
        round2_0 = keys.k0[1] ^ (p1 & 0xFFFFFFFFu);
        round2_2 = keys.k1[1] ^ (p0 >> 32);
        round3 = keys.k1[2] ^ (p0 & 0xFFFFFFFFu);
    }
};

// The order of a tile's elements in its vectors; element_of returns the element in lane `lane` of vector v.
enum Order { IN_ORDER, IN_PAIRS };

constexpr int element_of(Order order, int v, int lane) {
    return order == IN_ORDER ? v * W + lane : v / 2 * 2 * W + 2 * lane + v % 2;  // pairs: even elements, then odd ones
}

// The groups of a tile. Lane i of counter[v][p] belongs to lane 2 i + p of vector v. It holds its group times M0, the
// first product of the first round; the next tile's products follow by addition.
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

// Vectors computed side by side to hide latency: as many as registers hold.
constexpr int ABREAST = W == 16 ? 2 : 1;

// The four words of ABREAST vectors of groups.
ALP_INLINE inline void row_words(const RowStream& row, const Wide (*counters)[2], U32 word[4][ABREAST]) {
    constexpr int PARTS = 2 * ABREAST;
    const Wide* counter = counters[0];
    Wide parts[PARTS][4], p0[PARTS], p1[PARTS];
    for (int p = 0; p < PARTS; ++p) p1[p] = multiply(high(counter[p]) ^ row.round1, Wide{} + M1);  // round 2
    for (int p = 0; p < PARTS; ++p) {
        parts[p][0] = high(p1[p]) ^ row.round2_0;
        parts[p][1] = p1[p];
        parts[p][2] = counter[p] ^ row.round2_2;
    }
    for (int p = 0; p < PARTS; ++p) {
        p0[p] = multiply(parts[p][0], Wide{} + M0);
        p1[p] = multiply(parts[p][2], Wide{} + M1);
    }
    for (int p = 0; p < PARTS; ++p) {
        parts[p][0] = exclusive_or(high(p1[p]), parts[p][1], row.keys.k0[2]);
        parts[p][1] = p1[p];
        parts[p][2] = high(p0[p]) ^ row.round3;
        parts[p][3] = p0[p];
    }
#pragma GCC unroll 6
    for (int round = 3; round < 9; ++round) {
        for (int p = 0; p < PARTS; ++p) {
            p0[p] = multiply(parts[p][0], Wide{} + M0);
            p1[p] = multiply(parts[p][2], Wide{} + M1);
        }
        for (int p = 0; p < PARTS; ++p) {
            parts[p][0] = exclusive_or(high(p1[p]), parts[p][1], row.keys.k0[round]);
            parts[p][1] = p1[p];
            parts[p][2] = exclusive_or(high(p0[p]), parts[p][3], row.keys.k1[round]);
            parts[p][3] = p0[p];
        }
    }
    for (int p = 0; p < PARTS; ++p) {
        p0[p] = multiply(parts[p][0], Wide{} + M0);
        p1[p] = multiply(parts[p][2], Wide{} + M1);
    }
    for (int v = 0; v < ABREAST; ++v) {
        const int a = 2 * v, b = a + 1;
        word[0][v] = exclusive_or(
            interleave_high(p1[a], p1[b]), interleave_low(parts[a][1], parts[b][1]), row.keys.last_k0);
        word[1][v] = interleave_low(p1[a], p1[b]);
        word[2][v] = exclusive_or(
            interleave_high(p0[a], p0[b]), interleave_low(parts[a][3], parts[b][3]), row.keys.last_k1);
        word[3][v] = interleave_low(p0[a], p0[b]);
    }
}

// word[j][v]: word j of the tile's groups.
ALP_INLINE inline void row_words(const RowStream& row, const Counters& counters, U32 word[4][V]) {
    for (int v = 0; v < V; v += ABREAST) {
        U32 some[4][ABREAST];
        row_words(row, counters.counter + v, some);
        for (int j = 0; j < 4; ++j) {
            for (int k = 0; k < ABREAST; ++k) word[j][v + k] = some[j][k];
        }
    }
}

// eps[j][v]: stream j's normals.
ALP_INLINE inline void row_normals(const RowStream& row, const Counters& counters, F32 eps[4][V]) {
    for (int v = 0; v < V; v += ABREAST) {
        U32 word[4][ABREAST], radius[2 * ABREAST], angle[2 * ABREAST];
        F32 cosine[2 * ABREAST], sine[2 * ABREAST];
        row_words(row, counters.counter + v, word);
        for (int n = 0; n < 2 * ABREAST; ++n) {
            radius[n] = word[n / ABREAST * 2][n % ABREAST];
            angle[n] = word[n / ABREAST * 2 + 1][n % ABREAST];
        }
        box_muller<2 * ABREAST>(radius, angle, cosine, sine);
        for (int n = 0; n < 2 * ABREAST; ++n) {
            eps[n / ABREAST * 2][v + n % ABREAST] = cosine[n];
            eps[n / ABREAST * 2 + 1][v + n % ABREAST] = sine[n];
        }
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
