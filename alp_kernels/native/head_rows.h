// Log-probability, entropy and log-sum-exp of rows of logits, and their gradient, for whole rows or tile by tile.
#pragma once

#include <math.h>

#include "segments.h"

namespace {

// How a row's tile is split into blocks of four pieces. With noise the pieces are a quarter of the vocabulary apart,
// because those logits share a Philox call. Without noise the four pieces are adjacent.
struct Walk {
    int64_t width, quarter;
    bool noisy;

    explicit Walk(const Head& a) : width(a.width), quarter(quarter_of(a.width)), noisy(a.sigma != nullptr) {}

    int64_t at(int j, int64_t q0) const { return noisy ? j * quarter + q0 : 4 * q0 + j * BLOCK; }
    int count(int64_t q0) const {  // elements per piece, with padding
        if (noisy) return block_size(q0, quarter);
        const int64_t left = width - 4 * q0;
        return left >= BLOCK ? BLOCK : static_cast<int>((left + LANES - 1) / LANES) * LANES;
    }
    int size(int j, int64_t q0, int count) const {  // elements of piece j, without padding
        if (noisy) return stream_size(j, q0, count, quarter, width);
        const int64_t left = width - at(j, q0);
        return static_cast<int>(left < 0 ? 0 : left < BLOCK ? left : BLOCK);
    }
};

// Where a tile holds the row's target: element i of piece j of the block at q0. q0 is -1 if it does not hold it.
struct Target {
    int64_t q0 = -1;
    int j = 0, i = 0;

    Target(const Walk& walk, int64_t position) {  // counted from the tile's first token
        if (position < 0 || position >= walk.width) return;
        const int64_t piece = walk.noisy ? walk.quarter : BLOCK;
        const int64_t q = walk.noisy ? position % piece : position / (4 * BLOCK) * BLOCK;
        j = static_cast<int>(walk.noisy ? position / piece : position / piece % 4);
        q0 = q / BLOCK * BLOCK;
        i = static_cast<int>(walk.noisy ? q - q0 : position % BLOCK);
    }
};

// z of a block of logits, and the values its gradient needs; elements past the row's end are -inf.
struct HeadBlock {
    alignas(64) float z[4][BLOCK];
    alignas(64) float tanh[4][BLOCK];
    Normals noise;
};

// Turns one piece of logits into z; tanh is written with a softcap, eps is null without noise.
inline void to_z(const Head& a, int64_t n, int count, float* z, float* tanh, const float* eps) {
    if (a.logit_scale != 1.0f) {
#pragma omp simd
        for (int i = 0; i < count; ++i) z[i] *= a.logit_scale;
    }
    if (a.softcap != 0.0f) {
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            tanh[i] = tanh_of(z[i] / a.softcap);
            z[i] = a.softcap * tanh[i];
        }
    }
    if (eps) {
        const float sigma = *a.sigma;
#pragma omp simd
        for (int i = 0; i < count; ++i) z[i] += sigma * eps[i];
    }
    if (a.temperature) {
        const float temperature = a.temperature[n];
#pragma omp simd
        for (int i = 0; i < count; ++i) z[i] /= temperature;
    }
}

template <class T>
inline void load_head(
    const Head& a, const Walk& walk, const RowStream& noise, int64_t n, int64_t q0, int count, HeadBlock& out) {
    const auto* x = static_cast<const typename T::Storage*>(a.x) + n * a.width;
    if (a.sigma) normal_block(noise, q0, count, out.noise);
    for (int j = 0; j < 4; ++j) {
        float* z = out.z[j];
        const int size = walk.size(j, q0, count);
        load<T>(x + walk.at(j, q0), size, z, count, -INFINITY);
        to_z(a, n, count, z, out.tanh[j], a.sigma ? out.noise.eps[j] : nullptr);
        for (int i = size; i < count; ++i) z[i] = -INFINITY;  // again, because a softcap makes it finite
    }
}

inline float larger(float a, float b) { return a > b ? a : b; }

// Largest z of a block. It may skip NaN, which still reaches the sums. The maximum is elementwise first, because
// compilers vectorise a max reduction only if they may ignore NaN.
inline float block_max(const HeadBlock& block, int count) {
    alignas(64) float top[BLOCK];
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        top[i] = larger(larger(block.z[0][i], block.z[1][i]), larger(block.z[2][i], block.z[3][i]));
    }
    for (int i = LANES; i < count; i += LANES) {
#pragma omp simd
        for (int l = 0; l < LANES; ++l) top[l] = larger(top[l], top[i + l]);
    }
    float max = -INFINITY;
    for (int l = 0; l < LANES; ++l) max = larger(top[l], max);
    return max;
}

