// u = h + sigma * rms * eps, and dsigma = sum(du * rms * eps), one row at a time.
#pragma once

#include "segments.h"

namespace {

template <class T>
double mean_square(const typename T::Storage* h, int64_t D) {
    alignas(64) float buffer[BLOCK];
    Sum sum;
    for (int64_t d = 0; d < D; d += BLOCK) {
        const int size = D - d < BLOCK ? static_cast<int>(D - d) : BLOCK;
        load<T>(h + d, size, buffer, BLOCK, 0.0f);
        Lanes block = {};
        for (int i = 0; i < BLOCK; i += LANES) block += lanes_at(buffer + i) * lanes_at(buffer + i);
        sum.add(block);
    }
    return sum.total() / static_cast<double>(D);
}

template <class T>
void perturb_fwd_row(const Stream& stream, const PerturbFwd& a, int64_t n) {
    const int64_t D = a.D, Q = quarter_of(D);
    const auto* h = static_cast<const typename T::Storage*>(a.h) + n * D;
    auto* u = static_cast<typename T::Storage*>(a.u) + n * D;
    float amount = *a.sigma;
    if (a.rms) {
        a.rms[n] = __builtin_sqrtf(static_cast<float>(mean_square<T>(h, D)));
        amount *= a.rms[n];
    }
    const RowStream noise(stream, n), rounding(stream, n, ROUNDING_BIT);
    Normals normals;
    Words words;
    for (int64_t q0 = 0; q0 < Q; q0 += BLOCK) {
        const int count = block_size(q0, Q);
        prefetch_block<false>(h, q0, count, Q);
        prefetch_block<true>(u, q0, count, Q);
        normal_block(noise, q0, count, normals);
        const bool stochastic = T::IS_16_BIT && a.stochastic;
        if (stochastic) random_block(rounding, q0, count, words);
        for (int j = 0; j < 4; ++j) {
            const int64_t d = j * Q + q0;
            const int size = stream_size(j, q0, count, Q, D);
            if (stochastic) {
#pragma omp simd
                for (int i = 0; i < size; ++i) {
                    u[d + i] = T::stochastic(T::load(h[d + i]) + amount * normals.eps[j][i], words.word[j][i]);
                }
            } else {
#pragma omp simd
                for (int i = 0; i < size; ++i) u[d + i] = T::nearest(T::load(h[d + i]) + amount * normals.eps[j][i]);
            }
        }
    }
}

template <class T>
double perturb_bwd_row(const Stream& stream, const PerturbBwd& a, int64_t n) {
    const int64_t D = a.D, Q = quarter_of(D);
    const auto* du = static_cast<const typename T::Storage*>(a.du) + n * D;
    const RowStream noise(stream, n);
    Normals normals;
    alignas(64) float buffer[BLOCK];
    Sum sum;
    for (int64_t q0 = 0; q0 < Q; q0 += BLOCK) {
        const int count = block_size(q0, Q);
        prefetch_block<false>(du, q0, count, Q);
        normal_block(noise, q0, count, normals);
        Lanes block = {};
        for (int j = 0; j < 4; ++j) {
            const int size = stream_size(j, q0, count, Q, D);
            load<T>(du + j * Q + q0, size, buffer, count, 0.0f);
            for (int i = 0; i < count; i += LANES) block += lanes_at(buffer + i) * lanes_at(normals.eps[j] + i);
        }
        sum.add(block);
    }
    return a.rms ? sum.total() * static_cast<double>(a.rms[n]) : sum.total();
}

}  // namespace
