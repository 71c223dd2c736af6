// Packs weights into panels, once at load.
#include "pack.h"

#include <cstring>

#include "threads.h"

namespace redraft {
namespace {

// The output at place i of panel p, or -1 if there is none.
int64_t output(const Linear& w, int64_t p, int64_t i) {
    if (!w.gated) return p * PANEL + i < w.outs ? p * PANEL + i : -1;
    const int64_t half = PANEL / 2, own = p * half + i % half;
    return own < w.outs / 2 ? own + (i < half ? 0 : w.outs / 2) : -1;
}

// Rows [outs, ins] with elements of `size` bytes -> steps of 4 bytes.
void interleave(const Linear& w, const uint8_t* from, int64_t size, uint8_t* to) {
    const int64_t steps = w.steps(), bytes = w.ins * size, panel = steps * PANEL * 4;
    run([&](int worker, int workers) {
        const Share own(w.count(), worker, workers);
        for (int64_t p = own.first; p < own.last; p++) {
            uint8_t* dst = to + p * panel;
            std::memset(dst, 0, panel);
            for (int64_t i = 0; i < PANEL; i++) {
                const int64_t out = output(w, p, i);
                if (out < 0) continue;
                const uint8_t* src = from + out * bytes;
                const int64_t whole = bytes / 4;
                for (int64_t s = 0; s < whole; s++) std::memcpy(dst + (s * PANEL + i) * 4, src + s * 4, 4);
                if (bytes % 4) std::memcpy(dst + (whole * PANEL + i) * 4, src + whole * 4, bytes % 4);
            }
        }
    });
}

float real(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest < 0x400) return (sign ? -0x1p-24f : 0x1p-24f) * float(rest);  // below the normal numbers
    const uint32_t bits = sign | (rest < 0x7c00 ? (rest << 13) + (112u << 23) : rest << 13 | 0x7f800000);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void write(uint8_t* to, float x, Kind kind) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (kind == F32) return void(std::memcpy(to, &bits, 4));
    const uint16_t half = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    std::memcpy(to, &half, 2);
}

// Output i of panel p with groups: code * scale, rounded, plus the low, rounded.
void decode(const Linear& w, int64_t p, int64_t i, Kind kind, uint8_t* to) {
    const auto of_group = [&](const uint16_t* halves, const int8_t* factors, int64_t g) {
        const float top = real(halves[(p * w.tops() + g / w.per) * PANEL + i]);
        return factors ? top * float(factors[(p * w.groups() + g) * PANEL + i]) : top;
    };
    for (int64_t g = 0; g < w.groups(); g++) {
        const float scale = of_group(w.scales, w.factors, g), low = w.lows ? of_group(w.lows, w.offsets, g) : 0;
        for (int64_t c = g * w.group; c < w.ins && c < (g + 1) * w.group; c++) {
            const int64_t step = c / 4;
            const uint8_t byte = w.panels[p * w.panel_bytes() + ((w.kind == I4 ? step / 2 : step) * PANEL + i) * 4 + c % 4];
            const int64_t code = w.kind == G8 ? int8_t(byte) : (step % 2 ? byte >> 4 : byte & 15) - w.offset();
            const float x = float(code) * scale;
            write(to + c * bytes_of(kind), w.lows ? x + low : x, kind);
        }
    }
}

}  // namespace

void pack_plain(const Linear& w, const void* from, void* to) {
    interleave(w, static_cast<const uint8_t*>(from), bytes_of(w.kind), static_cast<uint8_t*>(to));
}

void rows_of(const Linear& w, const int32_t* rows, int64_t count, Kind kind, void* to) {
    const int64_t bytes = w.ins * bytes_of(kind), whole = bytes / 4;
    for (int64_t r = 0; r < count; r++) {
        uint8_t* out = static_cast<uint8_t*>(to) + r * bytes;
        if (w.grouped()) {
            decode(w, rows[r] / PANEL, rows[r] % PANEL, kind, out);
            continue;
        }
        const uint8_t* from = w.panels + rows[r] / PANEL * w.panel_bytes() + rows[r] % PANEL * 4;
        for (int64_t s = 0; s < whole; s++) std::memcpy(out + s * 4, from + s * PANEL * 4, 4);
        if (bytes % 4) std::memcpy(out + whole * 4, from + whole * PANEL * 4, bytes % 4);
    }
}

void arrange(const Linear& w, const void* from, int64_t size, int64_t count, void* to) {
    std::memset(to, 0, size_t(w.count() * count * PANEL * size));
    for (int64_t p = 0; p < w.count(); p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t out = output(w, p, i);
            for (int64_t k = 0; out >= 0 && k < count; k++)
                std::memcpy(static_cast<uint8_t*>(to) + ((p * count + k) * PANEL + i) * size, static_cast<const uint8_t*>(from) + (out * count + k) * size, size_t(size));
        }
}

void pack_floats(const Linear& w, const float* from, float* to) { arrange(w, from, sizeof(float), 1, to); }

void pack_int8(const Linear& w, const int8_t* codes, void* to, int32_t* sums) {
    interleave(w, reinterpret_cast<const uint8_t*>(codes), 1, static_cast<uint8_t*>(to));
    for (int64_t p = 0; p < w.count(); p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t out = output(w, p, i);
            int32_t sum = 0;
            for (int64_t c = 0; out >= 0 && c < w.ins; c++) sum += codes[out * w.ins + c];
            sums[p * PANEL + i] = sum;
        }
}

void pack_groups(const Linear& w, const int8_t* codes, void* to) {
    if (w.kind == G8) return interleave(w, reinterpret_cast<const uint8_t*>(codes), 1, static_cast<uint8_t*>(to));
    const int64_t panel = w.panel_bytes(), offset = w.offset();
    run([&](int worker, int workers) {
        const Share own(w.count(), worker, workers);
        for (int64_t p = own.first; p < own.last; p++) {
            uint8_t* dst = static_cast<uint8_t*>(to) + p * panel;
            std::memset(dst, int(offset << 4 | offset), panel);
            for (int64_t i = 0; i < PANEL; i++) {
                const int64_t out = output(w, p, i);
                for (int64_t c = 0; out >= 0 && c < w.ins; c++) {
                    const int64_t step = c / 4;
                    uint8_t& byte = dst[(step / 2 * PANEL + i) * 4 + c % 4];
                    const uint8_t code = uint8_t(codes[out * w.ins + c] + offset);
                    byte = step % 2 ? uint8_t((byte & 0x0f) | code << 4) : uint8_t((byte & 0xf0) | code);
                }
            }
        }
    });
}

}  // namespace redraft
