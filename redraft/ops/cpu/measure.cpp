// Measures the peak of this machine: reads from memory and arithmetic. Also the workers, for C.
//
// No exception crosses the C interface; the returned number reports failures.
#include "isa.h"
#include "peak.h"
#include "threads.h"

#include <chrono>
#include <cstring>
#include <emmintrin.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace redraft {
namespace {

constexpr int64_t LINE = 64;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

__m128i sum_line(const uint8_t* p, __m128i sum) {
    const auto* line = reinterpret_cast<const __m128i*>(p);
    for (int i = 0; i < 4; i++) sum = _mm_add_epi64(sum, _mm_loadu_si128(line + i));
    return sum;
}

// Reads whole lines from STREAMS places at once and returns their sum, so the compiler drops no load.
template <int STREAMS>
uint64_t read_all(const uint8_t* p, int64_t bytes) {
    const int64_t stream = bytes / STREAMS / LINE * LINE;
    __m128i sums[STREAMS] = {};
    for (int64_t i = 0; i < stream; i += LINE)
        for (int s = 0; s < STREAMS; s++) sums[s] = sum_line(p + s * stream + i, sums[s]);
    for (int64_t i = stream * STREAMS; i + LINE <= bytes; i += LINE) sums[0] = sum_line(p + i, sums[0]);
    uint64_t total = 0;
    for (const auto& sum : sums) {
        uint64_t halves[2];
        std::memcpy(halves, &sum, sizeof halves);
        total += halves[0] + halves[1];
    }
    return total;
}

template <int STREAMS>
double read_once(const uint8_t* buffer, int64_t bytes) {
    const double begun = now();
    run([=](int worker, int workers) {
        const Share lines(bytes / LINE, worker, workers);
        volatile uint64_t sum = read_all<STREAMS>(buffer + lines.first * LINE, (lines.last - lines.first) * LINE);
        (void)sum;
    });
    return now() - begun;
}

// Which of both is faster depends on the prefetchers of the processor, by a factor of two and more.
double read_fastest(const uint8_t* buffer, int64_t bytes) {
    const double one = read_once<1>(buffer, bytes), four = read_once<4>(buffer, bytes);
    return one < four ? one : four;
}

Peak peak_of(int kind) {
    switch (chosen_isa()) {
#ifdef REDRAFT_HAS_AMX
        case Isa::AMX: return peak_amx(kind);
#endif
#ifdef REDRAFT_HAS_AVX512_BF16
        case Isa::AVX512_BF16: return peak_avx512_bf16(kind);
#endif
#ifdef REDRAFT_HAS_AVX512_VNNI
        case Isa::AVX512_VNNI: return peak_avx512_vnni(kind);
#endif
#ifdef REDRAFT_HAS_AVX512
        case Isa::AVX512: return peak_avx512(kind);
#endif
#ifdef REDRAFT_HAS_AVX2
        case Isa::AVX2: return peak_avx2(kind);
#endif
        default: return {nullptr, 0, ""};
    }
}

double peak_once(const Peak& peak, int64_t rounds) {
    const double begun = now();
    run([&](int, int) { peak.run(rounds); });
    return now() - begun;
}

// The best of many short runs: long compared with starting the workers, short compared with the time slices of other processes, so
// on a busy machine too some runs have all cores.
double measure_peak(const Peak& peak) {
    constexpr double SECONDS = 0.002;
    constexpr int RUNS = 80;
    int64_t rounds = 1 << 10;
    double took = peak_once(peak, rounds);
    while (took < SECONDS) {
        rounds *= 2;
        took = peak_once(peak, rounds);
    }
    for (int i = 0; i < RUNS; i++) {
        const double again = peak_once(peak, rounds);
        if (again < took) took = again;
    }
    return peak.operations * double(rounds) * threads() / took;
}

}  // namespace
}  // namespace redraft

using namespace redraft;

EXPORT const char* rd_isa_detected() { return name_of(detect()); }

EXPORT const char* rd_isa_compiled() {
    return ""
#ifdef REDRAFT_HAS_AVX2
        "avx2"
#endif
#ifdef REDRAFT_HAS_AVX512
        ",avx512"
#endif
#ifdef REDRAFT_HAS_AVX512_VNNI
        ",avx512_vnni"
#endif
#ifdef REDRAFT_HAS_AVX512_BF16
        ",avx512_bf16"
#endif
#ifdef REDRAFT_HAS_AMX
        ",amx"
#endif
        ;
}

EXPORT const char* rd_isa() { return name_of(chosen_isa()); }

EXPORT const char* rd_isa_refused() { return refused_isa(); }  // the reason why REDRAFT_ISA was refused, or null

// 0, or -1 if the threads cannot be started.
EXPORT int rd_set_threads(int count) {
    try {
        if (count < 1) return -1;
        set_threads(count);
        return 0;
    } catch (...) {
        return -1;
    }
}

EXPORT int rd_threads() {
    try {
        return threads();
    } catch (...) {
        return -1;
    }
}

// Writes to every page, each worker to the pages that it reads in rd_read_bandwidth. Pages are then near their reader, and none is the
// shared zero page of unwritten memory. 0, or -1.
EXPORT int rd_fill(void* buffer, int64_t bytes) {
    try {
        if (!buffer || bytes < 0) return -1;
        run([=](int worker, int workers) {
            const Share lines(bytes / LINE, worker, workers);
            std::memset(static_cast<uint8_t*>(buffer) + lines.first * LINE, 1, size_t(lines.last - lines.first) * LINE);
        });
        return 0;
    } catch (...) {
        return -1;
    }
}

// Bytes per second of the fastest pass over the buffer on all workers; `rounds` times, in two ways each; negative if it fails.
EXPORT double rd_read_bandwidth(const void* buffer, int64_t bytes, int rounds) {
    try {
        if (!buffer || bytes < LINE || rounds < 1) return -1;
        double best = 0;
        for (int i = 0; i < rounds; i++) {
            const double rate = double(bytes / LINE * LINE) / read_fastest(static_cast<const uint8_t*>(buffer), bytes);
            if (rate > best) best = rate;
        }
        return best;
    } catch (...) {
        return -1;
    }
}

// Operations per second of all workers; a multiplication and an addition count as two. kind: 0 float32, 1 bf16, 2 int8. 0 if the
// instruction set has no instruction for such numbers, negative if it cannot be measured.
EXPORT double rd_peak(int kind) {
    try {
        if (kind < PEAK_F32 || kind > PEAK_I8) return -1;
        const Peak peak = peak_of(kind);
        return peak.run ? measure_peak(peak) : 0;
    } catch (...) {
        return -1;
    }
}

EXPORT const char* rd_peak_instruction(int kind) { return kind < PEAK_F32 || kind > PEAK_I8 ? "" : peak_of(kind).instruction; }
