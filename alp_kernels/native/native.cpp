// The C interface that engine.py calls: which build of the rows serves this CPU, and threads over rows.
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
bool has_f16c() {  // which older compilers' __builtin_cpu_supports does not know
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

// f(n) for every row; which thread does a row never matters to its bits.
template <class F>
void each_row(int64_t num_rows, int64_t columns, int32_t threads, F f) {
    if (num_rows * columns < 1 << 14) threads = 1;  // below about 20 us of work, waking threads costs more
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < num_rows; ++n) f(n);
}

// Sum of f(n) in row order, in float64.
template <class F>
float sum_rows(int64_t num_rows, int64_t columns, int32_t threads, F f) {
    std::vector<double> per_row(static_cast<size_t>(num_rows));
    each_row(num_rows, columns, threads, [&](int64_t n) { per_row[static_cast<size_t>(n)] = f(n); });
    double sum = 0;
    for (double value : per_row) sum += value;
    return static_cast<float>(sum);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t alp_interface() { return INTERFACE; }

// Chooses the build called `name`, or this CPU's best where name is empty. Returns its name, null where it cannot run.
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
    const auto row = chosen->rows->perturb_fwd[dtype];
    each_row(N, args->D, threads, [&](int64_t n) { row(*stream, *args, n); });
}

float alp_perturb_bwd(const Stream* stream, const PerturbBwd* args, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->perturb_bwd[dtype];
    return sum_rows(N, args->D, threads, [&](int64_t n) { return row(*stream, *args, n); });
}

void alp_head_fwd(const Stream* stream, const Head* head, const HeadFwd* out, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->head_fwd[dtype];
    each_row(N, head->V, threads, [&](int64_t n) { row(*stream, *head, *out, n); });
}

float alp_head_bwd(
    const Stream* stream, const Head* head, const HeadBwd* rows, int64_t N, int32_t dtype, int32_t threads) {
    const auto row = chosen->rows->head_bwd[dtype];
    return sum_rows(N, head->V, threads, [&](int64_t n) { return row(*stream, *head, *rows, n); });
}

}  // extern "C"
#pragma GCC visibility pop
