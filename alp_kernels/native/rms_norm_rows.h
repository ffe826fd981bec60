// perturb and the RMSNorm after it: u as perturb stores it, y = u * rstd * scale, rstd = 1 / sqrt(mean_d u^2 + eps).
// A row's u stays in cache between the passes over it.
#pragma once

#include "perturb_rows.h"

namespace {

template <class T>
void norm_row(const typename T::Storage* u, float rstd, const float* scale, typename T::Storage* y, int64_t D) {
    const auto tile = [&](const typename T::Storage* from, const float* by, typename T::Storage* to) ALP_INLINE {
        F32 x[V], s[V];
        T::load_tile(from, x);
        T::load_floats(by, s);
        for (int v = 0; v < V; ++v) x[v] = x[v] * rstd * s[v];
        T::store_tile(x, to);
    };
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE) tile(u + d, scale + d, y + d);
    if (d < D) {
        Edge<typename T::Storage> from, to;
        Edge<float> by;
        from.load(u + d, D - d);
        by.load(scale + d, D - d);
        tile(from.x, by.x, to.x);
        to.store(y + d, D - d);
    }
}

template <class T>
void perturb_rms_norm_fwd_rows(const Stream& stream, const PerturbRmsNormFwd& a, int64_t begin, int64_t end) {
    using Storage = typename T::Storage;
    const int64_t D = a.perturb.D;
    const auto norm = [&](int64_t n, const Storage* u) {
        a.rstd[n] = static_cast<float>(1.0 / __builtin_sqrt(mean_square<T>(u, D) + static_cast<double>(a.eps)));
        norm_row<T>(u, a.rstd[n], a.scale, static_cast<Storage*>(a.y) + n * D, D);
    };
    if (T::IS_16_BIT && a.perturb.stochastic) {
        perturb_rows<T, T::IS_16_BIT>(stream, a.perturb, begin, end, norm);
    } else {
        perturb_rows<T, false>(stream, a.perturb, begin, end, norm);
    }
}

// Whether a value of the row is not zero; few rows are read beyond their first tile.
template <class T>
bool has_nonzero(const typename T::Storage* row, int64_t D) {
    F32 x[V];
    const auto is_nonzero = [&] {
        U32 found{};
        for (int v = 0; v < V; ++v) found |= (U32)(x[v] != 0.0f);
        bool any = false;
        for (int i = 0; i < W; ++i) any |= found[i] != 0;
        return any;
    };
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE) {
        T::load_tile(row + d, x);
        if (is_nonzero()) return true;
    }
    if (d == D) return false;
    Edge<typename T::Storage> edge;
    edge.load(row + d, D - d);
    T::load_tile(edge.x, x);
    return is_nonzero();
}

// sum_d dy_d scale_d u_d
template <class T>
double scaled_product(const typename T::Storage* dy, const float* scale, const typename T::Storage* u, int64_t D) {
    TileSum<T::ORDER> sum;
    const auto tile = [&](const typename T::Storage* dy, const float* scale, const typename T::Storage* u) ALP_INLINE {
        F32 g[V], s[V], x[V];
        T::load_tile(dy, g);
        T::load_floats(scale, s);
        T::load_tile(u, x);
        for (int v = 0; v < V; ++v) g[v] *= s[v];
        sum.add(g, x);
    };
    int64_t d = 0;
    for (; d + TILE <= D; d += TILE) {
        tile(dy + d, scale + d, u + d);
        if ((d / TILE + 1) % sum.MOST == 0) sum.flush();
    }
    if (d < D) {
        Edge<typename T::Storage> g, x;
        Edge<float> s;
        g.load(dy + d, D - d);
        s.load(scale + d, D - d);
        x.load(u + d, D - d);
        tile(g.x, s.x, x.x);
    }
    return sum.total();
}

// The gradient of one tile's four streams: total = du + rstd (g - x mean), g = dy scale, x = u rstd.
template <class T>
struct NormGradient {
    using Storage = typename T::Storage;

    float rstd, mean;
    Streams<const Storage> du, dy, u;
    Streams<const float> scale;
    Streams<Storage> dh;
    Streams<float> dweight;  // or null

