// The C interface that Python calls: it chooses the build of rows.cpp for this CPU and runs threads over rows.
#include <string.h>

#include <vector>

#include "interface.h"

#ifdef ALP_X86
#include <cpuid.h>
#endif

using namespace alp;

namespace {

struct Isa {
    const char* name;
    const Rows* rows;
    bool supported;
};

constexpr int NUM_ISAS = 3;

#ifdef ALP_X86
bool has_f16c() {  // older compilers' __builtin_cpu_supports does not know it
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Isa* isas() {
#ifdef ALP_X86
    static const Isa all[NUM_ISAS] = {
        {"avx512", &rows_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl")},
        {"avx2", &rows_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()},
        {"portable", &rows_portable, true},
    };
#else
    static const Isa all[NUM_ISAS] = {
        {"avx512", nullptr, false}, {"avx2", nullptr, false}, {"portable", &rows_portable, true}};
#endif
    return all;
}

const Isa* chosen = nullptr;  // set once by alp_choose_isa, while Python imports the engine

// Below about 20 us of work, waking threads costs more than it saves.
bool is_short(int64_t num_rows, int64_t columns) { return num_rows * columns < 1 << 14; }

// Calls f(n) for every row. A row's bits do not depend on the thread that computes it.
template <class F>
void each_row(int64_t num_rows, int64_t columns, int32_t threads, F f) {
    if (threads == 1 || is_short(num_rows, columns)) {
        for (int64_t n = 0; n < num_rows; ++n) f(n);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < num_rows; ++n) f(n);
}

// Calls f(begin, end) on parts of rows 0 to num_rows. There are up to 8 parts per thread, so that the other threads take
// over the work of a slow one.
template <class F>
void each_part(int64_t num_rows, int64_t columns, int32_t threads, F f) {
    if (threads == 1 || is_short(num_rows, columns)) return f(0, num_rows);
    int64_t parts = 8 * static_cast<int64_t>(threads);
    if (parts > num_rows) parts = num_rows;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; ++part) f(num_rows * part / parts, num_rows * (part + 1) / parts);
}

double sum_in_order(const std::vector<double>& terms) {
    double sum = 0;
    for (double term : terms) sum += term;
    return sum;
}

// Sum of f(n) in row order, in float64.
template <class F>
float sum_rows(int64_t num_rows, int64_t columns, int32_t threads, F f) {
    std::vector<double> per_row(static_cast<size_t>(num_rows));
    each_row(num_rows, columns, threads, [&](int64_t n) { per_row[static_cast<size_t>(n)] = f(n); });
    return static_cast<float>(sum_in_order(per_row));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t alp_interface() { return INTERFACE; }

// Chooses the build called `name`, or this CPU's best if name is empty. Returns its name, or null if it cannot run.
const char* alp_choose_isa(const char* name) {
    for (int i = 0; i < NUM_ISAS; ++i) {
        const Isa& isa = isas()[i];
        if (isa.supported && (name[0] == '\0' || strcmp(name, isa.name) == 0)) {
            chosen = &isa;
            return isa.name;
        }
    }
    return nullptr;
}

void alp_philox(const int64_t* counter, int64_t* out, int64_t count, uint64_t key) {
    chosen->rows->philox(counter, out, count, key);
}

void alp_normals(const uint32_t* radius, const uint32_t* angle, float* cosine, float* sine, int64_t count) {
    chosen->rows->normals(radius, angle, cosine, sine, count);
}

void alp_words(const Stream* stream, int64_t* out, int64_t N, int64_t D, int32_t threads) {
    const int64_t Q = (D + 3) / 4;
    each_row(N, D, threads, [&](int64_t n) { chosen->rows->words(*stream, n, D, out + n * Q, N * Q); });
}

void alp_normal(const Stream* stream, float* eps, int64_t N, int64_t D, int32_t threads) {
    each_row(N, D, threads, [&](int64_t n) { chosen->rows->normal(*stream, n, eps + n * D, D); });
}

void alp_perturb_fwd(const Stream* stream, const PerturbFwd* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto rows = chosen->rows->perturb_fwd[dtype];
    each_part(N, args->D, threads, [&](int64_t begin, int64_t end) { rows(*stream, *args, begin, end); });
}

float alp_perturb_bwd(const Stream* stream, const PerturbBwd* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto rows = chosen->rows->perturb_bwd[dtype];
    std::vector<double> shares(static_cast<size_t>(N));
    each_part(N, args->D, threads, [&](int64_t begin, int64_t end) { rows(*stream, *args, shares.data(), begin, end); });
    return static_cast<float>(sum_in_order(shares));
}

void alp_measure(const Measure* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->measure[dtype];
    each_row(N, args->D, threads, [&](int64_t n) { row(*args, n); });
}

void alp_perturb_rms_norm_fwd(
    const Stream* stream, const PerturbRmsNormFwd* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto rows = chosen->rows->perturb_rms_norm_fwd[dtype];
    each_part(N, args->perturb.D, threads, [&](int64_t begin, int64_t end) { rows(*stream, *args, begin, end); });
}

void alp_perturb_rms_norm_bwd(
    const Stream* stream, const PerturbRmsNormBwd* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto rows = chosen->rows->perturb_rms_norm_bwd[dtype];
    const int64_t D = args->D;
    // dweight is summed over blocks of rows, whose size does not depend on threads
    const int64_t block = N <= 16 * 256 ? 16 : (N + 255) / 256, blocks = (N + block - 1) / block;
    std::vector<double> shares(static_cast<size_t>(args->dsigma ? N : 0));
    std::vector<float> sums(static_cast<size_t>(args->dweight ? blocks * D : 0));
    each_row(blocks, block * D, threads, [&](int64_t b) {
        const int64_t begin = b * block, end = begin + block < N ? begin + block : N;
        rows(*stream, *args, args->dsigma ? shares.data() : nullptr, args->dweight ? &sums[b * D] : nullptr, begin, end);
    });
    if (args->dsigma) *args->dsigma = static_cast<float>(sum_in_order(shares));
    if (args->dweight) {
        std::vector<double> total(static_cast<size_t>(D));
        for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t d = 0; d < D; ++d) total[d] += static_cast<double>(sums[b * D + d]);
        }
        for (int64_t d = 0; d < D; ++d) args->dweight[d] = static_cast<float>(total[d]);
    }
}

void alp_head_fwd(const Stream* stream, const Head* head, const HeadFwd* out, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->head_fwd[dtype];
    each_row(N, head->width, threads, [&](int64_t n) { row(*stream, *head, *out, n); });
}

// N: number of rows to compute.
float alp_head_bwd(
    const Stream* stream, const Head* head, const HeadBwd* rows, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->head_bwd[dtype];
    return sum_rows(N, head->width, threads, [&](int64_t m) { return row(*stream, *head, *rows, m); });
}

// head_fwd, then the choice of each row's tokens, while the row is in cache. The choice uses to->logp and to->lse, which may
// be `out`'s, or those of a vocabulary of which `head` is a part.
void alp_head_select(
    const Stream* stream, const Head* head, const HeadFwd* out, const Select* to, int64_t N, int32_t dtype,
    int32_t threads) {
    const auto forward = chosen->rows->head_fwd[dtype];
    const auto select = chosen->rows->select[dtype];
    each_row(N, head->width, threads, [&](int64_t n) {
        forward(*stream, *head, *out, n);
        select(*stream, *head, *to, n);
    });
}

// Copies the rows' entries one after the other.
void alp_pack(const Select* from, int32_t* tokens, float* p, int64_t N) {
    for (int64_t n = 0, at = 0; n < N; at += from->counts[n++]) {
        memcpy(tokens + at, from->tokens + n * from->room, static_cast<size_t>(from->counts[n]) * sizeof *tokens);
        memcpy(p + at, from->p + n * from->room, static_cast<size_t>(from->counts[n]) * sizeof *p);
    }
}

// Sorts a sparse matrix's entries by token, rows in order; drops zeros. starts (V + 1,), rows and values (m,).
void alp_by_token(
    const int64_t* counts, const int32_t* tokens, const float* from, int64_t N, int64_t V, int64_t* starts, int32_t* rows,
    float* values) {
    int64_t m = 0;
    for (int64_t n = 0; n < N; ++n) m += counts[n];
    for (int64_t v = 0; v <= V; ++v) starts[v] = 0;
    for (int64_t e = 0; e < m; ++e) starts[tokens[e]] += from[e] != 0;
    int64_t sum = 0;
    for (int64_t v = 0; v < V; ++v) {
        sum += starts[v];
        starts[v] = sum - starts[v];
    }
    starts[V] = sum;
    int64_t e = 0;
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t end = e + counts[n]; e < end; ++e) {
            if (from[e] == 0) continue;
            const int64_t to = starts[tokens[e]]++;
            rows[to] = static_cast<int32_t>(n);
            values[to] = from[e];
        }
    }
    for (int64_t v = V; v > 0; --v) starts[v] = starts[v - 1];  // each start has moved to its end, the next token's start
    starts[0] = 0;
}

