#include "peak.h"

#include <immintrin.h>

namespace redraft {
namespace {

constexpr int ROWS = 16, LINE = 64;

// The size of each of the eight tiles: 16 rows of 64 bytes.
struct alignas(64) Layout {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t line[16] = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE};
    uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
};
static_assert(sizeof(Layout) == 64);

// In assembly: the intrinsic of the compiler does not declare that it reads the layout, so stores to it may be dropped.
void configure(const Layout& layout) { __asm__ volatile("ldtilecfg %0" ::"m"(layout)); }

// Sums in tiles 0 to 3, factors of rows in 4 and 5, factors of columns in 6 and 7.
void prepare(uint32_t ones) {
    configure(Layout());
    alignas(64) uint32_t factors[ROWS * LINE / 4];
    for (auto& factor : factors) factor = ones;
    __asm__ volatile("" ::"m"(factors));  // the loads below must read the stored values
    _tile_loadd(4, factors, LINE);
    _tile_loadd(5, factors, LINE);
    _tile_loadd(6, factors, LINE);
    _tile_loadd(7, factors, LINE);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

void dot_bf16(int64_t rounds) {
    prepare(0x3f803f80);
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
}

void dot_i8(int64_t rounds) {
    prepare(0x01010101);
    for (int64_t round = 0; round < rounds; round++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
}

}  // namespace

Peak peak_amx(int kind) {
    if (kind == PEAK_BF16) return {dot_bf16, 4 * 2.0 * 16 * 16 * 32, "tdpbf16ps, 16 x 64 bytes"};
    if (kind == PEAK_I8) return {dot_i8, 4 * 2.0 * 16 * 16 * 64, "tdpbusd, 16 x 64 bytes"};
    return peak_avx512(kind);
}

}  // namespace redraft
