// VDPBF16PS and VCVTNE2PS2BF16 in plain AVX-512, by the operation sections of Intel's manual, under the names of the intrinsics. Both
// ignore MXCSR: they round to nearest even, take denormal numbers as zero, and give zero instead of denormal results.
#pragma once
#include <cstdint>
#include <immintrin.h>

namespace redraft {
namespace emulated {

// Of every pair of numbers the product of the second ones is added to c first, then that of the first ones; each sum is rounded once.
inline __m512 dpbf16_ps(__m512 c, __m512bh x, __m512bh y) {
    const __m512i a = (__m512i)x, b = (__m512i)y, high = _mm512_set1_epi32(int(0xffff0000u));
    const __m512i a1 = _mm512_slli_epi32(a, 16), b1 = _mm512_slli_epi32(b, 16), a2 = _mm512_and_si512(a, high), b2 = _mm512_and_si512(b, high);
    const uint32_t before = _mm_getcsr(), flushing = 0x9fc0;  // exceptions masked, flush to zero, denormals are zero, nearest even
    __asm__ volatile("vldmxcsr %[flushing]\n\tvfmadd231ps %[b2], %[a2], %[c]\n\tvfmadd231ps %[b1], %[a1], %[c]\n\tvldmxcsr %[before]"
                     : [c] "+&v"(c)
                     : [a1] "v"(a1), [b1] "v"(b1), [a2] "v"(a2), [b2] "v"(b2), [flushing] "m"(flushing), [before] "m"(before));
    return c;
}

inline uint16_t to_bf16(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude < 0x00800000) return uint16_t(bits >> 16 & 0x8000);         // zero or denormal
    if (magnitude > 0x7f800000) return uint16_t(bits >> 16 | 0x0040);         // NaN, quiet
    if (magnitude == 0x7f800000) return uint16_t(bits >> 16);                 // infinity
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The numbers of `low`, then those of `high`.
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
    alignas(64) uint32_t from[32];
    alignas(64) uint16_t to[32];
    _mm512_store_ps(from, low);
    _mm512_store_ps(from + 16, high);
    for (int i = 0; i < 32; i++) to[i] = to_bf16(from[i]);
    return (__m512bh)_mm512_load_si512(to);
}

}  // namespace emulated
}  // namespace redraft

#ifdef REDRAFT_EMULATE_BF16
#define _mm512_dpbf16_ps redraft::emulated::dpbf16_ps
#define _mm512_cvtne2ps_pbh redraft::emulated::cvtne2ps_pbh
#endif
