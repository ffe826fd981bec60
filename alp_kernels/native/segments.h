// Pieces of a row in and out of float32, and sums whose order is fixed.
#pragma once

#include "dtypes.h"
#include "noise.h"

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

template <class T>
inline void store_stochastic(const float* from, const uint32_t* word, int size, typename T::Storage* to) {
#pragma omp simd
    for (int i = 0; i < size; ++i) to[i] = T::stochastic(from[i], word[i]);
}

using Lanes = float __attribute__((vector_size(4 * LANES)));

inline Lanes lanes_at(const float* x) {
    Lanes lanes;
    __builtin_memcpy(&lanes, x, sizeof lanes);
    return lanes;
}

// Sixteen sums: float32 within a block (at most 4 BLOCK / LANES terms a lane), float64 across blocks.
struct Sum {
    alignas(64) double lane[LANES] = {};

    void add(const Lanes& block) {
        for (int l = 0; l < LANES; ++l) lane[l] += static_cast<double>(block[l]);
    }
    double total() const {
        double sum = 0;
        for (int l = 0; l < LANES; ++l) sum += lane[l];
        return sum;
    }
};

}  // namespace
