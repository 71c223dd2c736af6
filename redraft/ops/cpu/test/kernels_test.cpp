// Stand-alone test of all kernels but attention, and of mixtures of experts. No library, one instruction set, reported by the flags:
//   g++ -std=c++17 -O1 -ffp-contract=off -mavx2 -mfma -mf16c kernels_test.cpp ../pack.cpp ../layers.cpp ../mlp.cpp ../attend.cpp ../threads.cpp -pthread
//   (or -mavx512f -mavx512bw -mavx512dq -mavx512vl too, or -mavx512bf16 -mavx512vnni too; with -fsanitize=address,undefined or thread)
// kernels_test [seed [rounds]]: results against definitions in double, those of codes bit for bit; every row alone and every panel
// alone gives the same bits; nothing beside what is to be written changes. Buffers are as long as their contents, to the byte.
#include "../kernels.h"
#include "../layers.h"
#include "../pack.h"
#include "../threads.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <immintrin.h>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#define DOT_BF16
#endif
#if defined(__AVX512VNNI__)
#define DOT_INT8
#endif

namespace redraft {
namespace {
#if defined(__AVX512F__)
#include "../vec_avx512.h"
#else
#include "../vec_avx2.h"
#endif
#include "../vec_math.h"

#include "../linear_impl.h"
#include "../rows_impl.h"
const Kernels kernels{"tested", takes, pieces, linear, norm, copy, quantize, activate, cap, low_rank, route, rope, contenders, nullptr};
}  // namespace
}  // namespace redraft

using namespace redraft;
using std::vector;

namespace {

int passed = 0, failed = 0;

void check(bool good, const std::string& what) {
    (good ? passed : failed)++;
    if (!good && failed <= 20) std::printf("FAILED: %s\n", what.c_str());
}

struct Random {
    std::mt19937_64 engine;
    int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(double p) { return double(engine() >> 11) * 0x1p-53 < p; }
    float normal() { return std::normal_distribution<float>()(engine); }
    template <class T> T of(std::initializer_list<T> list) { return list.begin()[below(int64_t(list.size()))]; }
};
Random dice;

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr uint8_t UNTOUCHED = 0xa5;

float get(const uint8_t* p, Kind kind) {
    float x;
    if (kind == F32) {
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t bits = uint32_t(half) << 16;
    std::memcpy(&x, &bits, 4);
    return x;
}
// To nearest, ties to even; numbers only.
float nearest(float x, Kind kind) {
    if (kind == F32) return x;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&x, &bits, 4);
    return x;
}
void put_number(uint8_t* p, Kind kind, float x) {
    x = nearest(x, kind);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t half = uint16_t(bits >> 16);
    if (kind == F32) std::memcpy(p, &x, 4);
    else std::memcpy(p, &half, 2);
}
// What one rounding to `kind` may change, and the float32 arithmetic before it.
double slack(Kind kind) { return kind == F32 ? 0x1p-22 : 0x1p-8; }

// Rows with memory of their own: strided ones have bytes between them, which nobody may write.
struct Matrix {
    Rows rows;
    vector<uint8_t> memory;

    Matrix(int64_t count, int64_t cols, Kind kind, bool tiles, int64_t gap = 0) : rows{nullptr, count, cols, 0, kind} {
        if (!tiles) rows.stride = cols * bytes_of(kind) + gap * bytes_of(kind);
        memory.assign(tiles ? rows.size() : (count - 1) * rows.stride + cols * bytes_of(kind), UNTOUCHED);
        memory.shrink_to_fit();
        rows.data = memory.data();
    }
    Matrix(const Matrix& other) : rows(other.rows), memory(other.memory) { rows.data = memory.data(); }

    float at(int64_t r, int64_t c) const { return get(rows.at(r, c), rows.kind); }
    void fill(Kind of, float size = 1.0f) {
        for (int64_t r = 0; r < rows.rows; r++)
            for (int64_t c = 0; c < rows.cols; c++) put_number(rows.at(r, c), rows.kind, nearest(size * dice.normal(), of));
        if (!rows.stride) blank();
    }
    void fade(int64_t group) {  // groups of columns of different sizes, some of zeros
        for (int64_t r = 0; r < rows.rows; r++)
            for (int64_t first = 0; first < rows.cols; first += group) {
                const float by = dice.chance(0.1) ? 0 : std::exp2(-float(dice.below(7)));
                for (int64_t c = first; c < std::min(rows.cols, first + group); c++) put_number(rows.at(r, c), rows.kind, at(r, c) * by);
            }
    }
    void blank() {  // the filling of tiles
        const int64_t end = rows.lines() * LINE / bytes_of(rows.kind);
        for (int64_t r = 0; r < rows.rows; r++)
            for (int64_t c = rows.cols; c < end; c++) std::memset(rows.at(r, c), 0, bytes_of(rows.kind));
    }
    bool filled(int64_t first = 0) const {
        const int64_t size = bytes_of(rows.kind), end = rows.lines() * LINE / size;
        for (int64_t r = first; !rows.stride && r < rows.rows; r++)
            for (int64_t c = rows.cols; c < end; c++)
                for (int64_t b = 0; b < size; b++)
                    if (rows.at(r, c)[b]) return false;
        return true;
    }
    bool gaps_untouched() const {
        for (int64_t r = 0; rows.stride && r + 1 < rows.rows; r++)
            for (int64_t b = rows.cols * bytes_of(rows.kind); b < rows.stride; b++)
                if (rows.data[r * rows.stride + b] != UNTOUCHED) return false;
        return true;
    }
    bool same_row(int64_t r, const Matrix& other, int64_t r2) const {
        for (int64_t c = 0; c < rows.cols; c++)
            if (std::memcmp(rows.at(r, c), other.rows.at(r2, c), bytes_of(rows.kind))) return false;
        return true;
    }
};

std::string shape(const char* name, int64_t rows, int64_t outs, int64_t ins, Kind kind) {
    return std::string(name) + " rows " + std::to_string(rows) + " outs " + std::to_string(outs) + " ins " + std::to_string(ins) + " kind " +
           std::to_string(kind);
}

double activated_exactly(double x, Activation activation) {
    switch (activation) {
        case SILU: return x / (1 + std::exp(-x));
        case GELU: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case GELU_TANH: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case RELU: return x > 0 ? x : 0;
        case SIGMOID: return 1 / (1 + std::exp(-x));
        case QUICK_GELU: return x / (1 + std::exp(-1.702 * x));
        default: return x;
    }
}

// ---- weights

// A linear layer packed, and the numbers that it was packed from.
struct Weights {
    Linear c{};
    vector<float> weight;   // [outs][ins], codes too
    vector<float> bias, scale;
    vector<uint16_t> scales, lows;      // [outs][tops]
    vector<int8_t> factors, offsets;    // [outs][groups]
    vector<uint8_t> panels;
    vector<float> packed_bias, packed_scale;
    vector<int32_t> sums;
    vector<uint16_t> packed_scales, packed_lows;
    vector<int8_t> packed_factors, packed_offsets;
    vector<int32_t> columns;
    vector<float> side;     // [outliers][outs]
    vector<float> packed_side;

