// Converts pieces of a row to and from float32, splits a row into tiles, and sums in a fixed order.
#pragma once

#include "dtypes.h"

namespace {

// Loads `size` elements and fills up to `count` with `fill`.
template <class T>
inline void load(const typename T::Storage* from, int size, float* to, int count, float fill) {
#pragma omp simd
    for (int i = 0; i < size; ++i) to[i] = T::load(from[i]);
    for (int i = size; i < count; ++i) to[i] = fill;
}

template <class T>
inline void store(const float* from, int size, typename T::Storage* to) {
#pragma omp simd
    for (int i = 0; i < size; ++i) to[i] = T::nearest(from[i]);
}

// ------------------------------------------------------------------ tiles

// The rest of a row after its last whole tile, padded with zeros that are read and dropped.
template <class Storage>
struct Edge {
    alignas(64) Storage x[TILE] = {};

    void load(const Storage* from, int64_t size) { __builtin_memcpy(x, from, static_cast<size_t>(size) * sizeof x[0]); }
    void store(Storage* to, int64_t size) const { __builtin_memcpy(to, x, static_cast<size_t>(size) * sizeof x[0]); }
};

// A tile of each of the row's four streams, `stride` elements apart.
template <class Storage>
struct Streams {
    Storage* at;
    int64_t stride;

    Storage* operator[](int j) const { return at + j * stride; }
};

// The last tile of each stream, padded like Edge.
template <class Storage>
struct EdgeTile {
    alignas(64) Storage x[4][TILE] = {};

    void load(const Storage* row, int64_t q0, int64_t Q, int64_t D) {
        for (int j = 0; j < 4; ++j) {
            __builtin_memcpy(x[j], row + j * Q + q0, stream_size(j, q0, TILE, Q, D) * sizeof(Storage));
        }
    }
    void store(Storage* row, int64_t q0, int64_t Q, int64_t D) const {
        for (int j = 0; j < 4; ++j) {
            __builtin_memcpy(row + j * Q + q0, x[j], stream_size(j, q0, TILE, Q, D) * sizeof(Storage));
        }
    }
};

// Prefetches four tiles of the next row, after the `done` groups already prefetched. CPUs do not predict four streams at
// a time, and noise takes longer than memory, so the next row loads while this one is perturbed.
template <class Storage>
ALP_INLINE inline void prefetch_next(const Storage* row, int64_t D, int64_t done) {
    const Storage* next = row + D + 4 * done;
    for (int i = 0; i < 4 * TILE; i += 64 / static_cast<int>(sizeof(Storage))) __builtin_prefetch(next + i);
}

// Groups that all four streams of a row have, rounded down to whole tiles.
inline int64_t whole_tiles(int64_t Q, int64_t D) { return D > 3 * Q ? (D - 3 * Q) / TILE * TILE : 0; }

// ------------------------------------------------------------------ sums

using Lanes = float __attribute__((vector_size(4 * LANES)));

inline Lanes lanes_at(const float* x) { return vector_at<Lanes>(x); }

// Sixteen sums: float32 within a block (at most 4 BLOCK / LANES terms per lane), float64 across blocks.
struct Sum {
    alignas(64) double lane[LANES] = {};

    void add(const Lanes& block) {
        using Doubles = double __attribute__((vector_size(8 * LANES)));
        put(vector_at<Doubles>(lane) + __builtin_convertvector(block, Doubles), lane);
    }
    double total() const {
        double sum = 0;
        for (int l = 0; l < LANES; ++l) sum += lane[l];
        return sum;
    }
};

// Sums products over tiles in an order that does not depend on the vector width. Each of a tile's 32 places has its own
// float32 sum; callers `flush` it into the float64 sums before it holds more than MOST terms.
template <Order order>
struct TileSum {
    static constexpr int MOST = 4 * BLOCK / TILE;

    F32 part[V] = {};
    Sum blocks;

    ALP_INLINE void add(const F32 a[V], const F32 b[V]) {
        for (int v = 0; v < V; ++v) part[v] += a[v] * b[v];
    }
    ALP_INLINE void flush() {
        alignas(64) float place[TILE];
        for (int v = 0; v < V; ++v) {
            put(part[v], place + (order == IN_ORDER ? v * W : v % 2 * LANES + v / 2 * W));
            part[v] = F32{};
        }
        blocks.add(lanes_at(place));
        blocks.add(lanes_at(place + LANES));
    }
    double total() {
        flush();
        return blocks.total();
    }
};

}  // namespace
