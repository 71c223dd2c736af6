#include "peak.h"

#include <immintrin.h>

namespace redraft {
namespace {

constexpr int CHAINS = 16;  // independent sums

void multiply_add_f32(int64_t rounds) {
    volatile float one = 1.0f;  // volatile, or the compiler would compute the sums itself
    const __m512 factor = _mm512_set1_ps(one), other = _mm512_set1_ps(one);
    __m512 sums[CHAINS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) sums[i] = _mm512_fmadd_ps(factor, other, sums[i]);
    }
    volatile float seen;
    for (auto sum : sums) seen = _mm512_cvtss_f32(sum);
    (void)seen;
}

}  // namespace

Peak peak_avx512(int kind) {
    if (kind == PEAK_F32) return {multiply_add_f32, 2.0 * 16 * CHAINS, "vfmadd231ps, 512 bits"};
    return {nullptr, 0, ""};
}

}  // namespace redraft
