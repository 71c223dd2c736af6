#include "peak.h"

#include <immintrin.h>

namespace redraft {
namespace {

constexpr int CHAINS = 16;  // independent sums; every loop over them is unrolled, or gcc 12 keeps them in memory

void dot_i8(int64_t rounds) {
    volatile int ones = 0x01010101;
    const __m512i factor = _mm512_set1_epi32(ones), other = _mm512_set1_epi32(ones);
    __m512i sums[CHAINS];
#pragma GCC unroll 16
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) asm("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(factor), "v"(other));  // gcc 12 copies the intrinsic's
    }
    volatile int seen;
#pragma GCC unroll 16
    for (auto sum : sums) seen = _mm512_cvtsi512_si32(sum);
    (void)seen;
}

}  // namespace

Peak peak_avx512_vnni(int kind) {
    if (kind == PEAK_I8) return {dot_i8, 2.0 * 64 * CHAINS, "vpdpbusd, 512 bits"};
    return peak_avx512(kind);
}

}  // namespace redraft