void alp_sparse_products(const Sparse* args, int32_t dtype, int32_t threads) {
    const auto columns = chosen->rows->sparse_columns[dtype];
    constexpr int64_t LEAST = 64;  // channels a thread
    const int64_t parts = args->D / LEAST < threads ? args->D / LEAST : threads;
    each_row(parts > 1 ? parts : 1, args->V, threads, [&](int64_t part) {
        const auto edge = [&](int64_t k) { return k < parts ? args->D * k / parts / 32 * 32 : args->D; };
        columns(*args, part ? edge(part) : 0, parts > 1 ? edge(part + 1) : args->D);
    });
}

// Sorts the entries of rows, which lie row after row, by token, rows in order. rows, sorted and entries (m,).
void alp_entries_by_token(
    const int64_t* counts, const int32_t* tokens, int64_t N, int64_t V, int32_t* rows, int32_t* sorted, int64_t* entries) {
    std::vector<int64_t> starts(static_cast<size_t>(V + 1));
    int64_t m = 0;
    for (int64_t n = 0; n < N; ++n) m += counts[n];
    for (int64_t e = 0; e < m; ++e) ++starts[tokens[e] + 1];
    for (int64_t v = 0; v < V; ++v) starts[v + 1] += starts[v];
    int64_t e = 0;
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t end = e + counts[n]; e < end; ++e) {
            const int64_t to = starts[tokens[e]]++;
            rows[to] = static_cast<int32_t>(n);
            sorted[to] = tokens[e];
            entries[to] = e;
        }
    }
}

void alp_sparse_logits(const SparseLogits* args, int64_t m, int32_t dtype, int32_t threads) {
    const auto logits = chosen->rows->sparse_logits[dtype];
    each_part(m, args->D, threads, [&](int64_t begin, int64_t end) { logits(*args, begin, end); });
}

}  // extern "C"
#pragma GCC visibility pop