    Weights(int64_t outs, int64_t ins, Kind kind, bool gated, bool biased, int32_t group, int64_t outliers = 0) {
        c.outs = outs, c.ins = ins, c.kind = kind, c.gated = gated, c.group = group, c.per = 1;
        weight.resize(outs * ins);
        panels.resize(c.count() * c.panel_bytes());
        panels.shrink_to_fit();
        if (kind == F32 || kind == BF16) numbers();
        else beside(outliers), codes();
        if (biased) {
            for (int64_t o = 0; o < outs; o++) bias.push_back(dice.normal());
            packed_bias.assign(c.count() * PANEL, NOT_A_NUMBER);
            pack_floats(c, bias.data(), packed_bias.data());
            c.bias = packed_bias.data();
        }
        c.panels = panels.data();
    }
    Weights(const Weights&) = delete;

    void numbers() {
        vector<uint8_t> from(weight.size() * bytes_of(c.kind));
        for (size_t i = 0; i < weight.size(); i++) {
            weight[i] = nearest(dice.normal(), c.kind);
            put_number(from.data() + i * bytes_of(c.kind), c.kind, weight[i]);
        }
        pack_plain(c, from.data(), panels.data());
    }
    // Some columns that have no codes, side by side here and there.
    void beside(int64_t outliers) {
        const int64_t start = dice.below(c.ins), apart = dice.between(1, 3);
        for (int64_t i = start; i < c.ins && int64_t(columns.size()) < outliers; i += apart) columns.push_back(int32_t(i));
        for (size_t i = 0; i < columns.size() * c.outs; i++) side.push_back(dice.normal());
        packed_side.assign(columns.size() * c.count() * PANEL, NOT_A_NUMBER);
        for (size_t i = 0; i < columns.size(); i++)
            for (int64_t p = 0; p < c.count(); p++)
                for (int64_t at = 0; at < PANEL; at++)
                    packed_side[(p * columns.size() + i) * PANEL + at] = output(p, at) < 0 ? 0 : side[i * c.outs + output(p, at)];
        c.outliers = int32_t(columns.size()), c.columns = columns.data(), c.side = packed_side.data();
    }
    // Numbers of groups in the order of the panels.
    template <class T>
    const T* arranged(const vector<T>& from, int64_t count, vector<T>& to) {
        to.assign(c.count() * count * PANEL, T(0x7e));
        arrange(c, from.data(), sizeof(T), count, to.data());
        return to.data();
    }
    void groups() {
        const bool with_lows = dice.chance(0.5), with_factors = dice.chance(0.5);
        if (with_factors) c.per = int32_t(dice.between(1, 5));
        const auto halves = [&](vector<uint16_t>& to) {
            for (int64_t i = 0; i < c.outs * c.tops(); i++) to.push_back(_cvtss_sh(0.1f * dice.normal(), 0));
        };
        const auto bytes = [&](vector<int8_t>& to) {
            for (int64_t i = 0; i < c.outs * c.groups(); i++) to.push_back(int8_t(dice.between(-32, 63)));
        };
        halves(scales);
        c.scales = arranged(scales, c.tops(), packed_scales);
        if (with_factors) bytes(factors), c.factors = arranged(factors, c.groups(), packed_factors);
        if (!with_lows) return;
        halves(lows);
        c.lows = arranged(lows, c.tops(), packed_lows);
        if (with_factors) bytes(offsets), c.offsets = arranged(offsets, c.groups(), packed_offsets);
    }
    float of_group(const vector<uint16_t>& halves, const vector<int8_t>& bytes, int64_t out, int64_t g) const {
        return _cvtsh_ss(halves[out * c.tops() + g / c.per]) * (bytes.empty() ? 1.0f : float(bytes[out * c.groups() + g]));
    }
    void codes() {
        if (c.grouped()) groups();
        const bool wide = c.kind != I4;
        const int64_t low = wide ? -127 : -c.offset(), high = wide ? 127 : 15 - c.offset();
        vector<int8_t> from(weight.size());
        for (size_t i = 0; i < from.size(); i++) weight[i] = from[i] = int8_t(dice.chance(0.2) ? dice.of({low, high}) : dice.between(low, high));
        for (const int32_t column : columns)
            for (int64_t o = 0; o < c.outs; o++) weight[o * c.ins + column] = from[o * c.ins + column] = 0;
        if (c.grouped()) return pack_groups(c, from.data(), panels.data());
        for (int64_t o = 0; o < c.outs; o++) scale.push_back(0.1f * std::fabs(dice.normal()));
        packed_scale.assign(c.count() * PANEL, NOT_A_NUMBER);
        sums.assign(c.count() * PANEL, -1);
        pack_int8(c, from.data(), panels.data(), sums.data());
        pack_floats(c, scale.data(), packed_scale.data());
        c.sums = sums.data();
        c.scale = packed_scale.data();
    }
    // The output at place i of panel p, or -1, as kernels.h says.
    int64_t output(int64_t p, int64_t i) const {
        if (!c.gated) return p * 64 + i < c.outs ? p * 64 + i : -1;
        const int64_t own = p * 32 + i % 32;
        return own < c.outs / 2 ? own + (i < 32 ? 0 : c.outs / 2) : -1;
    }
    // What lies for column c of place i in panel p.
    float unpacked(int64_t p, int64_t i, int64_t column) const {
        const uint8_t* panel = panels.data() + p * c.panel_bytes();
        if (c.kind == F32) return get(panel + (column * 64 + i) * 4, F32);
        if (c.kind == BF16) return get(panel + (column / 2 * 64 + i) * 4 + column % 2 * 2, BF16);
        if (c.kind == I8 || c.kind == G8) return int8_t(panel[(column / 4 * 64 + i) * 4 + column % 4]);
        const uint8_t both = panel[(column / 8 * 64 + i) * 4 + column % 4];
        return float(int(column / 4 % 2 ? both >> 4 : both & 15) - int(c.offset()));
    }
};

void test_pack(const Weights& w) {
    bool numbers = true, others = true;
    const int64_t columns = w.c.steps() * (w.c.kind == F32 ? 1 : w.c.kind == BF16 ? 2 : 4);
    for (int64_t p = 0; p < w.c.count(); p++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t out = w.output(p, i);
            int32_t sum = 0;
            for (int64_t c = 0; c < columns; c++) {
                const float expected = out >= 0 && c < w.c.ins ? w.weight[out * w.c.ins + c] : 0;
                numbers &= w.unpacked(p, i, c) == expected;
                sum += int32_t(expected);
            }
            if (w.c.bias) others &= w.c.bias[p * PANEL + i] == (out < 0 ? 0 : w.bias[out]);
            if (w.c.kind == I8) others &= w.c.sums[p * PANEL + i] == sum && w.c.scale[p * PANEL + i] == (out < 0 ? 0 : w.scale[out]);
            for (int64_t g = 0; g < w.c.tops() && w.c.grouped(); g++) {
                others &= w.c.scales[(p * w.c.tops() + g) * PANEL + i] == (out < 0 ? 0 : w.scales[out * w.c.tops() + g]);
                if (w.c.lows) others &= w.c.lows[(p * w.c.tops() + g) * PANEL + i] == (out < 0 ? 0 : w.lows[out * w.c.tops() + g]);
            }
            for (int64_t g = 0; g < w.c.groups(); g++) {
                if (w.c.factors) others &= w.c.factors[(p * w.c.groups() + g) * PANEL + i] == (out < 0 ? 0 : w.factors[out * w.c.groups() + g]);
                if (w.c.offsets) others &= w.c.offsets[(p * w.c.groups() + g) * PANEL + i] == (out < 0 ? 0 : w.offsets[out * w.c.groups() + g]);
            }
        }
    check(numbers, shape("packed weights", 0, w.c.outs, w.c.ins, w.c.kind));
    check(others, shape("packed scales and biases", 0, w.c.outs, w.c.ins, w.c.kind));
}

// ---- linear

// The input of a layer in the form that it takes.
struct Feed {
    Matrix tiles;
    vector<float> scale, factors, outliers;
    vector<int32_t> sums;

