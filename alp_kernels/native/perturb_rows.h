// u = h + sigma * rms * eps, and dsigma = sum(du * rms * eps), one row at a time.
#pragma once

#include "segments.h"

namespace {

template <class T>
double mean_square(const typename T::Storage* h, int64_t D) {
    TileSum<T::ORDER> sum;
    F32 x[V];
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE) {
        T::load_tile(h + d, x);
        sum.add(x, x);
        if ((d / TILE + 1) % sum.MOST == 0) sum.flush();
    }
    if (d < D) {
        alignas(64) typename T::Storage edge[TILE] = {};
        __builtin_memcpy(edge, h + d, static_cast<size_t>(D - d) * sizeof edge[0]);
        T::load_tile(edge, x);
        sum.add(x, x);
    }
    return sum.total() / static_cast<double>(D);
}

template <class T, bool stochastic>
ALP_INLINE inline void perturb_tile(
    const RowStream& noise, const RowStream& rounding, const Counters& counters, float amount,
    Streams<const typename T::Storage> h, Streams<typename T::Storage> u) {
    F32 eps[4][V], x[V];
    U32 words[4][V];
    row_normals(noise, counters, eps);
    if (stochastic) row_words(rounding, counters, words);
    for (int j = 0; j < 4; ++j) {
        T::load_tile(h[j], x);
        for (int v = 0; v < V; ++v) x[v] += amount * eps[j][v];
        if (stochastic) {
            T::store_tile(x, words[j], u[j]);
        } else {
            T::store_tile(x, u[j]);
        }
    }
}

template <class T, bool stochastic>
void perturb_row(
    const Stream& stream, int64_t n, int64_t D, float amount, const typename T::Storage* h, typename T::Storage* u) {
    const int64_t Q = quarter_of(D), whole = whole_tiles(Q, D);
    const RowStream noise(stream, n), rounding(stream, n, stochastic ? ROUNDING_BIT : 0);
    Counters counters(0, T::ORDER);
    int64_t q0 = 0;
    for (; q0 < whole; q0 += TILE, counters.advance()) {
        perturb_tile<T, stochastic>(noise, rounding, counters, amount, {h + q0, Q}, {u + q0, Q});
    }
    for (; q0 < Q; q0 += TILE, counters.advance()) {
        EdgeTile<typename T::Storage> from, to;
        from.load(h, q0, Q, D);
        perturb_tile<T, stochastic>(noise, rounding, counters, amount, {from.x[0], TILE}, {to.x[0], TILE});
        to.store(u, q0, Q, D);
    }
}

template <class T>
void perturb_fwd_row(const Stream& stream, const PerturbFwd& a, int64_t n) {
    const auto* h = static_cast<const typename T::Storage*>(a.h) + n * a.D;
    auto* u = static_cast<typename T::Storage*>(a.u) + n * a.D;
    float amount = *a.sigma;
    if (a.rms) {
        a.rms[n] = __builtin_sqrtf(static_cast<float>(mean_square<T>(h, a.D)));
        amount *= a.rms[n];
    }
    if (T::IS_16_BIT && a.stochastic) {
        perturb_row<T, T::IS_16_BIT>(stream, n, a.D, amount, h, u);
    } else {
        perturb_row<T, false>(stream, n, a.D, amount, h, u);
    }
}

template <class T>
ALP_INLINE inline void dsigma_tile(
    const RowStream& noise, const Counters& counters, Streams<const typename T::Storage> du, TileSum<T::ORDER>& sum) {
    F32 eps[4][V], x[V];
    row_normals(noise, counters, eps);
    for (int j = 0; j < 4; ++j) {
        T::load_tile(du[j], x);
        sum.add(x, eps[j]);
    }
}

template <class T>
double perturb_bwd_row(const Stream& stream, const PerturbBwd& a, int64_t n) {
    const int64_t D = a.D, Q = quarter_of(D), whole = whole_tiles(Q, D);
    const auto* du = static_cast<const typename T::Storage*>(a.du) + n * D;
    const RowStream noise(stream, n);
    Counters counters(0, T::ORDER);
    TileSum<T::ORDER> sum;
    int64_t q0 = 0;
    for (; q0 < whole; q0 += TILE, counters.advance()) {
        dsigma_tile<T>(noise, counters, {du + q0, Q}, sum);
        if ((q0 + TILE) % BLOCK == 0) sum.flush();
    }
    for (; q0 < Q; q0 += TILE, counters.advance()) {
        EdgeTile<typename T::Storage> from;
        from.load(du, q0, Q, D);
        dsigma_tile<T>(noise, counters, {from.x[0], TILE}, sum);
    }
    return a.rms ? sum.total() * static_cast<double>(a.rms[n]) : sum.total();
}

}  // namespace