// Finds the block's element z and excludes it from later sums. Called only when a row's maximum rises, a few times a row.
inline void take_out(HeadBlock& block, int count, float z, int* at_j, int* at_i) {
    for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < count; ++i) {
            if (block.z[j][i] == z) {
                block.z[j][i] = -INFINITY;
                *at_j = j;
                *at_i = i;
                return;
            }
        }
    }
}

// Rescales stored exponentials after the largest z has changed.
template <class T>
inline void rescale(typename T::Storage* x, int64_t size, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] = T::nearest(T::load(x[i]) * factor);
}

// Sum of a piece's exponentials, in the same order on every CPU.
inline float piece_sum(const float* exp, int count) {
    alignas(64) float part[LANES];
    Lanes lanes = {};
    for (int i = 0; i < count; i += LANES) lanes += lanes_at(exp + i);
    put(lanes, part);
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) part[l] += part[l + half];
    }
    return part[0];
}

// One pass: sums are relative to the largest z so far, and rescaled when a larger one appears. They exclude the largest
// term, which is 1, so log1p of a near-certain row keeps its precision. The target's term is added at the end.
template <class T>
void head_fwd_row(const Stream& stream, const Head& a, const HeadFwd& out, int64_t n) {
    const Walk walk(a);
    const Target target(walk, a.targets[n] - a.start);
    const RowStream noise(stream, a.sigma ? n : 0);
    HeadBlock block;
    alignas(64) float exp[BLOCK], weighted_exp[BLOCK];
    Sum others, weighted;  // sums of e^(z - top) and e^(z - top) (z - top), without top and target
    float top = -INFINITY, target_z = NAN;
    bool target_is_top = false;
    double* carry = out.carry ? out.carry + n * CARRY : nullptr;
    auto* x = static_cast<typename T::Storage*>(a.x) + n * a.width;
    if (a.start > 0) {
        top = static_cast<float>(carry[0]);
        others.lane[0] = carry[1];
        weighted.lane[0] = carry[2];
        target_z = static_cast<float>(carry[3]);
        target_is_top = carry[4] != 0;
    }
    for (int64_t q0 = 0; 4 * q0 < a.width; q0 += BLOCK) {
        const int count = walk.count(q0);
        load_head<T>(a, walk, noise, n, q0, count, block);
        const bool has_target = q0 == target.q0;
        if (has_target) target_z = block.z[target.j][target.i];
        const float max = block_max(block, count);
        int top_j = -1, top_i = 0;  // position of a new largest element
        if (max > top) {
            if (top > -INFINITY) {
                const double shift = static_cast<double>(top) - static_cast<double>(max), factor = ::exp(shift);
                if (out.base) rescale<T>(x, 4 * q0, static_cast<float>(factor));
                for (int l = 0; l < LANES; ++l) {
                    weighted.lane[l] = (weighted.lane[l] + others.lane[l] * shift) * factor;
                    others.lane[l] *= factor;
                }
                if (!target_is_top) {  // adds the previous largest term, which the sums excluded
                    others.lane[0] += factor;
                    weighted.lane[0] += factor * shift;
                }
            }
            top = max;
            take_out(block, count, top, &top_j, &top_i);
            target_is_top = has_target && top_j == target.j && top_i == target.i;
        }
        if (has_target) block.z[target.j][target.i] = -INFINITY;
        const float base = top == -INFINITY ? 0.0f : top;
        Lanes exp_sum = {}, weighted_sum = {};
        for (int j = 0; j < 4; ++j) {
            const float* z = block.z[j];
#pragma omp simd
            for (int i = 0; i < count; ++i) {
                const float shifted = z[i] - base;
                const float clamped = shifted < EXP_FLOOR ? EXP_FLOOR : shifted;
                exp[i] = exp_of(clamped);
                weighted_exp[i] = exp[i] * clamped;
            }
            for (int i = 0; i < count; i += LANES) {
                exp_sum += lanes_at(exp + i);
                weighted_sum += lanes_at(weighted_exp + i);
            }
            if (out.base) store<T>(exp, walk.size(j, q0, count), x + walk.at(j, q0));
            if (out.sums && 4 * q0 + j * BLOCK < a.width) {
                const bool lacks = j == top_j || (has_target && j == target.j);  // an element that the sum should have
                out.sums[n * out.pieces + 4 * (q0 / BLOCK) + j] = lacks ? INFINITY : piece_sum(exp, count);
                out.bases[n * out.pieces + 4 * (q0 / BLOCK) + j] = base;
            }
        }
        if (out.base && top_j >= 0 && !target_is_top) x[walk.at(top_j, q0) + top_i] = T::nearest(1.0f);
        others.add(exp_sum);
        weighted.add(weighted_sum);
    }
    if (out.base) out.base[n] = top == -INFINITY ? 0.0f : top;
    if (a.start + a.width < a.V) {
        carry[0] = static_cast<double>(top);
        carry[1] = others.total();
        carry[2] = weighted.total();
        carry[3] = static_cast<double>(target_z);
        carry[4] = target_is_top;
        return;
    }
    const double t = static_cast<double>(target_z) - static_cast<double>(top), target_exp = ::exp(t);
    double rest = others.total() + (target_is_top ? 0.0 : target_exp);
    if (__builtin_isinf(top)) rest = NAN;  // infinite logits define no distribution
    const double log_total = ::log1p(rest);
    const double mean = (weighted.total() + (target_exp > 0 ? target_exp * t : 0.0)) / (1 + rest);
    out.logp[n] = static_cast<float>(t - log_total);
    out.entropy[n] = static_cast<float>(log_total - mean);
    out.lse[n] = static_cast<float>(static_cast<double>(top) + log_total);
}