    Feed(const Weights& w, const Matrix& x)
        : tiles(x.rows.rows, w.c.steps() * (w.c.kind == F32 ? 1 : w.c.kind == BF16 ? 2 : 4), kernels.takes(w.c.kind), true) {
        if (tiles.rows.kind != I8) {
            copy(x.rows, tiles.rows, 0, x.rows.rows);
            return;
        }
        scale.resize(x.rows.rows);
        sums.resize(x.rows.rows * w.c.groups()), factors.resize(x.rows.rows * w.c.groups());
        outliers.resize(x.rows.rows * w.c.outliers);
        quantize(x.rows, w.c, tiles.rows, coded(), 0, x.rows.rows);
    }
    Coded coded() { return {scale.data(), factors.data(), sums.data(), outliers.data()}; }
    LinearJob job(const Weights& w, const Rows& y, Kind rounded, Activation activation, bool add) {
        LinearJob made{};
        made.w = w.c, made.x = tiles.rows, made.codes = coded();
        made.y = y, made.rounded = rounded, made.activation = activation, made.add = add;
        return made;
    }
};

struct Sum {
    double value, size;  // size: what roundings are relative to
};

// The largest of 1, 2, 4, 8, 16 whose product with `own` is not above `most`.
float power(float own, float most) {
    float found = 1;
    while (found < 16 && own * found * 2 <= most) found *= 2;
    return found;
}

// Steps 1 to 5 of ops/quantized.py for one output, before it is rounded to the kind of x.
float of_codes(const Weights& w, const Matrix& x, int64_t r, int64_t out) {
    float most = 0;
    bool finite = true;
    const auto beside = [&](int64_t c) { return std::find(w.columns.begin(), w.columns.end(), c) != w.columns.end(); };
    for (int64_t c = 0; c < x.rows.cols; c++) {
        if (beside(c)) continue;
        most = std::fmax(most, std::fabs(x.at(r, c)));
        finite &= std::isfinite(x.at(r, c));
    }
    if (!finite) return NOT_A_NUMBER;
    const float s = most / 127.0f, inverse = std::isfinite(127.0f / most) ? 127.0f / most : 0.0f;
    const auto code = [&](int64_t c, float by) { return beside(c) ? 0 : int32_t(std::nearbyint(x.at(r, c) * by * inverse)); };
    const float* own = w.weight.data() + out * w.c.ins;
    float y;
    if (w.c.kind == I8) {
        int32_t sum = 0;
        for (int64_t c = 0; c < w.c.ins; c++) sum += code(c, 1) * int32_t(own[c]);
        y = float(sum) * (s * w.scale[out]);
    } else {
        float total = 0;
        for (int64_t g = 0; g < w.c.groups(); g++) {
            int32_t sum = 0, codes = 0;
            float here = 0;
            const int64_t end = std::min(w.c.ins, (g + 1) * w.c.group);
            for (int64_t c = g * w.c.group; c < end; c++) here = beside(c) ? here : std::fmax(here, std::fabs(x.at(r, c)));
            const float by = power(here, most);
            for (int64_t c = g * w.c.group; c < end; c++) sum += code(c, by) * int32_t(own[c]), codes += code(c, by);
            total = std::fmaf(float(sum) / by, w.of_group(w.scales, w.factors, out, g), total);
            if (w.c.lows) total = std::fmaf(float(codes) / by, w.of_group(w.lows, w.offsets, out, g), total);
        }
        y = total * s;
    }
    for (size_t i = 0; i < w.columns.size(); i++) {
        const float product = x.at(r, w.columns[i]) * w.side[i * w.c.outs + out];
        y = y + product;
    }
    return w.bias.empty() ? y : y + w.bias[out];
}

Sum dot(const Weights& w, const Matrix& x, int64_t r, int64_t out) {
    if (w.c.kind == I8 || w.c.grouped()) return {of_codes(w, x, r, out), 0};
    Sum sum{};
    for (int64_t c = 0; c < w.c.ins; c++) {
        const double term = double(x.at(r, c)) * double(w.weight[out * w.c.ins + c]);
        sum.value += term;
        sum.size += std::fabs(term);
    }
    if (!w.bias.empty()) sum.value += w.bias[out], sum.size += std::fabs(w.bias[out]);
    return sum;
}

bool close(double found, double expected, double allowed) {
    if (std::isnan(expected)) return std::isnan(found);
    if (found == expected) return true;  // infinite too
    return std::fabs(found - expected) <= allowed;
}

// Norm, layer and order in one call as one after another; sums are not rounded; rows in any order, some of them twice.
void test_head(const Weights& w, const Matrix& x, const std::string& what) {
    const int64_t rows = x.rows.rows, ins = x.rows.cols, outs = w.c.outs, count = dice.between(1, rows + 2), keep = std::min<int64_t>(outs, dice.between(1, 9));
    const Kind kind = x.rows.kind;
    Matrix gain(1, ins, kind, false), shift(1, ins, kind, false), normed(rows, ins, kind, false), chosen(count, ins, kind, false), y(count, outs, F32, false);
    gain.fill(kind), shift.fill(kind);
    NormJob job{x.rows, normed.rows, gain.rows.data, dice.chance(0.5) ? shift.rows.data : nullptr, 1e-5f, dice.chance(0.5), kind, kind};
    norm(job, 0, rows);
    vector<int32_t> wanted(count), best(count * keep), argmax(count);
    for (int64_t r = 0; r < count; r++) {
        wanted[r] = int32_t(dice.below(rows));
        std::memcpy(chosen.rows.at(r, 0), normed.rows.at(wanted[r], 0), size_t(ins * bytes_of(kind)));
    }
    run_linear(kernels, w.c, chosen.rows, y.rows, NONE, false);
    job.y = Rows{};
    run_head(kernels, job, w.c, wanted.data(), count, int32_t(keep), best.data(), argmax.data());
    bool right = true;
    for (int64_t r = 0; r < count; r++) {
        vector<int64_t> order(outs);
        for (int64_t c = 0; c < outs; c++) order[c] = c;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {  // no number before all numbers
            const float left = y.at(r, a), right_one = y.at(r, b);
            return left > right_one || (left != left && right_one == right_one);
        });
        for (int64_t k = 0; k < keep; k++) right &= best[r * keep + k] == order[k];
        right &= argmax[r] == (y.at(r, order[0]) < INFINITY ? order[0] : -1);
    }
    check(right, what);
}

