// Single logits: x_e = h . w, for entries e of a row of hidden and a token. Neighbouring entries of the same token share the
// loads of its row of W. Each of a tile's places has its own float32 sum, and the places are summed as a tree, so a logit's
// bits depend on its two rows alone.
#pragma once

#include "segments.h"

namespace {

constexpr int ENTRIES = W == 16 ? 4 : W == 8 ? 2 : 1;  // whose sums fit the registers beside a tile of W

// Sums a tile's places, in an order that does not depend on the vector width.
template <Order order>
ALP_INLINE inline float sum_places(const F32 part[V]) {
    alignas(64) float place[TILE];
    for (int v = 0; v < V; ++v) put(part[v], place + (order == IN_ORDER ? v * W : v % 2 * LANES + v / 2 * W));
#pragma GCC unroll 5
    for (int half = TILE / 2; half > 0; half /= 2) {
#pragma omp simd
        for (int l = 0; l < half; ++l) place[l] += place[l + half];
    }
    return place[0];
}

// The logits of entries i to i + COUNT - 1, which have the same token. Prefetches the rows of as many entries before `end`.
template <class T, int COUNT>
inline void token_logits(const SparseLogits& a, int64_t i, int64_t end) {
    using Storage = typename T::Storage;
    const auto* hidden = static_cast<const Storage*>(a.hidden);
    const auto* weight = static_cast<const Storage*>(a.weight);
    const Storage *h[COUNT], *next_h[COUNT];
    for (int k = 0; k < COUNT; ++k) {
        h[k] = hidden + a.rows[i + k] * a.D;
        next_h[k] = i + COUNT + k < end ? hidden + a.rows[i + COUNT + k] * a.D : h[k];
    }
    const Storage* w = weight + a.tokens[i] * a.D;
    const Storage* next_w = i + COUNT < end ? weight + a.tokens[i + COUNT] * a.D : w;
    F32 sum[COUNT][V] = {};
    const auto add_tile = [&](const Storage* w_tile, const Storage* const* h_tiles, int64_t d) {
        F32 x[V], y[V];
        T::load_tile(w_tile, x);
        for (int k = 0; k < COUNT; ++k) {
            T::load_tile(h_tiles[k] + d, y);
            for (int v = 0; v < V; ++v) sum[k][v] = fma(x[v], y[v], sum[k][v]);
        }
    };
    const int64_t tiled = a.D / TILE * TILE;
    for (int64_t d = 0; d < tiled; d += TILE) {
        for (int64_t j = d; j < d + TILE; j += 64 / static_cast<int64_t>(sizeof(Storage))) {
            __builtin_prefetch(next_w + j);
            for (int k = 0; k < COUNT; ++k) __builtin_prefetch(next_h[k] + j);
        }
        add_tile(w + d, h, d);
    }
    if (tiled < a.D) {
        Edge<Storage> w_edge, h_edge[COUNT];
        const Storage* edges[COUNT];
        w_edge.load(w + tiled, a.D - tiled);
        for (int k = 0; k < COUNT; ++k) {
            h_edge[k].load(h[k] + tiled, a.D - tiled);
            edges[k] = h_edge[k].x;
        }
        add_tile(w_edge.x, edges, 0);
    }
    for (int k = 0; k < COUNT; ++k) a.x[a.entries ? a.entries[i + k] : i + k] = sum_places<T::ORDER>(sum[k]);
}

// The logits of entries begin to end, in the order of the arrays.
template <class T>
void sparse_logits(const SparseLogits& a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
        int64_t stop = i + 1;
        while (stop < end && stop < i + ENTRIES && a.tokens[stop] == a.tokens[i]) ++stop;
        if (stop == i + ENTRIES) {
            token_logits<T, ENTRIES>(a, i, end);
            i = stop;
        }
        for (; i < stop; ++i) token_logits<T, 1>(a, i, end);
    }
}

}  // namespace
