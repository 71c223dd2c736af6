// Stand-alone test of bf16_emulated.h: against a definition number by number, and, compiled with -mavx512bf16, against the processor.
//   g++ -std=c++17 -O1 -ffp-contract=off -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl bf16_test.cpp -o bf16_test
#include "bf16_emulated.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

using namespace redraft;

namespace {

int64_t passed = 0, failed = 0;
std::mt19937_64 engine(1);

float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
bool same(uint32_t a, uint32_t b) { return a == b || (std::isnan(as_float(a)) && std::isnan(as_float(b))); }
float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Any number: of all exponents, or near the smallest and largest ones, or near 1.
uint32_t number() {
    const uint32_t random = uint32_t(engine()), exponents[] = {0, 1, 2, 60, 63, 64, 65, 126, 127, 128, 253, 254, 255};
    switch (engine() % 4) {
        case 0: return random;
        case 1: return (random & 0x807fffff) | exponents[engine() % 13] << 23;
        case 2: return (random & 0x80000000) | exponents[engine() % 13] << 23;
        default: return (random & 0x80ffffff) | 0x3f000000;
    }
}

// Tiny results are those below the smallest normal number once they are rounded as if exponents had no end.
float product_added(float c, float a, float b) {
    a = flushed(a), b = flushed(b), c = flushed(c);
    const double exact = std::fma(double(a), double(b), double(c));
    const float sum = std::fma(a, b, c);
    return std::fabs(exact) < 0x1p-126 - 0x1p-151 ? std::copysign(0.0f, sum) : flushed(sum);
}

uint16_t rounded(float x) {
    if (std::isnan(x)) return uint16_t(bits_of(x) >> 16 | 0x40);
    x = flushed(x);
    const float low = as_float(bits_of(x) & 0xffff0000u);
    if (low == x) return uint16_t(bits_of(x) >> 16);
    const uint16_t down = uint16_t(bits_of(x) >> 16), up = uint16_t(down + 1);
    const double middle = std::fabs(double(low)) + std::ldexp(1.0, std::ilogb(low) - 8);
    if (std::fabs(double(x)) != middle) return std::fabs(double(x)) < middle ? down : up;
    return down % 2 ? up : down;
}

void check(bool good, const char* what) {
    (good ? passed : failed)++;
    if (!good && failed < 20) std::printf("FAILED: %s\n", what);
}

void round_once() {
    alignas(64) uint32_t a[16], b[16], c[16], sums[16];
    alignas(64) uint16_t halves[32];
    for (int i = 0; i < 16; i++) a[i] = number(), b[i] = number(), c[i] = number();
    if (engine() % 2)
        for (int i = 0; i < 16; i++) a[i] &= 0xbfffbfffu, b[i] &= 0xbfffbfffu;  // below 2: sums that are numbers
    const __m512 x = _mm512_load_ps(a), y = _mm512_load_ps(b), z = _mm512_load_ps(c);
    const auto pairs = [](__m512 v) { return (__m512bh)_mm512_castps_si512(v); };
    _mm512_store_ps(sums, emulated::dpbf16_ps(z, pairs(x), pairs(y)));
    _mm512_store_si512(halves, (__m512i)emulated::cvtne2ps_pbh(x, z));
    for (int i = 0; i < 16; i++) {
        const float second = product_added(as_float(c[i]), as_float(a[i] & 0xffff0000u), as_float(b[i] & 0xffff0000u));
        check(same(sums[i], bits_of(product_added(second, as_float(a[i] << 16), as_float(b[i] << 16)))), "sum of products");
        check(halves[i] == rounded(as_float(c[i])) && halves[i + 16] == rounded(as_float(a[i])), "rounding");
    }
#ifdef __AVX512BF16__
    alignas(64) uint32_t own[16];
    alignas(64) uint16_t own_halves[32];
    _mm512_store_ps(own, _mm512_dpbf16_ps(z, pairs(x), pairs(y)));
    _mm512_store_si512(own_halves, (__m512i)_mm512_cvtne2ps_pbh(x, z));
    check(!std::memcmp(own_halves, halves, sizeof halves), "rounding by the processor");
    for (int i = 0; i < 16; i++) check(same(own[i], sums[i]), "sum of products by the processor");
#endif
}

}  // namespace

int main() {
    for (int i = 0; i < 100000; i++) round_once();
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
    return failed ? 1 : 0;
}
