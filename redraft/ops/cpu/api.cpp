// The C interface of redraft/ops/native.py. Structures are those of kernels.h and layers.h. The result is 0 for success, else a
// Failure.
#include <cmath>
#include <new>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "isa.h"
#include "kernels.h"
#include "layers.h"
#include "pack.h"
#include "threads.h"

#define BORDER extern "C" __attribute__((visibility("default")))

using namespace redraft;

namespace {

const Kernels* kernels_of(Isa isa) {
    switch (isa) {
#ifdef REDRAFT_HAS_AMX
        case Isa::AMX: return amx_kernels();
#endif
#ifdef REDRAFT_HAS_AVX512_BF16
        case Isa::AVX512_BF16: return avx512_bf16_kernels();
#endif
#ifdef REDRAFT_HAS_AVX512_VNNI
        case Isa::AVX512_VNNI: return avx512_vnni_kernels();
#endif
#ifdef REDRAFT_HAS_AVX512
        case Isa::AVX512: return avx512_kernels();
#endif
#ifdef REDRAFT_HAS_AVX2
        case Isa::AVX2: return avx2_kernels();
#endif
        default: return nullptr;
    }
}

const Kernels& kernels() {
    static const Kernels* chosen = kernels_of(chosen_isa());
    return *chosen;
}

enum Failure { NO_MEMORY = 1, NOT_POSSIBLE = 2 };

// One call at a time, because buffers belong to the process and Python runs other threads meanwhile.
template <class Work>
int guarded(Work work) {
    try {
        const Alone alone;
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {
        return NOT_POSSIBLE;
    }
}

NormJob norm_of(const Rows& x, const void* weight, const void* bias, float eps, int rms, int gains) {
    return {x, Rows{}, static_cast<const uint8_t*>(weight), static_cast<const uint8_t*>(bias), eps, rms, x.kind, Kind(gains)};
}

}  // namespace

// The sizes of what crosses this interface, in the order of SIZES_OF in abi.py. A library of other sources has other sizes.
BORDER const char* rd_sizes() {
    static const std::string sizes = [] {
        std::string found;
        for (size_t size : {sizeof(Rows), sizeof(Linear), sizeof(LowRank), sizeof(Adapters), sizeof(Pool), sizeof(Heads), sizeof(Experts),
                            sizeof(Layer), sizeof(Step), sizeof(Rotaries), sizeof(Model), sizeof(Seq), sizeof(Watched), sizeof(Picked)})
            found += (found.empty() ? "" : " ") + std::to_string(size);
        return found;
    }();
    return sizes.c_str();
}

BORDER const char* rd_kernels() { return kernels_of(chosen_isa()) ? kernels().name : ""; }

// Requests pages of 2 MiB before the memory is first written. Without them everything works too, but more slowly.
BORDER void rd_huge(void* memory, int64_t bytes) {
#ifdef __linux__
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

BORDER int64_t rd_panel_bytes(const Linear* w) { return w->count() * w->panel_bytes(); }
BORDER int rd_pack(const Linear* w, const void* from, void* to) {
    return guarded([&] { pack_plain(*w, from, to); });
}
BORDER void rd_rows(const Linear* w, const int32_t* rows, int64_t count, int kind, void* to) {
    rows_of(*w, rows, count, Kind(kind), to);
}
BORDER int rd_pack_floats(const Linear* w, const float* from, float* to) {
    return guarded([&] { pack_floats(*w, from, to); });
}
BORDER int rd_pack_int8(const Linear* w, const int8_t* codes, void* to, int32_t* sums) {
    return guarded([&] { pack_int8(*w, codes, to, sums); });
}
BORDER int rd_pack_groups(const Linear* w, const int8_t* codes, void* to) {
    return guarded([&] { pack_groups(*w, codes, to); });
}
BORDER int rd_arrange(const Linear* w, const void* from, int64_t size, int64_t count, void* to) {
    return guarded([&] { arrange(*w, from, size, count, to); });
}

BORDER int rd_linear(const Linear* w, const Rows* x, const Rows* y, int activation, int add) {
    return guarded([&] { run_linear(kernels(), *w, *x, *y, Activation(activation), add != 0); });
}
BORDER int rd_head(const Rows* h, const void* weight, const void* bias, float eps, int rms, int gains, const Linear* w, const int32_t* wanted, int64_t count, int keep, int32_t* best, int32_t* argmax) {
    return guarded([&] { run_head(kernels(), norm_of(*h, weight, bias, eps, rms, gains), *w, wanted, count, keep, best, argmax); });
}
BORDER int rd_norm(const Rows* x, const Rows* y, const void* weight, const void* bias, float eps, int rms, int gains) {
    return guarded([&] {
        NormJob job = norm_of(*x, weight, bias, eps, rms, gains);
        job.y = *y;
        run([&](int worker, int workers) {
            const Share own(x->rows, worker, workers);
            kernels().norm(job, own.first, own.last);
        });
    });
}
BORDER int rd_low_rank(const Rows* x, const Rows* y, const LowRank* term, const int64_t* rows, int64_t count) {
    return guarded([&] {
        run([&](int worker, int workers) {
            const Share own(count, worker, workers);
            for (int64_t i = own.first; i < own.last; i++) kernels().low_rank(*x, *y, *term, rows[i]);
        });
    });
}
BORDER int rd_activate(const Rows* x, const Rows* y, int activation, int gated) {
    return guarded([&] {
        run([&](int worker, int workers) {
            const Share own(x->rows, worker, workers);
            kernels().activate(*x, *y, Activation(activation), gated, own.first, own.last);
        });
    });
}
BORDER int rd_cap(const Rows* x, const Rows* y, float limit) {
    return guarded([&] {
        run([&](int worker, int workers) {
            const Share own(x->rows, worker, workers);
            kernels().cap(*x, *y, limit, own.first, own.last);
        });
    });
}
BORDER int rd_route(const Rows* x, int keep, int renormalise, int rounded, Best* chosen) {
    return guarded([&] { kernels().route({*x, chosen, keep, renormalise, Kind(rounded)}, 0, x->rows); });
}
BORDER int rd_experts(const Experts* experts, const Rows* x, const Rows* y) {
    return guarded([&] { run_experts(kernels(), *experts, *x, *y); });
}
BORDER int rd_rope(const Rows* x, int64_t heads, int64_t size, const float* cos, const float* sin) {
    return guarded([&] {
        run([&](int worker, int workers) {
            const Share own(x->rows, worker, workers);
            kernels().rope(*x, heads, size, cos, sin, own.first, own.last);
        });
    });
}

BORDER int64_t rd_contenders(uint64_t key, const int64_t* ids, const double* values, int64_t count, int64_t* places) {
    return kernels().contenders(key, ids, values, count, places);
}

BORDER int rd_turns(const Rotaries* rotaries, const int32_t* positions, int64_t rows, float* turns) {
    return guarded([&] { find_turns(*rotaries, positions, rows, turns); });
}

// The attention plan of a step; freed by rd_plan_free.
BORDER void* rd_plan(const Step* step, int heads) {
    void* made = nullptr;
    guarded([&] {
        AttendChoices choices;
        choices.workers = threads();
        auto* plan = new AttendPlan(plan_attention(step->seqs, step->count, step->pool, heads, choices));
        plan->ends = step->watches ? step->rows : 0;
        made = plan;
    });
    return made;
}
BORDER void rd_plan_free(void* plan) { delete static_cast<AttendPlan*>(plan); }

// Writes k and v of the sequences of the step, then attends: q [T, heads * size] -> their rows of out. picked: an entry for every
// sequence, or null.
BORDER int rd_attend(const Step* step, int layer, const Heads* heads, const Picked* picked, const Rows* q, const Rows* k, const Rows* v,
                     const Rows* out) {
    return guarded([&] {
        AttendJob job = attend_job(*step, layer, *heads, *q, *out);
        job.picked = picked;
        const AttendPlan& chosen = *step->plan;
        attention().prepare(*kernels().attend, chosen, heads->count, threads());
        run([&](int worker, int workers) {
            write_keys(*kernels().attend, *step, layer, *k, *v, worker, workers);
            barrier();
            attend(*kernels().attend, job, chosen, attention(), worker, workers);
        });
    });
}
// out [heads][rows][count] = a [heads][rows][size] times b [heads][count][size]; no element depends on the others.
BORDER int rd_products(const float* a, const float* b, int64_t heads, int64_t rows, int64_t count, int64_t size, float* out) {
    return guarded([&] {
        std::vector<float> scratch(size_t(threads() * size * PAGE));
        run([&](int worker, int workers) {
            const Share own(heads, worker, workers);
            for (int64_t i = own.first; i < own.last; i++)
                kernels().products(a + i * rows * size, b + i * count * size, rows, count, size, out + i * rows * count, scratch.data() + worker * size * PAGE);
        });
    });
}
BORDER int rd_run(const Layer* layers, int64_t first, int64_t last, const Step* steps, int64_t count, const Adapters* adapters, const Rows* h) {
    return guarded([&] { run_layers(kernels(), layers, first, last, steps, count, adapters, *h); });
}
BORDER int rd_pass(const Model* model, const int32_t* batch, const Adapters* adapters, int keep, int32_t* best, float* logits, const uint8_t* start, uint8_t* states) {
    return guarded([&] { run_step(kernels(), *model, batch, adapters, keep, best, logits, {start, states}); });
}
