// Tile instructions in plain C++, by the operation sections of Intel's manual (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBF16PS,
// TDPBSSD and its kin): palette 1, eight tiles. Where a processor would stop the program, a fault is counted and nothing is done.
#pragma once
#include <cstdint>
#include <cstring>

namespace redraft {
namespace emulated {

constexpr int TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64;

// Mistakes that a unit could make, so that a test can show that it would notice.
enum Plant {
    NOTHING,
    STORES_DROPPED,  // the configuration is read as zeros
    SHORT_TILES,     // sums and rows of activations have a row less than they should
    SHORT_ROWS,      // rows of activations only
    SPLIT_SUMS,      // products of fewer than 16 rows in two halves of their columns
    LATE_LOADS,      // a tile is loaded from what lay there before: the row in front
    STALE_SUMS,      // tiles are not set to zero
};

struct Machine {
    uint8_t rows[TILES];
    uint16_t line[TILES];
    bool configured;
    uint8_t data[TILES][MOST_ROWS][MOST_BYTES];
    const char* fault;  // the first one
    int64_t faults, configurations, products;
    Plant plant;
};
inline thread_local Machine machine{};

inline bool fails(bool wrong, const char* what) {
    if (wrong && !machine.faults++) machine.fault = what;
    return wrong;
}

inline void release() {
    machine.configured = false;
    std::memset(machine.rows, 0, sizeof machine.rows);
    std::memset(machine.line, 0, sizeof machine.line);
    std::memset(machine.data, 0, sizeof machine.data);
}

inline void configure(const void* from) {
    uint8_t bytes[64];
    std::memcpy(bytes, from, sizeof bytes);
    if (machine.plant == STORES_DROPPED) std::memset(bytes, 0, sizeof bytes);
    machine.configurations++;
    if (bytes[0] == 0) return release();
    if (fails(bytes[0] != 1, "LDTILECFG: palette")) return;
    for (int i = 2; i < 64; i++)
        if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && fails(bytes[i] != 0, "LDTILECFG: reserved bytes")) return;
    uint16_t line[TILES];
    std::memcpy(line, bytes + 16, sizeof line);
    for (int t = 0; t < TILES; t++) {
        const int rows = bytes[48 + t];
        if (fails(rows > MOST_ROWS || line[t] > MOST_BYTES || (rows == 0) != (line[t] == 0), "LDTILECFG: shape")) return;
    }
    release();
    machine.configured = true;
    for (int t = 0; t < TILES; t++) {
        const bool shorter = (machine.plant == SHORT_TILES && t < 6) || (machine.plant == SHORT_ROWS && (t == 4 || t == 5));
        machine.rows[t] = uint8_t(bytes[48 + t] - (shorter && bytes[48 + t] > 1));
        machine.line[t] = line[t];
    }
}

inline bool unusable(int t) {
    return fails(!machine.configured, "tiles are not configured") || fails(!machine.rows[t], "a tile that has no rows") ||
           fails(machine.line[t] % 4 != 0, "a row that is no multiple of 4 bytes");
}

inline void zero(int t) {
    if (!unusable(t) && machine.plant != STALE_SUMS) std::memset(machine.data[t], 0, sizeof machine.data[t]);
}

inline void load(int t, const void* from, int64_t stride) {
    if (unusable(t)) return;
    const uint8_t* p = static_cast<const uint8_t*>(from);
    std::memset(machine.data[t], 0, sizeof machine.data[t]);
    for (int r = 0; r < machine.rows[t]; r++) {
        const int early = machine.plant == LATE_LOADS && t < 4 && r ? r - 1 : r;
        std::memcpy(machine.data[t][r], p + early * stride, machine.line[t]);
    }
}

inline void store(int t, void* to, int64_t stride) {
    if (unusable(t)) return;
    uint8_t* p = static_cast<uint8_t*>(to);
    for (int r = 0; r < machine.rows[t]; r++) std::memcpy(p + r * stride, machine.data[t][r], machine.line[t]);
}

// Whether sums c, factors a [rows][steps of 4 bytes] and b [steps][outputs of 4 bytes] do not go together.
inline bool mismatched(int c, int a, int b) {
    machine.products++;
    return fails(c == a || c == b || a == b, "the same tile twice") || unusable(c) || unusable(a) || unusable(b) ||
           fails(machine.rows[c] != machine.rows[a], "rows of sums and factors differ") ||
           fails(machine.line[c] != machine.line[b], "columns of sums and factors differ") ||
           fails(machine.line[a] / 4 != machine.rows[b], "steps of both factors differ");
}

inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

inline float half(const uint8_t* p, int i) {
    uint16_t bits;
    std::memcpy(&bits, p + 2 * i, 2);
    const uint32_t whole = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &whole, 4);
    return flushed(x);
}

// Steps first..last of a product: the first numbers of pairs and the second ones are summed apart, from zero, then together, and then
// added to c. Every step rounds to nearest even; denormal numbers count as zero, before and behind it.
inline void add_halves(int c, int a, int b, int first, int last) {
    const int outputs = machine.line[c] / 4;
    for (int m = 0; m < machine.rows[c]; m++) {
        float even[16] = {}, odd[16] = {}, sums[16];
        for (int k = first; k < last; k++) {
            const float x = half(machine.data[a][m], 2 * k), y = half(machine.data[a][m], 2 * k + 1);
            for (int n = 0; n < outputs; n++) {
                even[n] = flushed(__builtin_fmaf(x, half(machine.data[b][k], 2 * n), even[n]));
                odd[n] = flushed(__builtin_fmaf(y, half(machine.data[b][k], 2 * n + 1), odd[n]));
            }
        }
        std::memcpy(sums, machine.data[c][m], sizeof sums);
        for (int n = 0; n < outputs; n++) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
        std::memcpy(machine.data[c][m], sums, machine.line[c]);
    }
}

inline void dot_bf16(int c, int a, int b) {
    if (mismatched(c, a, b)) return;
    const int steps = machine.rows[b];
    if (machine.plant == SPLIT_SUMS && machine.rows[a] < MOST_ROWS) {
        add_halves(c, a, b, 0, steps / 2);
        add_halves(c, a, b, steps / 2, steps);
    } else {
        add_halves(c, a, b, 0, steps);
    }
}

inline int32_t byte_of(uint8_t x, bool is_signed) { return is_signed ? int8_t(x) : x; }

// TDPBSSD, TDPBSUD, TDPBUSD, TDPBUUD. Sums wrap around.
inline void dot_bytes(int c, int a, int b, bool a_signed, bool b_signed) {
    if (mismatched(c, a, b)) return;
    for (int m = 0; m < machine.rows[c]; m++)
        for (int n = 0; n < machine.line[c] / 4; n++) {
            uint32_t sum;
            std::memcpy(&sum, machine.data[c][m] + 4 * n, 4);
            for (int k = 0; k < machine.rows[b]; k++)
                for (int i = 0; i < 4; i++)
                    sum += uint32_t(byte_of(machine.data[a][m][4 * k + i], a_signed) * byte_of(machine.data[b][k][4 * n + i], b_signed));
            std::memcpy(machine.data[c][m] + 4 * n, &sum, 4);
        }
}

}  // namespace emulated
}  // namespace redraft
