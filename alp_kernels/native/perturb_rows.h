// u = h + sigma * rms * eps, and dsigma = sum(du * rms * eps), for rows begin to end.
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
        Edge<typename T::Storage> edge;
        edge.load(h + d, D - d);
        T::load_tile(edge.x, x);
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

// A thread's state for perturbing rows, set up once for all of them.
template <class T, bool stochastic>
struct Perturber {
    using Storage = typename T::Storage;

    const Stream& stream;
    const int64_t D, Q = quarter_of(D), whole = whole_tiles(Q, D);
    const Counters start{0, T::ORDER};
    RowStream noise{stream, 0}, rounding{stream, 0};

    Perturber(const Stream& stream, int64_t D) : stream(stream), D(D) {}

    void row(int64_t n, float amount, const Storage* h, Storage* u) {
        noise.to_row(stream, n);
        if (stochastic) rounding.to_row(stream, n, ROUNDING_BIT);
        Counters counters = start;
        int64_t q0 = 0;
        for (; q0 < whole; q0 += TILE, counters.advance()) {
            prefetch_next(h, D, q0);
            prefetch_next(u, D, q0);
            perturb_tile<T, stochastic>(noise, rounding, counters, amount, {h + q0, Q}, {u + q0, Q});
        }
        for (; q0 < Q; q0 += TILE, counters.advance()) {
            EdgeTile<Storage> from, to;
            from.load(h, q0, Q, D);
            perturb_tile<T, stochastic>(noise, rounding, counters, amount, {from.x[0], TILE}, {to.x[0], TILE});
            to.store(u, q0, Q, D);
        }
    }
};

// Calls f(n, row n of u) after each row of u is stored.
template <class T, bool stochastic, class F>
ALP_INLINE inline void perturb_rows(const Stream& stream, const PerturbFwd& a, int64_t begin, int64_t end, F f) {
    Perturber<T, stochastic> perturber(stream, a.D);
    for (int64_t n = begin; n < end; ++n) {
        const auto* h = static_cast<const typename T::Storage*>(a.h) + n * a.D;
        auto* u = static_cast<typename T::Storage*>(a.u) + n * a.D;
        float amount = *a.sigma;
        if (a.rms) {
            a.rms[n] = __builtin_sqrtf(static_cast<float>(mean_square<T>(h, a.D)));
            amount *= a.rms[n];
        }
        perturber.row(n, amount, h, u);
        f(n, u);
    }
}

template <class T>
void perturb_fwd_rows(const Stream& stream, const PerturbFwd& a, int64_t begin, int64_t end) {
    const auto nothing = [](int64_t, const typename T::Storage*) {};
    if (T::IS_16_BIT && a.stochastic) {
        perturb_rows<T, T::IS_16_BIT>(stream, a, begin, end, nothing);
    } else {
        perturb_rows<T, false>(stream, a, begin, end, nothing);
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

// sum_d x_d eps_d of row n, for x of dtype T.
template <class T>
struct NoiseProduct {
    using Storage = typename T::Storage;

    const Stream& stream;
    const int64_t D, Q = quarter_of(D), whole = whole_tiles(Q, D);
    const Counters start{0, T::ORDER};
    RowStream noise{stream, 0};

    NoiseProduct(const Stream& stream, int64_t D) : stream(stream), D(D) {}

    double row(int64_t n, const Storage* x) {
        noise.to_row(stream, n);
        Counters counters = start;
        TileSum<T::ORDER> sum;
        int64_t q0 = 0;
        for (; q0 < whole; q0 += TILE, counters.advance()) {
            prefetch_next(x, D, q0);
            dsigma_tile<T>(noise, counters, {x + q0, Q}, sum);
            if ((q0 + TILE) % BLOCK == 0) sum.flush();
        }
        for (; q0 < Q; q0 += TILE, counters.advance()) {
            EdgeTile<Storage> from;
            from.load(x, q0, Q, D);
            dsigma_tile<T>(noise, counters, {from.x[0], TILE}, sum);
        }
        return sum.total();
    }
};

// A row's share of dsigma, from sum_d du_d eps_d. A row whose du is zero has none, even if its rms is NaN or inf.
inline double dsigma_share(double product, const float* rms, int64_t n) {
    return rms && product != 0 ? product * static_cast<double>(rms[n]) : product;
}

// Writes each row's share of dsigma.
template <class T>
void perturb_bwd_rows(const Stream& stream, const PerturbBwd& a, double* shares, int64_t begin, int64_t end) {
    NoiseProduct<T> product(stream, a.D);
    for (int64_t n = begin; n < end; ++n) {
        shares[n] = dsigma_share(product.row(n, static_cast<const typename T::Storage*>(a.du) + n * a.D), a.rms, n);
    }
}

template <class T>
void measure_row(const Measure& a, int64_t n) {
    using Storage = typename T::Storage;
    const auto* h = static_cast<const Storage*>(a.h) + n * a.D;
    const auto* u = static_cast<const Storage*>(a.u) + n * a.D;
    TileSum<T::ORDER> noise, changed, size;
    const auto add = [&](const Storage* h_tile, const Storage* u_tile) {
        F32 x[V], difference[V], is_changed[V];
        T::load_tile(h_tile, x);
        T::load_tile(u_tile, difference);
        for (int v = 0; v < V; ++v) {
            difference[v] -= x[v];
            is_changed[v] = (F32)((U32)(difference[v] != 0.0f) & bits_of(1.0f));
        }
        noise.add(difference, difference);
        changed.add(is_changed, is_changed);
        size.add(x, x);
    };
    int64_t d = 0;
    for (; d + TILE <= a.D; d += TILE) {
        add(h + d, u + d);
        if ((d / TILE + 1) % noise.MOST == 0) {
            noise.flush();
            changed.flush();
            size.flush();
        }
    }
    if (d < a.D) {
        Edge<Storage> of_h, of_u;
        of_h.load(h + d, a.D - d);
        of_u.load(u + d, a.D - d);
        add(of_h.x, of_u.x);
    }
    float* sums = a.sums + 3 * n;
    sums[0] = static_cast<float>(noise.total());
    sums[1] = static_cast<float>(changed.total());
    sums[2] = static_cast<float>(size.total());
}

}  // namespace
