// One build of the row functions: CMake compiles this file once per instruction set, with its flags and ALP_ROWS.
#include "rms_norm_rows.h"
#include "select_rows.h"
#include "sparse_columns.h"
#include "sparse_logits.h"

namespace {

void philox_list(const int64_t* counter, int64_t* out, int64_t count, uint64_t key) {
    const Keys keys(key);
    constexpr int LANES_64 = sizeof(Wide) / sizeof(int64_t);
    for (int64_t i = 0; i < count; i += LANES_64) {
        const int64_t size = count - i < LANES_64 ? count - i : LANES_64;
        Wide c[4] = {};
        for (int j = 0; j < 4; ++j) __builtin_memcpy(&c[j], counter + j * count + i, size * sizeof(int64_t));
        for (int round = 0; round < 10; ++round) philox_round(c, keys, round);
        for (int j = 0; j < 4; ++j) {
            c[j] &= 0xFFFFFFFFu;
            __builtin_memcpy(out + j * count + i, &c[j], size * sizeof(int64_t));
        }
    }
}

void normals_list(const uint32_t* radius, const uint32_t* angle, float* cosine, float* sine, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const size_t size = static_cast<size_t>(count - i < W ? count - i : W) * 4;
        U32 radius_word = {}, angle_word = {};
        F32 normal[2];
        __builtin_memcpy(&radius_word, radius + i, size);
        __builtin_memcpy(&angle_word, angle + i, size);
        box_muller<1>(&radius_word, &angle_word, &normal[0], &normal[1]);
        __builtin_memcpy(cosine + i, &normal[0], size);
        __builtin_memcpy(sine + i, &normal[1], size);
    }
}

void words_row(const Stream& stream, int64_t n, int64_t D, int64_t* out, int64_t stride) {
    const int64_t Q = quarter_of(D);
    const RowStream row(stream, n);
    Words words;
    for (int64_t q0 = 0; q0 < Q; q0 += BLOCK) {
        const int count = block_size(q0, Q);
        random_block(row, q0, count, words);
        for (int j = 0; j < 4; ++j) {
            for (int i = 0; i < count && q0 + i < Q; ++i) out[j * stride + q0 + i] = words.word[j][i];
        }
    }
}

void normal_row(const Stream& stream, int64_t n, float* eps, int64_t D) {
    const int64_t Q = quarter_of(D);
    const RowStream row(stream, n);
    Normals normals;
    for (int64_t q0 = 0; q0 < Q; q0 += BLOCK) {
        const int count = block_size(q0, Q);
        normal_block(row, q0, count, normals);
        for (int j = 0; j < 4; ++j) store<Float32>(normals.eps[j], stream_size(j, q0, count, Q, D), eps + j * Q + q0);
    }
}

}  // namespace

namespace alp {

extern const Rows ALP_ROWS = {
    philox_list,
    normals_list,
    words_row,
    normal_row,
    {perturb_fwd_rows<Float32>, perturb_fwd_rows<BFloat16>, perturb_fwd_rows<Float16>},
    {perturb_bwd_rows<Float32>, perturb_bwd_rows<BFloat16>, perturb_bwd_rows<Float16>},
    {measure_row<Float32>, measure_row<BFloat16>, measure_row<Float16>},
    {perturb_rms_norm_fwd_rows<Float32>, perturb_rms_norm_fwd_rows<BFloat16>, perturb_rms_norm_fwd_rows<Float16>},
    {perturb_rms_norm_bwd_rows<Float32>, perturb_rms_norm_bwd_rows<BFloat16>, perturb_rms_norm_bwd_rows<Float16>},
    {head_fwd_row<Float32>, head_fwd_row<BFloat16>, head_fwd_row<Float16>},
    {head_bwd_row<Float32>, head_bwd_row<BFloat16>, head_bwd_row<Float16>},
    {select_row<Float32>, select_row<BFloat16>, select_row<Float16>},
    {sparse_columns<Float32>, sparse_columns<BFloat16>, sparse_columns<Float16>},
    {sparse_logits<Float32>, sparse_logits<BFloat16>, sparse_logits<Float16>},
};

}  // namespace alp
