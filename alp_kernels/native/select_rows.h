// The sampled backward's choice of a row's tokens; reference.select is the specification, docs/math.md section 5 the proof.
#pragma once

#include "head_rows.h"

namespace {

constexpr int MASS_BITS = 40;  // a block's mass is an integer, in units of 2^-40

// The points of a row's intervals, in order.
struct IntervalPoints {
    const RowStream& row;
    const int64_t first;
    const int width;  // an interval has length 2^width
    int64_t number = 0, point = 0, drawn = -TILE;  // `drawn`: the first group of `words`
    Words words;

    IntervalPoints(const RowStream& row, int64_t first, int width) : row(row), first(first), width(width) { draw(); }
    void draw() {
        const int64_t word = first + number, group = word >> 2;
        if (group >= drawn + TILE) {
            drawn = group;
            random_block(row, drawn, TILE, words);
        }
        const int64_t drop = words.word[word & 3][group - drawn];
        point = (number << width) + (width > 32 ? drop << (width - 32) : drop >> (32 - width));
    }
    void next() {
        ++number;
        draw();
    }
};

// The entries of one row.
struct RowEntries {
    int32_t* tokens;
    float* p;
    int64_t room, count = 0;

    void add(int64_t token, float value) {
        if (count < room) {  // a row never needs more; if one did, Python would raise
            tokens[count] = static_cast<int32_t>(token);
            p[count] = value;
        }
        ++count;
    }
};

inline int64_t mass_of(double p) { return __builtin_llrint(p * 0x1p40); }

// p of one block, with 0 at the target and past the row's end; `small` are those below the threshold, the others are kept.
struct Piece {
    alignas(64) float p[BLOCK], small[BLOCK];
    double sums[BLOCK / LANES];  // of each group of `small`
    bool has_kept[BLOCK / LANES];
    double total = 0;

    template <class T>
    void load(const Head& a, int64_t n, int64_t start, float lse, float threshold) {
        alignas(64) float tanh[BLOCK];
        const auto* x = static_cast<const typename T::Storage*>(a.x) + n * a.width + start;
        const int size = static_cast<int>(a.width - start < BLOCK ? a.width - start : BLOCK);
        ::load<T>(x, size, p, BLOCK, -INFINITY);
        to_z(a, n, BLOCK, p, tanh, nullptr);
        for (int i = size; i < BLOCK; ++i) p[i] = -INFINITY;  // again, because a softcap makes it finite
        if (a.targets[n] >= start && a.targets[n] < start + size) p[a.targets[n] - start] = -INFINITY;
#pragma omp simd
        for (int i = 0; i < BLOCK; ++i) {
            const float log_p = p[i] - lse;
            p[i] = exp_of(log_p < EXP_FLOOR ? EXP_FLOOR : log_p);
            small[i] = p[i] < threshold ? p[i] : 0.0f;
        }
        total = 0;
        for (int g = 0; g < BLOCK / LANES; ++g) {
            float largest = 0.0f;
#pragma omp simd reduction(max : largest)
            for (int i = g * LANES; i < (g + 1) * LANES; ++i) largest = largest < p[i] ? p[i] : largest;
            has_kept[g] = largest >= threshold;
            sums[g] = static_cast<double>(piece_sum(small + g * LANES, LANES));
            total += sums[g];
        }
    }
    // The first token whose share of the block's length covers `part` of it, counted from the block's first.
    int at(double part) const {
        const double goal = part * total;
        double sum = 0;
        int last = 0;
        for (int g = 0; g < BLOCK / LANES; ++g) {
            if (sum + sums[g] <= goal && g < BLOCK / LANES - 1) {
                sum += sums[g];
                if (sums[g] > 0) last = (g + 1) * LANES - 1;
                continue;
            }
            for (int i = g * LANES; i < (g + 1) * LANES; ++i) {
                sum += static_cast<double>(small[i]);
                if (small[i] > 0) last = i;
                if (sum > goal) return i;
            }
        }
        while (last > 0 && small[last] == 0.0f) --last;
        return last;
    }
};

template <class T>
void select_row(const Stream& stream, const Head& a, const Select& to, int64_t n) {
    RowEntries entries{to.tokens + n * to.room, to.p + n * to.room, to.room};
    entries.add(a.targets[n] < 0 ? 0 : a.targets[n], static_cast<float>(::exp(static_cast<double>(to.logp[n]))));
    const float threshold = float_of(static_cast<uint32_t>(127 - to.bits) << 23), lse = to.lse[n];
    if (!__builtin_isfinite(lse)) {  // the row has no distribution; its target's gradient is NaN
        to.counts[n] = entries.count;
        return;
    }
    const RowStream row(stream, n);
    IntervalPoints points(row, to.first, MASS_BITS - to.bits);
    const float *sums = to.sums + n * to.pieces, *bases = to.bases + n * to.pieces;
    Piece piece;
    int64_t mass = 0;
    double scale = 0, base = NAN;
    for (int64_t k = 0; k < to.pieces; ++k) {
        if (static_cast<double>(bases[k]) != base) {
            base = static_cast<double>(bases[k]);
            scale = ::exp(base - static_cast<double>(lse));
        }
        const double sum = static_cast<double>(sums[k]) * scale;
        const bool may_keep = !(sum < static_cast<double>(threshold));
        int64_t length = 0;
        if (!may_keep) {
            length = mass_of(sum);
            if (points.point >= mass + length) {
                mass += length;
                continue;
            }
        }
        piece.load<T>(a, n, k * BLOCK, lse, threshold);
        if (may_keep) length = mass_of(piece.total);
        for (int g = 0; may_keep && g < BLOCK / LANES; ++g) {
            if (!piece.has_kept[g]) continue;
            for (int i = g * LANES; i < (g + 1) * LANES; ++i) {
                if (piece.p[i] >= threshold) entries.add(k * BLOCK + i, piece.p[i]);
            }
        }
        while (points.point < mass + length) {
            const int i = piece.at(static_cast<double>(points.point - mass) / static_cast<double>(length));
            entries.add(k * BLOCK + i, piece.p[i]);
            points.next();
        }
        mass += length;
    }
    to.counts[n] = entries.count;
}

}  // namespace
