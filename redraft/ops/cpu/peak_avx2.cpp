#include "peak.h"

#include <immintrin.h>

namespace redraft {
namespace {

constexpr int CHAINS = 12;  // independent sums; with the two factors they fit in the 16 registers

void multiply_add_f32(int64_t rounds) {
    volatile float one = 1.0f;  // volatile, or the compiler would compute the sums itself
    const __m256 factor = _mm256_set1_ps(one), other = _mm256_set1_ps(one);
    __m256 sums[CHAINS];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm256_fmadd_ps(factor, other, sums[i]);
    }
    volatile float seen;
    for (auto sum : sums) seen = _mm256_cvtss_f32(sum);
    (void)seen;
}

}  // namespace

Peak peak_avx2(int kind) {
    if (kind == PEAK_F32) return {multiply_add_f32, 2.0 * 8 * CHAINS, "vfmadd231ps, 256 bits"};
    return {nullptr, 0, ""};
}

}  // namespace redraft