void test_linear(int64_t rows, int64_t outs, int64_t ins, Kind kind, Kind numbers) {
    const bool gated = dice.chance(0.4), biased = dice.chance(0.5), tiles = dice.chance(0.4);
    if (gated) outs *= 2;
    const Activation activation = dice.of({NONE, NONE, SILU, GELU, GELU_TANH, RELU});
    const bool fused = gated && activation != NONE, add = !tiles && activation == NONE && !gated && dice.chance(0.5);
    const int32_t group = kind == I4 || kind == G8 ? int32_t(dice.of({16, 32, 48, 64, 128})) : 0;
    const Weights w(outs, ins, kind, gated, biased, group, kind >= I8 && dice.chance(0.5) ? dice.between(1, 20) : 0);
    test_pack(w);
    Matrix x(rows, ins, numbers, false, dice.below(3));
    x.fill(numbers, dice.of({0.01f, 1.0f, 30.0f}));
    if (w.c.grouped()) x.fade(w.c.group);
    const int64_t odd = kind >= I8 && rows > 4 ? 4 : 0;  // rows of zeros, of tiny numbers and of none
    if (odd) {
        for (int64_t c = 0; c < ins; c++) put_number(x.rows.at(0, c), numbers, 0), put_number(x.rows.at(1, c), numbers, 1e-40f);
        put_number(x.rows.at(2, dice.below(ins)), numbers, dice.of({INFINITY, -INFINITY}));
        uint8_t* one = x.rows.at(3, dice.below(ins));
        std::memset(one, 0xff, size_t(bytes_of(numbers)));  // a NaN
    }
    Feed feed(w, x);
    const bool tile_output = tiles && !(gated && !fused);  // halves lie in rows
    const Kind y_kind = tile_output && dice.chance(0.5) ? F32 : numbers;
    Matrix before(rows, fused ? outs / 2 : outs, y_kind, tile_output, dice.below(3));
    if (add) before.fill(y_kind);
    Matrix y(before);
    vector<float> scratch(rows * PANEL);
    linear(feed.job(w, y.rows, numbers, activation, add), 0, pieces(w.c), scratch.data());

    const std::string what = shape("linear", rows, outs, ins, kind) + " of " + std::to_string(numbers) + " activation " + std::to_string(activation) +
                             (gated ? " gated" : "") + (biased ? " biased" : "") + (add ? " added" : "") + (tile_output ? " tiles" : "");
    const bool codes = kind >= I8, exact = codes && activation == NONE;
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < y.rows.cols; c++) {
            const Sum gate = dot(w, x, r, c);
            double expected = gate.value, allowed = gate.size * 0x1p-21 + std::fabs(expected) * slack(numbers);
            if (exact) {
                float value = nearest(float(gate.value), numbers);
                if (add) value = nearest(before.at(r, c) + value, y_kind);
                expected = value, allowed = 0;
            } else if (add) {
                expected += before.at(r, c), allowed += std::fabs(expected) * slack(y_kind);
            } else if (activation != NONE && !gated) {
                expected = activated_exactly(expected, activation), allowed = 1.2 * allowed + (1 + std::fabs(gate.value)) * slack(numbers);
            } else if (fused) {
                const Sum up = dot(w, x, r, c + outs / 2);
                const double a = activated_exactly(gate.value, activation), b = up.value;
                const double of_a = 1.2 * allowed + (1 + std::fabs(gate.value)) * slack(numbers), of_b = up.size * 0x1p-21 + std::fabs(b) * slack(numbers);
                expected = a * b, allowed = of_a * (std::fabs(b) + of_b) + of_b * std::fabs(a) + std::fabs(a * b) * slack(numbers);
            }
            if (!std::isfinite(gate.value) && activation != NONE) continue;  // what becomes of it is not defined
            good &= close(y.at(r, c), expected, allowed + 1e-30);
        }
    check(good, what);
    check(y.filled(odd), what + ": filling");
    check(y.gaps_untouched(), what + ": wrote between rows");

    // the same bits for a row alone, and from panels and halves one by one in any order
    Matrix again(before);
    for (int64_t i = pieces(w.c) - 1; i >= 0; i--) linear(feed.job(w, again.rows, numbers, activation, add), i, i + 1, scratch.data());
    check(again.memory == y.memory, what + ": piece by piece");
    const int64_t r = dice.below(rows);
    Matrix one(1, ins, numbers, false), its(1, y.rows.cols, y_kind, tile_output);
    std::memcpy(one.memory.data(), x.rows.at(r, 0), one.memory.size());
    if (add) std::memcpy(its.memory.data(), before.rows.at(r, 0), its.memory.size());
    Feed alone(w, one);
    vector<float> small(PANEL);
    linear(alone.job(w, its.rows, numbers, activation, add), 0, pieces(w.c), small.data());
    check(its.same_row(0, y, r), what + ": row alone");

    if (gated || add || activation != NONE || tiles) return;
    for (int workers : {1, 3}) {  // the same through the pool of threads, and the largest outputs
        set_threads(workers);
        Matrix shared(before);
        run_linear(kernels, w.c, x.rows, shared.rows, NONE, false);
        check(shared.memory == y.memory, what + ": " + std::to_string(workers) + " threads");
        test_head(w, x, what + ": head, " + std::to_string(workers) + " threads");
    }
}