    ALP_INLINE void stream(int j, F32 total[V]) const {
        F32 g[V], x[V], s[V];
        T::load_tile(du[j], total);
        T::load_tile(dy[j], g);
        T::load_tile(u[j], x);
        T::load_floats(scale[j], s);
        for (int v = 0; v < V; ++v) x[v] *= rstd;
        if (dweight.at) {
            F32 sum[V];
            T::load_floats(dweight[j], sum);
            for (int v = 0; v < V; ++v) sum[v] += g[v] * x[v];
            T::store_floats(sum, dweight[j]);
        }
        for (int v = 0; v < V; ++v) total[v] += rstd * (g[v] * s[v] - x[v] * mean);
        T::store_tile(total, dh[j]);
    }
};

template <class T>
ALP_INLINE inline void norm_gradient_tile(
    const RowStream* noise, const Counters& counters, const NormGradient<T>& gradient, TileSum<T::ORDER>& sum) {
    F32 eps[4][V], total[V];
    if (noise) row_normals(*noise, counters, eps);
    for (int j = 0; j < 4; ++j) {
        gradient.stream(j, total);
        if (noise) sum.add(total, eps[j]);
    }
}

// Writes dh of rows begin to end and each row's share of dsigma (unless shares is null), and adds the rows' sum of dy x
// to dweight (D,) (unless null), which the caller sets to zero.
template <class T>
void perturb_rms_norm_bwd_rows(
    const Stream& stream, const PerturbRmsNormBwd& a, double* shares, float* dweight, int64_t begin, int64_t end) {
    using Storage = typename T::Storage;
    const int64_t D = a.D, Q = quarter_of(D), whole = whole_tiles(Q, D);
    const Counters start(0, T::ORDER);
    RowStream row_stream(stream, begin);
    const RowStream* noise = shares ? &row_stream : nullptr;
    for (int64_t n = begin; n < end; ++n) {
        const auto* du = static_cast<const Storage*>(a.du) + n * D;
        const auto* dy = static_cast<const Storage*>(a.dy) + n * D;
        const bool is_live = has_nonzero<T>(dy, D);
        const auto* u = is_live ? static_cast<const Storage*>(a.u) + n * D : dy;  // which is zero: total is du then
        auto* dh = static_cast<Storage*>(a.dh) + n * D;
        const float rstd = is_live ? a.rstd[n] : 0.0f;
        const double product = is_live ? scaled_product<T>(dy, a.scale, u, D) : 0.0;
        const float mean = static_cast<float>(product * static_cast<double>(rstd) / static_cast<double>(D));
        row_stream.to_row(stream, n);
        Counters counters = start;
        TileSum<T::ORDER> sum;
        int64_t q0 = 0;
        for (; q0 < whole; q0 += TILE, counters.advance()) {
            const NormGradient<T> gradient = {
                rstd, mean, {du + q0, Q}, {dy + q0, Q}, {u + q0, Q}, {a.scale + q0, Q}, {dh + q0, Q},
                {dweight ? dweight + q0 : nullptr, Q}};
            norm_gradient_tile<T>(noise, counters, gradient, sum);
            if ((q0 + TILE) % BLOCK == 0) sum.flush();
        }
        for (; q0 < Q; q0 += TILE, counters.advance()) {
            EdgeTile<Storage> edge_du, edge_dy, edge_u, edge_dh;
            EdgeTile<float> edge_scale, edge_dweight;
            edge_du.load(du, q0, Q, D);
            edge_dy.load(dy, q0, Q, D);
            edge_u.load(u, q0, Q, D);
            edge_scale.load(a.scale, q0, Q, D);
            if (dweight) edge_dweight.load(dweight, q0, Q, D);
            const NormGradient<T> gradient = {
                rstd, mean, {edge_du.x[0], TILE}, {edge_dy.x[0], TILE}, {edge_u.x[0], TILE}, {edge_scale.x[0], TILE},
                {edge_dh.x[0], TILE}, {dweight ? edge_dweight.x[0] : nullptr, TILE}};
            norm_gradient_tile<T>(noise, counters, gradient, sum);
            edge_dh.store(dh, q0, Q, D);
            if (dweight) edge_dweight.store(dweight, q0, Q, D);
        }
        if (shares) shares[n] = dsigma_share(sum.total(), a.rms, n);
    }
}

}  // namespace
