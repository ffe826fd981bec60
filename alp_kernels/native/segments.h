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

// Asks for a block's four pieces of a row ahead of its noise, which takes longer than memory: written to where `write`.
template <bool write, class Storage>
inline void prefetch_block(const Storage* row, int64_t q0, int count, int64_t quarter) {
    for (int j = 0; j < 4; ++j) {
        const Storage* piece = row + j * quarter + q0;
        for (int i = 0; i < count; i += 64 / sizeof(Storage)) __builtin_prefetch(piece + i, write, 3);
    }
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
