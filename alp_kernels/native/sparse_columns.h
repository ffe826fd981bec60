// The sampled backward's two products with a sparse matrix dx (n, V): dh = dx W, dW = dx' h. The entries are sorted by token,
// so a row of W is read once and a row of dW written once, while h and dh (n, D) stay in cache. A thread owns some channels of
// all rows, so each sum runs over the entries in order, whatever the number of threads.
#pragma once

#include "segments.h"

namespace {

template <class T>
struct Rounded {
    using Type = T;
};
template <>
struct Rounded<Float16> {  // its range is small
    using Type = Float32;
};

constexpr int COLUMN_TILES = W == 16 ? 2 : 1;  // of TILE channels each, in registers at a time

// Adds the entries of one token to COUNT tiles of channels from d on. dh's tiles are in T's order.
template <class T, int COUNT>
inline void token_tiles(const Sparse& a, int64_t token, int64_t begin, int64_t end, int64_t d) {
    using Out = typename Rounded<T>::Type;
    const auto* hidden = static_cast<const typename T::Storage*>(a.hidden) + d;
    F32 w[COUNT * V] = {}, sum[COUNT * V] = {};
    if (a.dhidden) {
        const auto* weight = static_cast<const typename T::Storage*>(a.weight) + token * a.D + d;
        for (int t = 0; t < COUNT; ++t) T::load_tile(weight + t * TILE, w + t * V);
    }
    for (int64_t e = begin; e < end; ++e) {
        const int64_t at = static_cast<int64_t>(a.rows[e]) * a.D;
        const F32 value = F32{} + a.values[e];
        if (a.dweight) {
            F32 h[COUNT * V];
            for (int t = 0; t < COUNT; ++t) T::load_tile(hidden + at + t * TILE, h + t * V);
            for (int v = 0; v < COUNT * V; ++v) sum[v] = fma(value, h[v], sum[v]);
        }
        if (a.dhidden) {
            float* dh = a.dhidden + at + d;
            for (int v = 0; v < COUNT * V; ++v) put(fma(value, w[v], vector_at<F32>(dh + v * W)), dh + v * W);
        }
    }
    if (a.dweight) {
        auto* dweight = static_cast<typename Out::Storage*>(a.dweight) + token * a.D + d;
        for (int t = 0; t < COUNT; ++t) Out::store_tile(sum + t * V, dweight + t * TILE);
    }
}

// The same for one channel, at the end of rows whose length is no multiple of TILE.
template <class T>
inline void token_channel(const Sparse& a, int64_t token, int64_t begin, int64_t end, int64_t d) {
    using Out = typename Rounded<T>::Type;
    const auto* hidden = static_cast<const typename T::Storage*>(a.hidden) + d;
    const float w = a.dhidden ? T::load(static_cast<const typename T::Storage*>(a.weight)[token * a.D + d]) : 0.0f;
    float sum = 0.0f;
    for (int64_t e = begin; e < end; ++e) {
        const int64_t at = static_cast<int64_t>(a.rows[e]) * a.D;
        if (a.dweight) sum = __builtin_fmaf(a.values[e], T::load(hidden[at]), sum);
        if (a.dhidden) a.dhidden[at + d] = __builtin_fmaf(a.values[e], w, a.dhidden[at + d]);
    }
    if (a.dweight) static_cast<typename Out::Storage*>(a.dweight)[token * a.D + d] = Out::nearest(sum);
}

// Channels d_begin to d_end of dh and dW; d_begin is a multiple of TILE.
template <class T>
void sparse_columns(const Sparse& a, int64_t d_begin, int64_t d_end) {
    using Out = typename Rounded<T>::Type;
    const int64_t tiled = d_begin + (d_end - d_begin) / TILE * TILE;
    for (int64_t token = 0; token < a.V; ++token) {
        const int64_t begin = a.starts[token], end = a.starts[token + 1];
        if (begin == end) {
            if (a.dweight) {
                auto* dweight = static_cast<typename Out::Storage*>(a.dweight) + token * a.D;
                __builtin_memset(dweight + d_begin, 0, static_cast<size_t>(d_end - d_begin) * sizeof *dweight);
            }
            continue;
        }
        int64_t d = d_begin;
        for (; d + COLUMN_TILES * TILE <= tiled; d += COLUMN_TILES * TILE) {
            token_tiles<T, COLUMN_TILES>(a, token, begin, end, d);
        }
        for (; d < tiled; d += TILE) token_tiles<T, 1>(a, token, begin, end, d);
        for (; d < d_end; ++d) token_channel<T>(a, token, begin, end, d);
    }
    if (!a.dhidden || T::ORDER == IN_ORDER) return;
    for (int64_t n = 0; n < a.N; ++n) {
        for (int64_t d = d_begin; d < tiled; d += TILE) {
            float* dh = a.dhidden + n * a.D + d;
            F32 x[V];
            Float32::load_tile(dh, x);
            T::store_floats(x, dh);
        }
    }
}

}  // namespace