// Equal outputs in one panel, in several and in parts of several workers: the lowest wins; so does the first that is no number.
void test_ties() {
    const int64_t outs = 300, ins = 40;
    Weights w(outs, ins, F32, false, true, 0);
    for (const int64_t at : {int64_t(17), int64_t(18), int64_t(63), int64_t(64), int64_t(170), int64_t(299)}) {
        vector<float> bias(outs, 0.0f), packed(w.c.count() * PANEL);
        for (const int64_t equal : {at, int64_t(299), std::min(at + 1, outs - 1)}) bias[equal] = 1e30f;
        pack_floats(w.c, bias.data(), packed.data());
        w.c.bias = packed.data();
        Matrix x(3, ins, F32, false);
        Matrix gain(1, ins, F32, false);
        x.fill(F32), gain.fill(F32);
        const NormJob norm{x.rows, Rows{}, gain.rows.data, nullptr, 1e-5f, 1, F32};
        const vector<int32_t> wanted{2, 0, 1};
        for (int workers : {1, 2, 3}) {
            set_threads(workers);
            vector<int32_t> best(3), argmax(3);
            run_head(kernels, norm, w.c, wanted.data(), 3, 1, best.data(), argmax.data());
            for (int32_t one : best) check(one == at, "ties go to the lowest");
            vector<float> holed = packed;
            holed[at] = NOT_A_NUMBER, holed[299] = NOT_A_NUMBER;
            w.c.bias = holed.data();
            run_head(kernels, norm, w.c, wanted.data(), 3, 1, best.data(), argmax.data());
            for (int32_t one : best) check(one == at, "the first that is no number");
            for (int32_t one : argmax) check(one == -1, "rows that hold no number have no likeliest");
            vector<float> low(holed.size(), -INFINITY);
            w.c.bias = low.data();
            run_head(kernels, norm, w.c, wanted.data(), 3, 1, best.data(), argmax.data());
            for (int32_t one : best) check(one == 0, "all of them minus infinity");
            w.c.bias = packed.data();
        }
    }
}

// ---- rows

void test_norm(int64_t rows, int64_t cols, Kind kind, bool rms, bool tiles) {
    const bool biased = !rms || dice.chance(0.3);
    const Kind y_kind = tiles && dice.chance(0.5) ? F32 : kind;
    const Kind gains = dice.chance(0.3) ? F32 : kind;
    Matrix x(rows, cols, kind, dice.chance(0.3), dice.below(3)), weight(1, cols, gains, false), bias(1, cols, kind, false);
    x.fill(kind, 3.0f), weight.fill(gains), bias.fill(kind);
    for (int64_t c = 0; c < cols; c++) put_number(x.rows.at(0, c), kind, x.at(0, c) + 50.0f);  // a row far from zero
    const float eps = dice.of({1e-5f, 1e-6f});
    Matrix y(rows, cols, y_kind, tiles, dice.below(3)), again(y);
    const NormJob job{x.rows, y.rows, weight.rows.data, biased ? bias.rows.data : nullptr, eps, rms, kind, gains};
    norm(job, 0, rows);
    const std::string what = shape(rms ? "rms norm" : "layer norm", rows, cols, 0, kind) + (tiles ? " tiles" : "");
    bool good = true;
    for (int64_t r = 0; r < rows; r++) {
        double mean = 0, squares = 0, largest = 0;
        for (int64_t c = 0; c < cols && !rms; c++) mean += x.at(r, c) / double(cols);
        for (int64_t c = 0; c < cols; c++) squares += (x.at(r, c) - mean) * (x.at(r, c) - mean), largest = std::fmax(largest, std::fabs(x.at(r, c)));
        const double scale = 1 / std::sqrt(squares / double(cols) + eps);
        for (int64_t c = 0; c < cols; c++) {
            const double term = (x.at(r, c) - mean) * scale * weight.at(0, c), expected = term + (biased ? bias.at(0, c) : 0.0);
            const double allowed = std::fabs(expected) * slack(kind) + (std::fabs(term) + largest * scale * std::fabs(weight.at(0, c))) * 0x1p-20;
            good &= close(y.at(r, c), expected, allowed + 1e-7);
        }
    }
    check(good, what);
    check(y.filled(), what + ": filling");
    check(y.gaps_untouched(), what + ": wrote between rows");
    for (int64_t r = rows - 1; r >= 0; r--) norm({x.rows, again.rows, job.weight, job.bias, eps, rms, kind, gains}, r, r + 1);
    check(again.memory == y.memory, what + ": row by row");

    // added to rows, with a factor: the same numbers, rounded three times
    Matrix to(rows, cols, y_kind, false), normed(rows, cols, y_kind, false);
    to.fill(kind);
    const Matrix before(to);
    const float factor = dice.of({1.0f, 0.3f});
    norm({x.rows, normed.rows, job.weight, job.bias, eps, rms, kind, gains}, 0, rows);
    norm({x.rows, to.rows, job.weight, job.bias, eps, rms, kind, gains, factor, 1}, 0, rows);
    good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const float term = factor == 1 ? normed.at(r, c) : nearest(normed.at(r, c) * factor, kind);
            good &= to.at(r, c) == nearest(before.at(r, c) + term, kind);
        }
    check(good, what + ": added");
}

void test_copy(int64_t rows, int64_t cols) {
    const Kind from = dice.of({F32, BF16}), to = from == BF16 ? dice.of({F32, BF16}) : F32;
    Matrix x(rows, cols, from, dice.chance(0.5), dice.below(3)), y(rows, cols, to, dice.chance(0.7), dice.below(3));
    x.fill(from);
    const int64_t cut = dice.below(rows + 1);
    copy(x.rows, y.rows, cut, rows);
    copy(x.rows, y.rows, 0, cut);
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) good &= x.at(r, c) == y.at(r, c);
    check(good && y.filled() && y.gaps_untouched(), shape("copy", rows, cols, to, from));
}

// To nearest, ties to even, and what is no number stays none.
void test_rounding() {
    Matrix x(1, 4096, F32, false), y(1, 4096, BF16, false);
    for (int64_t c = 0; c < x.rows.cols; c++) {
        const uint32_t ties = uint32_t(dice.engine()) & 0xffff0000u, half = dice.chance(0.5) ? 0x8000u : uint32_t(dice.below(0x10000));
        uint32_t bits = ties | half;
        if ((bits & 0x7f800000u) == 0x7f800000u) bits &= 0xbfffffffu;
        std::memcpy(x.rows.at(0, c), &bits, 4);
    }
    put_number(x.rows.at(0, 5), F32, NOT_A_NUMBER), put_number(x.rows.at(0, 6), F32, INFINITY), put_number(x.rows.at(0, 7), F32, 3.4e38f);
    copy(x.rows, y.rows, 0, 1);
    bool good = std::isnan(y.at(0, 5)) && y.at(0, 6) == INFINITY && y.at(0, 7) == INFINITY;
    for (int64_t c = 8; c < x.rows.cols; c++) good &= y.at(0, c) == nearest(x.at(0, c), BF16);
    check(good, "rounding to bfloat16");
}

