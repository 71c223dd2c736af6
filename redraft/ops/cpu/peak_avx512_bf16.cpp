#include "peak.h"

#include <immintrin.h>

namespace redraft {
namespace {

constexpr int CHAINS = 16;  // independent sums; every loop over them is unrolled, or gcc 12 keeps them in memory

void dot_bf16(int64_t rounds) {
    volatile int ones = 0x3f803f80;  // two bf16 ones; volatile, or the compiler would compute the sums itself
    const __m512i bits = _mm512_set1_epi32(ones);
    __m512 sums[CHAINS];
#pragma GCC unroll 16
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 16
        for (int i = 0; i < CHAINS; i++) asm("vdpbf16ps %1, %1, %0" : "+v"(sums[i]) : "v"(bits));  // gcc 12 copies the intrinsic's
    }
    volatile float seen;
#pragma GCC unroll 16
    for (auto sum : sums) seen = _mm512_cvtss_f32(sum);
    (void)seen;
}

}  // namespace

Peak peak_avx512_bf16(int kind) {
    if (kind == PEAK_BF16) return {dot_bf16, 2.0 * 32 * CHAINS, "vdpbf16ps, 512 bits"};
    return peak_avx512_vnni(kind);
}

}  // namespace redraft