// dz_v = dlogp (is_target_v - p_v) - dentropy p_v (ln p_v + H); the target's 1 - p comes from expm1, without cancellation.
template <class T>
double head_bwd_row(const Stream& stream, const Head& a, const HeadBwd& rows, int64_t m) {
    const int64_t n = rows.rows ? rows.rows[m] : m;
    const Walk walk(a);
    const Target target(walk, a.targets[n] - a.start);
    auto* dx = static_cast<typename T::Storage*>(rows.dx) + m * a.width;
    const RowStream noise(stream, a.sigma ? n : 0);
    const float lse = rows.lse[n], dlogp = rows.dlogp[n], entropy = rows.entropy[n];
    const float dentropy = rows.dentropy ? rows.dentropy[n] : 0.0f;
    const float certain = dlogp * static_cast<float>(-::expm1(static_cast<double>(rows.logp[n])));
    HeadBlock block;
    Sum dsigma;
    for (int64_t q0 = 0; 4 * q0 < a.width; q0 += BLOCK) {
        const int count = walk.count(q0);
        load_head<T>(a, walk, noise, n, q0, count, block);
        Lanes noise_sum = {};
        for (int j = 0; j < 4; ++j) {
            const int size = walk.size(j, q0, count);
            if (size == 0) continue;
            float* dz = block.z[j];
            if (rows.dentropy) {
#pragma omp simd
                for (int i = 0; i < count; ++i) {
                    const float log_p = dz[i] - lse;
                    const float clamped = log_p < EXP_FLOOR ? EXP_FLOOR : log_p;
                    const float p = exp_of(clamped);
                    dz[i] = -(dlogp * p) - dentropy * (p * (clamped + entropy));
                }
            } else {
#pragma omp simd
                for (int i = 0; i < count; ++i) {
                    const float log_p = dz[i] - lse;
                    dz[i] = -(dlogp * exp_of(log_p < EXP_FLOOR ? EXP_FLOOR : log_p));
                }
            }
            if (q0 == target.q0 && j == target.j) {
                const float log_p = rows.logp[n];  // more precise than z - lse
                const float clamped = log_p < EXP_FLOOR ? EXP_FLOOR : log_p;
                dz[target.i] = certain - (rows.dentropy ? dentropy * (exp_of(clamped) * (clamped + entropy)) : 0.0f);
            }
            if (a.temperature) {
                const float temperature = a.temperature[n];
#pragma omp simd
                for (int i = 0; i < count; ++i) dz[i] /= temperature;
            }
            if (a.sigma) {
                for (int i = 0; i < count; i += LANES) noise_sum += lanes_at(dz + i) * lanes_at(block.noise.eps[j] + i);
            }
            if (a.softcap != 0.0f) {
#pragma omp simd
                for (int i = 0; i < count; ++i) dz[i] *= 1.0f - block.tanh[j][i] * block.tanh[j][i];
            }
            if (a.logit_scale != 1.0f) {
#pragma omp simd
                for (int i = 0; i < count; ++i) dz[i] *= a.logit_scale;
            }
            store<T>(dz, size, dx + walk.at(j, q0));
        }
        dsigma.add(noise_sum);
    }
    return dsigma.total();
}

}  // namespace