void test_quantize(int64_t rows, int64_t cols, Kind kind) {
    const int32_t group = int32_t(dice.of({16, 32, 64, 128}));
    const int64_t groups = (cols + group - 1) / group, end = (cols + LINE - 1) / LINE * LINE;
    Matrix x(rows, cols, kind, dice.chance(0.3), dice.below(3)), codes(rows, end, I8, true);
    x.fill(kind, dice.of({1e-3f, 1.0f, 1e4f}));
    x.fade(group);
    Linear w{};
    vector<int32_t> columns;
    for (int64_t c = 0; c < cols; c++)
        if (dice.chance(0.1)) columns.push_back(int32_t(c));
    w.kind = dice.of({I8, I4, G8});
    const int32_t shift = w.kind == I8 ? SHIFT : 0;
    const uint16_t some = 0;
    w.lows = w.kind != I8 && dice.chance(0.5) ? &some : nullptr;
    w.ins = cols, w.group = group, w.outliers = int32_t(columns.size()), w.columns = columns.data();
    vector<float> scale(rows, NOT_A_NUMBER), factors(rows * groups, NOT_A_NUMBER), outliers(rows * w.outliers, NOT_A_NUMBER);
    vector<int32_t> sums(rows * groups, -1);
    quantize(x.rows, w, codes.rows, Coded{scale.data(), factors.data(), sums.data(), outliers.data()}, 0, rows);
    Matrix without(x);  // codes are made of what is left
    for (int64_t r = 0; r < rows; r++)
        for (const int32_t c : columns) put_number(without.rows.at(r, c), kind, 0);
    bool good = true;
    for (int64_t r = 0; r < rows; r++) {
        float most = 0;
        for (int64_t c = 0; c < cols; c++) most = std::fmax(most, std::fabs(without.at(r, c)));
        for (int32_t i = 0; i < w.outliers; i++) good &= outliers[r * w.outliers + i] == x.at(r, columns[i]);
        const float inverse = std::isfinite(127.0f / most) ? 127.0f / most : 0.0f;
        good &= scale[r] == most / 127.0f;
        vector<float> powers(size_t(groups), 1);
        for (int64_t g = 0; g < w.groups(); g++) {
            int32_t sum = 0;
            float here = 0;
            for (int64_t c = g * group; c < cols && c < (g + 1) * group; c++) here = std::fmax(here, std::fabs(without.at(r, c)));
            powers[g] = power(here, most);
            good &= factors[r * groups + g] == 1 / powers[g];
            for (int64_t c = g * group; c < cols && c < (g + 1) * group; c++) sum += int32_t(std::nearbyint(without.at(r, c) * powers[g] * inverse));
            const float real = float(sum) / powers[g];
            good &= w.lows ? !std::memcmp(&sums[r * groups + g], &real, 4) : sums[r * groups + g] == sum;
        }
        for (int64_t c = 0; c < end; c++) {
            const int8_t found = int8_t(*codes.rows.at(r, c) - shift);
            good &= found == (c < cols ? int8_t(std::nearbyint(without.at(r, c) * powers[c / group] * inverse)) : 0);
        }
    }
    check(good, shape("codes of rows", rows, cols, group, kind));
}

void test_activate(int64_t rows, int64_t cols, Kind kind) {
    const Activation activation = dice.of({SILU, GELU, GELU_TANH, RELU, SIGMOID, QUICK_GELU});
    const bool gated = dice.chance(0.5);
    Matrix x(rows, gated ? 2 * cols : cols, kind, false, dice.below(3)), y(rows, cols, kind, dice.chance(0.3), dice.below(3)), again(y);
    x.fill(kind, dice.of({1.0f, 30.0f}));
    put_number(x.rows.at(0, 0), kind, dice.of({0.0f, -100.0f, 100.0f, 1e30f, -1e30f}));
    activate(x.rows, y.rows, activation, gated, 0, rows);
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double gate = x.at(r, c), up = gated ? x.at(r, cols + c) : 1.0, expected = activated_exactly(gate, activation) * up;
            good &= close(y.at(r, c), expected, std::fabs(expected) * slack(kind) + std::fmin(std::fabs(gate), 10.0) * std::fabs(up) * 0x1p-20 + 1e-30);
        }
    const std::string what = shape("activate", rows, cols, activation, kind) + (gated ? " gated" : "");
    check(good && y.filled() && y.gaps_untouched(), what);
    for (int64_t r = rows - 1; r >= 0; r--) activate(x.rows, again.rows, activation, gated, r, r + 1);
    check(again.memory == y.memory, what + ": row by row");
}

// Columns first.. of y get (x a) b, the others stay; rows in tiles give the same bits.
void test_low_rank(int64_t rows, int64_t ins, int64_t outs, Kind kind) {
    const int64_t rank = dice.between(1, 40), first = dice.below(5), after = dice.below(5);
    Matrix x(rows, ins, kind, false, dice.below(3)), tiles(rows, ins, kind, true), a(rank, ins, kind, false), b(rank, outs, kind, false);
    Matrix y(rows, first + outs + after, kind, false, dice.below(3));
    x.fill(kind), a.fill(kind), b.fill(kind), y.fill(kind);
    copy(x.rows, tiles.rows, 0, rows);
    const LowRank term{a.rows.data, b.rows.data, ins, outs, first, int32_t(rank), kind};
    Matrix before(y), again(y);
    for (int64_t r = 0; r < rows; r++) low_rank(x.rows, y.rows, term, r), low_rank(tiles.rows, again.rows, term, r);
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < y.rows.cols; c++) {
            double sum = 0, size = 0;
            const int64_t o = c - first;
            for (int64_t j = 0; o >= 0 && o < outs && j < rank; j++)
                for (int64_t i = 0; i < ins; i++) {
                    const double one = double(x.at(r, i)) * double(a.at(j, i)) * double(b.at(j, o));
                    sum += one, size += std::fabs(one);
                }
            const double expected = double(before.at(r, c)) + sum;
            good &= size == 0 ? y.at(r, c) == before.at(r, c) : close(y.at(r, c), expected, std::fabs(expected) * slack(kind) + size * 0x1p-20);
        }
    const std::string what = shape("low rank", rows, outs, ins, kind);
    check(good && y.gaps_untouched(), what);
    check(again.memory == y.memory, what + ": from tiles");
}

void test_cap(int64_t rows, int64_t cols, Kind kind) {
    const float limit = dice.of({1.0f, 30.0f, 50.0f});
    Matrix x(rows, cols, kind, false, dice.below(3)), y(rows, cols, kind, false, dice.below(3)), again(y);
    x.fill(kind, dice.of({1.0f, 100.0f}));
    put_number(x.rows.at(0, 0), kind, dice.of({0.0f, -1e4f, 1e30f, -1e30f, NAN}));
    cap(x.rows, y.rows, limit, 0, rows);
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c++) {
            const double expected = limit * std::tanh(double(x.at(r, c)) / limit);
            good &= std::isnan(expected) ? std::isnan(y.at(r, c)) : close(y.at(r, c), expected, std::fabs(expected) * slack(kind) + limit * 3e-7);
        }
    check(good && y.gaps_untouched(), shape("cap", rows, cols, 0, kind));
    for (int64_t r = rows - 1; r >= 0; r--) cap(x.rows, again.rows, limit, r, r + 1);
    check(again.memory == y.memory, shape("cap row by row", rows, cols, 0, kind));
}

