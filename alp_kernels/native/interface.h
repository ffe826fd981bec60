// The functions that each of the three builds of rows.cpp gives native.cpp, and the structures that Python fills.
// Plain C types only: builds of rows.cpp use instructions that this CPU may lack, and the linker keeps one copy of each
// inline library function, perhaps the AVX-512 one.
#pragma once

#include <stdint.h>

namespace alp {

// Increase it with every change to a structure or signature below; library.py refuses a library with another number.
constexpr int32_t INTERFACE = 8;

constexpr uint32_t ROUNDING_BIT = 0x8000;  // set in the layer for the bits of stochastic rounding

// Noise coordinates, explained in stream.py. Row n is row_ids[n], or row_start + n without row_ids.
struct Stream {
    uint64_t seed;
    int64_t row_start;
    const int64_t* row_ids;  // (N,) or null
    uint32_t step;
    uint32_t layer;
};

struct PerturbFwd {  // u = h + sigma * rms * eps
    const void* h;   // (N, D)
    void* u;         // (N, D)
    const float* sigma;
    float* rms;  // (N,) or null: 1
    int64_t D;
    int32_t stochastic;  // round with random bits of the same stream with ROUNDING_BIT set in layer
};

struct PerturbBwd {  // dsigma = sum(du * rms * eps)
    const void* du;  // (N, D)
    const float* rms;  // (N,) or null: 1
    int64_t D;
};

struct Measure {  // how the noise changed h
    const void* h;  // (N, D)
    const void* u;  // (N, D)
    float* sums;    // (N, 3): (u - h)^2, elements that differ, h^2
    int64_t D;
};

struct PerturbRmsNormFwd {  // y = u * rstd * scale, rstd = 1 / sqrt(mean_d u^2 + eps)
    PerturbFwd perturb;
    void* y;             // (N, D)
    float* rstd;         // (N,)
    const float* scale;  // (D,)
    float eps;
};

struct PerturbRmsNormBwd {  // dh = du + rstd (g - x mean_d(g x)), g = dy scale, x = u rstd
    const void* du;      // (N, D)
    const void* dy;      // (N, D)
    const void* u;       // (N, D)
    const float* rstd;   // (N,)
    const float* rms;    // (N,) or null: 1
    const float* scale;  // (D,)
    void* dh;            // (N, D)
    float* dsigma;       // () or null
    float* dweight;      // (D,) or null: sum_n dy x
    int64_t D;
};

struct Head {  // z = (cap(scale x) + sigma eps) / temperature
    void* x;  // (n, width): tokens start .. start + width - 1 of each row
    const int64_t* targets;
    const float* temperature;  // (n,) or null: 1
    const float* sigma;        // () or null: no noise; with noise a row is always whole
    int64_t V;
    int64_t start;
    int64_t width;
    float logit_scale;
    float softcap;  // 0: none
};

constexpr int CARRY = 5;  // numbers that a row passes from one tile of logits to the next

struct HeadFwd {  // (n,), written with the row's last tile
    float* logp;
    float* entropy;
    float* lse;
    double* carry;  // (n, CARRY), null if rows are whole
    float* base;    // (n,) or null; if given, x becomes e^(z - base), and 0 at the target. Not with noise
    float* sums;    // (n, pieces) or null: sum of e^(z - bases) of 128 tokens, infinite if it lacks one. Whole rows, no noise
    float* bases;   // (n, pieces)
    int64_t pieces;
};

struct HeadBwd {
    const float* logp;  // (n,), like the next four
    const float* entropy;
    const float* lse;
    const float* dlogp;
    const float* dentropy;  // or null
    const int64_t* rows;    // (m,) rows to compute; null: all n
    void* dx;               // (m, width), may be Head::x if rows is null
};

struct Select {  // chooses the tokens of rows of logits whose targets are columns
    const float* logp;  // (n,), like lse
    const float* lse;
    const float* sums;   // as HeadFwd writes them, like the next
    const float* bases;
    int32_t* tokens;  // (n, room)
    float* p;         // (n, room)
    int64_t* counts;  // (n,); above room if a row needed more
    int64_t room;
    int64_t pieces;
    int64_t first;  // number of a row's first interval
    int32_t bits;   // the threshold is 2^-bits
};

struct Sparse {             // dh = dx W, dW = dx' h; dx (N, V) has its entries sorted by token, then row
    const int64_t* starts;  // (V + 1,)
    const int32_t* rows;    // (m,)
    const float* values;    // (m,)
    const void* hidden;     // (N, D)
    const void* weight;     // (V, D)
    float* dhidden;         // (N, D) of zeros, or null
    void* dweight;          // (V, D) of zeros, or null; float32 for float16
    int64_t N;
    int64_t V;
    int64_t D;
};

struct SparseLogits {        // x_e = h_row . w_token; entries of a token lie one after the other
    const int32_t* rows;     // (m,)
    const int32_t* tokens;   // (m,)
    const int64_t* entries;  // (m,) where each logit goes in x; null: in order
    const void* hidden;      // (N, D)
    const void* weight;      // (V, D)
    float* x;                // (m,)
    int64_t D;
};

// One build; its arrays are indexed by dtype: 0 float32, 1 bfloat16, 2 float16. A function computes one row, or rows begin
// to end (philox and normals: a list). Only native.cpp deals with threads and dispatch.
struct Rows {
    void (*philox)(const int64_t* counter, int64_t* out, int64_t count, uint64_t key);  // both (4, count)
    void (*normals)(const uint32_t* radius, const uint32_t* angle, float* cosine, float* sine, int64_t count);
    void (*words)(const Stream&, int64_t n, int64_t D, int64_t* out, int64_t stride);  // word j of group q: out[j stride + q]
    void (*normal)(const Stream&, int64_t n, float* eps, int64_t D);
    void (*perturb_fwd[3])(const Stream&, const PerturbFwd&, int64_t begin, int64_t end);
    void (*perturb_bwd[3])(const Stream&, const PerturbBwd&, double* shares, int64_t begin, int64_t end);
    void (*measure[3])(const Measure&, int64_t n);
    void (*perturb_rms_norm_fwd[3])(const Stream&, const PerturbRmsNormFwd&, int64_t begin, int64_t end);
    void (*perturb_rms_norm_bwd[3])(
        const Stream&, const PerturbRmsNormBwd&, double* shares, float* dweight, int64_t begin, int64_t end);
    void (*head_fwd[3])(const Stream&, const Head&, const HeadFwd&, int64_t n);
    double (*head_bwd[3])(const Stream&, const Head&, const HeadBwd&, int64_t m);  // the row's share of dsigma
    void (*select[3])(const Stream&, const Head&, const Select&, int64_t n);
    void (*sparse_columns[3])(const Sparse&, int64_t d_begin, int64_t d_end);
    void (*sparse_logits[3])(const SparseLogits&, int64_t begin, int64_t end);
};

extern const Rows rows_portable;
#ifdef ALP_X86
extern const Rows rows_avx2;
extern const Rows rows_avx512;
#endif

}  // namespace alp