void test_rope(int64_t rows, int64_t heads, int64_t size, Kind kind) {
    const int64_t half = size / 2;
    Matrix x(rows, heads * size, kind, false, size);  // values stand behind the heads that turn
    x.fill(kind);
    const Matrix before(x);
    vector<float> cos, sin;
    for (int64_t i = 0; i < rows * half; i++) {
        const double angle = 1e4 * dice.normal();
        cos.push_back(float(std::cos(angle))), sin.push_back(float(std::sin(angle)));
    }
    const int64_t cut = dice.below(rows + 1);
    rope(x.rows, heads, size, cos.data(), sin.data(), cut, rows);
    rope(x.rows, heads, size, cos.data(), sin.data(), 0, cut);
    bool good = true;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < half; i++) {
                const double a = before.at(r, h * size + i), b = before.at(r, h * size + half + i), c = cos[r * half + i], s = sin[r * half + i];
                const double one = a * c - b * s, other = b * c + a * s, allowed = (std::fabs(a) + std::fabs(b)) * 0x1p-22;
                good &= close(x.at(r, h * size + i), one, allowed + std::fabs(one) * slack(kind));
                good &= close(x.at(r, h * size + half + i), other, allowed + std::fabs(other) * slack(kind));
            }
    check(good && x.gaps_untouched(), shape("rope", rows, heads, size, kind));
}

// ---- mixtures of experts

void test_route(int64_t rows, int64_t count, Kind kind) {
    Matrix x(rows, count, F32, false, dice.below(3));
    x.fill(kind, dice.of({1.0f, 30.0f}));
    for (int64_t r = 0; r < rows; r++)  // equal numbers, and some that are none
        for (int64_t c = 1; c < count; c++)
            if (dice.chance(0.3)) put_number(x.rows.at(r, c), F32, x.at(r, c - 1));
    const int64_t odd = dice.below(rows + 1);
    if (odd < rows) put_number(x.rows.at(odd, dice.below(count)), F32, dice.of({NOT_A_NUMBER, INFINITY}));
    const int32_t keep = int32_t(dice.between(1, count)), renormalise = int32_t(dice.below(2));
    vector<Best> found(rows * keep), again(found);
    route({x.rows, found.data(), keep, renormalise, kind}, 0, rows);
    for (int64_t r = rows - 1; r >= 0; r--) route({x.rows, again.data(), keep, renormalise, kind}, r, r + 1);
    bool good = true, order = true;
    for (int64_t r = 0; r < rows; r++) {
        vector<double> chances;
        double most = -INFINITY, total = 0, kept = 0;
        for (int64_t c = 0; c < count; c++) most = std::fmax(most, x.at(r, c));
        for (int64_t c = 0; c < count; c++) chances.push_back(std::exp(x.at(r, c) - most)), total += chances.back();
        const Best* own = found.data() + r * keep;
        for (int32_t i = 0; i < keep; i++) kept += chances[own[i].index] / total;
        for (int32_t i = 0; i < keep; i++) {
            const double expected = chances[own[i].index] / total / (renormalise ? kept : 1);
            good &= r == odd ? std::isnan(own[i].value) : close(own[i].value, expected, expected * (slack(kind) + 0x1p-16) + 1e-30);
            order &= i == 0 || own[i].index > own[i - 1].index;
        }
        for (int64_t c = 0, at = 0; c < count && r != odd; c++) {  // the others are smaller, or equal and later
            if (at < keep && own[at].index == c) {
                at++;
                continue;
            }
            for (int32_t i = 0; i < keep; i++) {
                const double mine = chances[own[i].index] / total, other = chances[c] / total;
                order &= mine >= other * (1 - 1e-6) - 1e-37 && (own[i].index < c || x.at(r, own[i].index) != x.at(r, c));
            }
        }
    }
    check(good, shape("route: shares", rows, keep, count, kind));
    check(order, shape("route: order", rows, keep, count, kind));
    check(!std::memcmp(found.data(), again.data(), found.size() * sizeof(Best)), shape("route: row by row", rows, keep, count, kind));
}

// A row of a mixture as single products: rounded and added in ascending order of experts, the shared one last.
vector<float> mixed_alone(const Experts& m, const Rows& x, int64_t row, Kind kind) {
    const auto product = [&](const Linear& w, const Matrix& from, int64_t cols, Kind to, Activation activation) {
        Matrix made(1, cols, to, false);
        run_linear(kernels, w, from.rows, made.rows, activation, false);
        return made;
    };
    Matrix one(1, x.cols, kind, false), logits(1, m.count, F32, false);
    std::memcpy(one.rows.data, x.at(row, 0), size_t(x.cols * bytes_of(kind)));
    const Matrix given = product(m.router, one, m.count, kind, NONE);
    for (int64_t e = 0; e < m.count; e++) put_number(logits.rows.at(0, e), F32, given.at(0, e));
    vector<Best> chosen(m.top_k);
    route({logits.rows, chosen.data(), m.top_k, m.renormalise, kind}, 0, 1);
    if (m.shared) chosen.push_back({m.gate.panels ? product(m.gate, one, 1, kind, SIGMOID).at(0, 0) : 1, m.count});
    vector<float> out(x.cols, 0.0f);
    for (const Best& own : chosen) {
        const Linear &up = m.up[own.index], &down = m.down[own.index];
        Matrix inner = product(up, one, down.ins, kind, own.index == m.count ? m.shared_activation : m.activation);
        if (own.index < m.count && (m.limit < INFINITY || m.shift)) {  // gates and ups first, limited one by one
            Matrix both = product(up, one, up.outs, kind, NONE);
            for (int64_t c = 0; c < up.outs; c++) {
                const float x = both.at(0, c), limited = c < down.ins ? std::fmin(x, m.limit) : nearest(std::fmax(-m.limit, std::fmin(x, m.limit)) + m.shift, kind);
                put_number(both.rows.at(0, c), kind, limited);
            }
            activate(both.rows, inner.rows, m.activation, true, 0, 1);
        }
        const Matrix made = product(down, inner, x.cols, kind, NONE);
        for (int64_t c = 0; c < x.cols; c++) out[c] = nearest(out[c] + nearest(made.at(0, c) * own.value, kind), kind);
    }
    return out;
}

void test_mixture(int64_t rows, int64_t cols, int64_t hidden, Kind kind, Kind numbers) {
    const int32_t count = int32_t(dice.between(1, 9)), group = int32_t(16 * dice.between(1, 4)), outliers = kind == numbers ? 0 : int32_t(dice.below(2));
    const bool gated = dice.chance(0.5), shared = dice.chance(0.5), biased = dice.chance(0.5);
    std::deque<Weights> made;
    const auto linear = [&](int64_t outs, int64_t ins, Kind of, bool pairs) {
        const bool codes = of != numbers;
        made.emplace_back(outs, ins, of, pairs, biased, codes && of != I8 ? group : 0, codes ? outliers : 0);
        return made.back().c;
    };
    vector<Linear> ups, downs;
    for (int32_t e = 0; e < count + shared; e++) {
        const int64_t own = e == count ? hidden + 9 : hidden;
        ups.push_back(linear(gated ? 2 * own : own, cols, kind, gated));
        downs.push_back(linear(cols, own, kind, false));
    }
    Experts m{ups.data(), downs.data(), linear(count, cols, numbers, false), Linear{}, count, int32_t(dice.between(1, count)), int32_t(dice.below(2)), shared, dice.of({SILU, GELU_TANH}), dice.of({SILU, RELU}), INFINITY, 0};
    if (gated && dice.chance(0.5)) m.limit = nearest(0.7f, numbers), m.shift = float(dice.below(2));
    if (dice.chance(0.5)) m.gate = linear(1, cols, numbers, false);
    Matrix x(rows, cols, numbers, false, dice.below(3)), first(rows, cols, numbers, false, dice.below(3));
    x.fill(numbers);
    for (const int workers : {1, 2, 3}) {
        Matrix y(first);
        set_threads(workers);
        run_experts(kernels, m, x.rows, y.rows);
        if (workers == 1) std::memcpy(first.memory.data(), y.memory.data(), y.memory.size());
        check(first.memory == y.memory && y.gaps_untouched(), shape("mixture: threads", rows, workers, cols, kind));
    }
    set_threads(1);
    bool good = true;
    for (int64_t r = 0; r < rows; r++) {
        const vector<float> expected = mixed_alone(m, x.rows, r, numbers);
        for (int64_t c = 0; c < cols; c++) good &= first.at(r, c) == expected[c] || (std::isnan(expected[c]) && std::isnan(first.at(r, c)));
    }
    check(good, shape("mixture: rows alone", rows, cols, hidden, kind));
}

// ---- threads

void test_threads(int workers) {
    set_threads(workers);
    check(threads() == workers, "as many workers as asked for");
    vector<std::atomic<int>> calls(workers);
    std::atomic<int> arrived{0};
    bool in_step = true;
    for (int job = 0; job < 20; job++) {
        arrived = 0;
        std::atomic<bool> late{false};
        run([&](int worker, int all) {
            calls[worker]++;
            for (int step = 1; step <= 5; step++) {
                arrived++;
                barrier();
                if (all != workers || arrived < step * workers) late = true;  // all have come as far as this
                barrier();
            }
        });
        in_step &= !late && arrived == 5 * workers;
    }
    check(in_step, "barriers hold " + std::to_string(workers) + " workers");
    for (const auto& one : calls) check(one == 20, "every worker once a job");
    for (const int64_t n : {0, 1, 5, 64, 1001}) {
        int64_t next = 0;
        for (int worker = 0; worker < workers; worker++) {
            const Share share(n, worker, workers);
            check(share.first == next && share.last >= share.first, "shares join");
            next = share.last;
        }
        check(next == n, "shares are everything");
    }
}

// Short jobs of two threads that do not wait for each other, while workers come and go. What jobs share is plain memory, so that a
// sanitizer of threads sees each access that nothing puts in order.
void test_callers(int jobs) {
    vector<int64_t> things(64, 0);
    int64_t done = 0;
    bool good = true;
    Pace pace;
    const auto job = [&](int worker, int workers) {
        const Share mine(64, worker, workers);
        for (int64_t i = mine.first; i < mine.last; i++) things[i]++;
        barrier();
        if (worker == workers - 1) for (const int64_t one : things) good &= one == done + 1;
        barrier();
        if (worker == 0) done++;
    };
    const auto call = [&](bool resizes) {
        for (int i = 0; i < jobs; i++) {
            if (resizes && i % 5 == 0) set_threads(1 + i / 5 % 4);
            if (i % 2) run(job);
            else run(job, pace);
        }
    };
    std::thread other(call, true);
    call(false);
    other.join();
    const Alone held;
    check(good && done == 2 * jobs, "jobs of two callers, one after another");
    set_threads(1);
}

void round_of_tests() {
    const auto some_rows = [] { return dice.chance(0.5) ? dice.between(1, 18) : dice.between(1, 40); };
    const auto some_ins = [] { return dice.chance(0.5) ? dice.of<int64_t>({1, 8, 40, 64, 100, 128}) : dice.between(1, 200); };
    const auto some_outs = [] { return dice.chance(0.5) ? dice.of<int64_t>({1, 31, 32, 33, 63, 64, 65}) : dice.between(1, 150); };
    for (const Kind numbers : {F32, BF16}) {
        for (const Kind kind : {numbers, I8, I4, G8}) test_linear(some_rows(), some_outs(), some_ins(), kind, numbers);
        for (const bool rms : {true, false}) test_norm(some_rows(), some_ins(), numbers, rms, dice.chance(0.5));
        test_quantize(some_rows(), some_ins(), numbers);
        test_activate(some_rows(), some_ins(), numbers);
        test_low_rank(dice.between(1, 20), some_ins(), some_outs(), numbers);
        test_cap(some_rows(), some_ins(), numbers);
        test_rope(some_rows(), dice.between(1, 5), 2 * dice.between(1, 40), numbers);
        test_route(some_rows(), some_ins(), numbers);
        for (const Kind kind : {numbers, I8, I4, G8}) test_mixture(some_rows(), some_ins(), some_ins(), kind, numbers);
    }
    test_copy(some_rows(), some_ins());
}

}  // namespace

// How many of `calls` calls ran alone, if a call takes so long on all workers and alone.
int64_t calls_alone(Pace& pace, int64_t calls, double on_all, double alone) {
    int64_t found = 0;
    for (int64_t i = 0; i < calls; i++) {
        const bool chosen = pace.alone();
        pace.note(chosen, chosen ? alone : on_all);
        found += chosen;
    }
    return found;
}

void test_pace() {
    Pace pace;
    calls_alone(pace, 4, 1.0, 2.0);
    const int64_t tries = calls_alone(pace, 10000, 1.0, 2.0);
    check(tries > 50 && tries < 100, "pace: a way that takes twice as long is tried in less than one of 100 calls");
    for (int64_t i = 0; i < 100; i++) calls_alone(pace, 1, 1.0, 2.0);
    const bool before = pace.alone();
    pace.note(before, 50.0);
    check(calls_alone(pace, 100, 1.0, 2.0) < 5, "pace: one disturbed call does not turn it over");
    check(calls_alone(pace, 200, 9.0, 2.0) > 190, "pace: it turns over when the workers are disturbed");
    check(calls_alone(pace, 2000, 1.0, 2.0) < 1000, "pace: and back");
    check(calls_alone(pace, 1000, 1.0, 0.5) > 800, "pace: a small job runs alone");
}

int main(int count, char** words) {
    const uint64_t seed = count > 1 ? std::strtoull(words[1], nullptr, 10) : 1, rounds = count > 2 ? std::strtoull(words[2], nullptr, 10) : 40;
    for (uint64_t i = 0; i < rounds; i++) {
        dice.engine.seed(seed + i);
        round_of_tests();
    }
    test_linear(3, 70, 5000, F32, F32);  // inputs go by in several chunks
    test_linear(40, 70, 3000, BF16, BF16);
    test_linear(20, 70, 5000, I8, F32);
    test_ties();
    test_rounding();
    test_pace();
    for (const int workers : {1, 3, 2, 4, 1}) test_threads(workers);
    test_callers(300);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
