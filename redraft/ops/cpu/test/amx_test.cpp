// Stand-alone test of linear layers by tiles, on a machine with AVX-512 (BF16, VNNI) and without AMX: tile instructions are emulated.
//   FLAGS="-std=c++17 -O2 -ffp-contract=off -mavx2 -mfma -mf16c -mbmi2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx512vnni"
//   g++ $FLAGS -DREDRAFT_EMULATE_TILES amx_test.cpp ../amx.cpp ../avx512_bf16.cpp ../pack.cpp ../threads.cpp -pthread -o amx_test
//   (with -fsanitize=address,undefined too)
// amx_test [seed [cases]]: results against a definition, against the AVX-512 unit, and rows alone against rows among others; then
// planted mistakes, each of which must be noticed.
#include "../kernels.h"
#include "../pack.h"
#include "../threads.h"
#include "tiles_emulated.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <immintrin.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

using namespace redraft;
using std::vector;

namespace {

struct Random {
    std::mt19937_64 engine;
    int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(double p) { return double(engine() >> 11) * 0x1p-53 < p; }
    float normal() { return std::normal_distribution<float>()(engine); }
};

// Exactly as large as asked for, so that the sanitizer sees what is read or written behind it.
template <class T>
struct Memory {
    T* data;
    int64_t count;
    explicit Memory(int64_t n) : data(nullptr), count(n) {
        void* p = nullptr;
        if (posix_memalign(&p, 64, size_t(n) * sizeof(T) + !n)) std::abort();
        std::memset(p, 0, size_t(n) * sizeof(T));
        data = static_cast<T*>(p);
    }
    Memory(Memory&& other) : data(other.data), count(other.count) { other.data = nullptr; }
    Memory(const Memory&) = delete;
    ~Memory() { std::free(data); }
    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
};

float of_bf16(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float rounded(float x, Kind kind) { return kind == F32 ? x : of_bf16(to_bf16(x)); }
float number_at(const Rows& x, int64_t r, int64_t c) {
    float y;
    uint16_t half;
    if (x.kind == F32) return std::memcpy(&y, x.at(r, c), 4), y;
    return std::memcpy(&half, x.at(r, c), 2), of_bf16(half);
}
void set_number(const Rows& x, int64_t r, int64_t c, float y) {
    const uint16_t half = to_bf16(y);
    if (x.kind == F32) std::memcpy(x.at(r, c), &y, 4);
    else std::memcpy(x.at(r, c), &half, 2);
}

struct Case {
    Kind weights, form;  // form: of x's numbers and of y's
    int64_t rows, outs, ins;
    int32_t group;
    bool gated, biased, add, tiled;
    int32_t best;  // how many of the largest outputs are asked for, or 0
    Activation activation;
    int32_t outliers = 0;  // columns at most that have no codes

    std::string reported() const {
        char text[200];
        std::snprintf(text, sizeof text, "weights %d form %d rows %ld outs %ld ins %ld group %d gated %d bias %d add %d tiled %d best %d act %d outliers %d", weights,
                      form, long(rows), long(outs), long(ins), group, gated, biased, add, tiled, best, activation, outliers);
        return text;
    }
    int64_t columns() const { return gated && activation != NONE ? outs / 2 : outs; }
};

// A layer with its numbers as they were before they were packed.
struct Layer {
    Linear w{};
    vector<float> plain, bias, scale;  // [outs][ins]: what a weight or code is; scale: of an output or of its groups
    vector<int32_t> columns;
    vector<float> side;                // [outliers][outs]
    Memory<uint8_t> panels{0};
    Memory<float> packed_bias{0}, packed_scale{0}, packed_side{0};
    Memory<int32_t> sums{0};
    Memory<uint16_t> scales{0}, lows{0};
    Memory<int8_t> factors{0}, offsets{0};
    vector<float> low;                 // of groups
};

template <class T>
void renew(Memory<T>& m, int64_t n) {
    m.~Memory<T>();
    new (&m) Memory<T>(n);
}

void leave_out(Layer& l, int32_t outliers, Random& random) {
    Linear& w = l.w;
    for (int32_t i = int32_t(random.below(w.ins)); i < w.ins && int32_t(l.columns.size()) < outliers; i += int32_t(random.between(1, 9)))
        l.columns.push_back(i);
    w.outliers = int32_t(l.columns.size()), w.columns = l.columns.data();
    renew(l.packed_side, w.count() * PANEL * w.outliers);
    Memory<float> one(w.count() * PANEL);
    for (int64_t i = 0; i < w.outliers; i++) {
        for (int64_t o = 0; o < w.outs; o++) l.side.push_back(random.normal());
        pack_floats(w, l.side.data() + i * w.outs, one.data);
        for (int64_t p = 0; p < w.count(); p++) std::memcpy(l.packed_side.data + (p * w.outliers + i) * PANEL, one.data + p * PANEL, PANEL * 4);
    }
    w.side = l.packed_side.data;
}

void pack_codes(Layer& l, Random& random) {
    Linear& w = l.w;
    vector<int8_t> codes(size_t(w.outs * w.ins));
    const double size = 1 / (std::sqrt(double(w.ins)) * (w.kind == I4 ? 4.6 : 73));
    const auto drawn = [&] { return float((0.5 + double(random.below(1000)) / 1000) * size); };
    if (w.grouped() && random.chance(0.4)) w.per = int32_t(random.between(2, 4));
    const bool factors = w.per > 1, lows = w.grouped() && random.chance(0.4);
    // a number of each group, as the kernel reads it, and packed
    const auto groups = [&](vector<float>& numbers, Memory<uint16_t>& halves, Memory<int8_t>& bytes) {
        vector<uint16_t> tops;
        vector<int8_t> each;
        for (int64_t i = 0; i < w.outs * w.tops(); i++) tops.push_back(uint16_t(_cvtss_sh(factors ? drawn() / 16 : drawn(), 0)));
        for (int64_t i = 0; i < w.outs * w.groups(); i++) {
            each.push_back(int8_t(random.between(-32, 63)));
            const float top = _cvtsh_ss(tops[size_t(i / w.groups() * w.tops() + i % w.groups() / w.per)]);
            numbers.push_back(factors ? top * float(each.back()) : top);
        }
        renew(halves, w.count() * w.tops() * PANEL), renew(bytes, w.count() * w.groups() * PANEL);
        arrange(w, tops.data(), 2, w.tops(), halves.data);
        arrange(w, each.data(), 1, w.groups(), bytes.data);
    };
    if (w.grouped()) groups(l.scale, l.scales, l.factors), w.scales = l.scales.data;
    if (lows) groups(l.low, l.lows, l.offsets), w.lows = l.lows.data;
    if (factors) w.factors = l.factors.data, w.offsets = lows ? l.offsets.data : nullptr;
    for (auto& code : codes) code = int8_t(w.kind == I4 ? random.between(0, 15) - w.offset() : random.between(-127, 127));
    l.plain.assign(codes.begin(), codes.end());
    if (w.grouped()) return pack_groups(w, codes.data(), l.panels.data);
    for (int64_t i = 0; i < w.outs; i++) l.scale.push_back(drawn());
    renew(l.sums, w.count() * PANEL), renew(l.packed_scale, w.count() * PANEL);
    pack_int8(w, codes.data(), l.panels.data, l.sums.data);
    pack_floats(w, l.scale.data(), l.packed_scale.data);
}

void pack_numbers(Layer& l, Random& random) {
    const float size = 1 / std::sqrt(float(l.w.ins));
    vector<uint16_t> halves;
    for (int64_t i = 0; i < l.w.outs * l.w.ins; i++) {
        l.plain.push_back(rounded(random.normal() * size, l.w.kind));
        halves.push_back(to_bf16(l.plain.back()));
    }
    pack_plain(l.w, l.w.kind == F32 ? static_cast<const void*>(l.plain.data()) : halves.data(), l.panels.data);
}

Layer make(const Case& c, Random& random) {
    Layer l;
    l.w.outs = c.outs, l.w.ins = c.ins, l.w.kind = c.weights, l.w.group = c.group, l.w.gated = c.gated, l.w.per = 1;
    renew(l.panels, l.w.count() * l.w.panel_bytes());
    if (c.weights >= I8) pack_codes(l, random), leave_out(l, c.outliers, random);
    else pack_numbers(l, random);
    if (c.biased) {
        for (int64_t i = 0; i < c.outs; i++) l.bias.push_back(random.normal());
        renew(l.packed_bias, l.w.count() * PANEL);
        pack_floats(l.w, l.bias.data(), l.packed_bias.data);
        l.w.bias = l.packed_bias.data;
    }
    l.w.panels = l.panels.data;
    l.w.scale = l.packed_scale.data, l.w.sums = l.sums.data;
    return l;
}

// Rows first..first + count of a case through a unit.
struct Outcome {
    Memory<uint8_t> y{0};
    Rows rows{};
    vector<Best> best;
    Memory<uint8_t> codes{0};
    vector<float> scale, factors;
};

Rows shaped(Memory<uint8_t>& m, int64_t rows, int64_t cols, Kind kind, bool tiled) {
    Rows x{nullptr, rows, cols, tiled ? 0 : cols * bytes_of(kind), kind};
    renew(m, x.size());
    x.data = m.data;
    return x;
}

Outcome pass(const Kernels& unit, const Case& c, const Layer& l, const vector<float>& x, const vector<float>& before, int64_t first, int64_t count,
             int64_t cut) {
    Outcome out;
    Memory<uint8_t> plain{0};
    const Rows from = shaped(plain, count, c.ins, c.form, false);
    for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < c.ins; i++) set_number(from, r, i, x[size_t((first + r) * c.ins + i)]);
    const Kind kind = unit.takes(c.weights);
    const int64_t per_step = c.weights == F32 ? 1 : c.weights == BF16 ? 2 : 4;
    const Rows tiles = shaped(out.codes, count, l.w.steps() * per_step, kind, true);
    out.scale.resize(size_t(count));
    Memory<int32_t> sums(count * l.w.groups());
    Memory<float> outliers(count * l.w.outliers);
    out.factors.resize(size_t(count * l.w.groups()));
    const Coded coded{out.scale.data(), out.factors.data(), sums.data, outliers.data};
    if (kind == I8) unit.quantize(from, l.w, tiles, coded, 0, count);
    else unit.copy(from, tiles, 0, count);
    out.rows = shaped(out.y, count, c.columns(), c.form, c.tiled);
    for (int64_t r = 0; r < count && c.add; r++)
        for (int64_t i = 0; i < c.columns(); i++) set_number(out.rows, r, i, before[size_t((first + r) * c.columns() + i)]);
    LinearJob job{l.w, tiles, coded, out.rows, c.form, c.activation, c.add, nullptr, c.best};
    if (c.best) {
        out.best.assign(size_t(count * c.best), Best{-std::numeric_limits<float>::infinity(), -1});
        job.best = out.best.data();
        job.y = Rows{};
    }
    Memory<float> scratch(count * PANEL);
    const int64_t pieces = unit.pieces(l.w), at = cut * pieces / l.w.count();
    unit.linear(job, 0, at, scratch.data);
    unit.linear(job, at, pieces, scratch.data);
    return out;
}

float acted(float x, Activation activation) {
    switch (activation) {
        case SILU: return x / (1 + std::exp(-x));
        case GELU: return 0.5f * x * (1 + std::erf(x * 0.70710678f));
        case GELU_TANH: return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
        case RELU: return x > 0 ? x : 0;
        default: return x;
    }
}

// An output of a row before it is rounded: exact in the order of operations where codes are summed, else in double.
float defined(const Case& c, const Layer& l, const Outcome& out, const vector<float>& x, int64_t r, int64_t o) {
    const float* w = l.plain.data() + o * c.ins;
    const float bias = c.biased ? l.bias[size_t(o)] : 0;
    if (c.weights == F32 || c.weights == BF16) {
        double sum = 0;
        for (int64_t i = 0; i < c.ins; i++) sum += double(w[i]) * double(rounded(x[size_t(r * c.ins + i)], c.weights));
        return float(sum + double(bias));
    }
    const Rows codes{out.codes.data, c.rows, l.w.steps() * 4, 0, I8};
    const auto whole = [&](int64_t first, int64_t last) {
        int64_t sum = 0;
        for (int64_t i = first; i < last && i < c.ins; i++) sum += int64_t(w[i]) * (c.weights == I8 ? *codes.at(r, i) - 128 : int8_t(*codes.at(r, i)));
        return float(sum);
    };
    float y = 0;
    if (c.weights == I8) {
        y = whole(0, c.ins) * (out.scale[size_t(r)] * l.scale[size_t(o)]);
    } else {
        for (int64_t g = 0; g < l.w.groups(); g++) {
            const float by = out.factors[size_t(r * l.w.groups() + g)];
            y = std::fma(whole(g * c.group, (g + 1) * c.group) * by, l.scale[size_t(o * l.w.groups() + g)], y);
            int64_t sum = 0;
            for (int64_t i = g * c.group; i < (g + 1) * c.group && i < c.ins; i++) sum += int8_t(*codes.at(r, i));
            if (l.w.lows) y = std::fma(float(sum) * by, l.low[size_t(o * l.w.groups() + g)], y);
        }
        y *= out.scale[size_t(r)];
    }
    for (int64_t i = 0; i < l.w.outliers; i++) y += x[size_t(r * c.ins + l.columns[size_t(i)])] * l.side[size_t(i * c.outs + o)];
    return c.biased ? y + bias : y;
}

float ended(const Case& c, const Layer& l, const Outcome& out, const vector<float>& x, const vector<float>& before, int64_t r, int64_t i) {
    const bool fused = c.gated && c.activation != NONE;
    float y = defined(c, l, out, x, r, i);
    if (c.activation != NONE) y = acted(rounded(y, c.form), c.activation);
    if (fused) y *= rounded(defined(c, l, out, x, r, i + c.outs / 2), c.form);
    if (c.add) y = before[size_t(r * c.columns() + i)] + rounded(y, c.form);
    return rounded(y, c.form);
}

bool same(float a, float b) { return !std::memcmp(&a, &b, 4); }

struct Inputs {
    Case c;
    Layer l;
    vector<float> x, before;
};

Inputs inputs(const Case& c, Random& random) {
    Inputs in{c, make(c, random), {}, {}};
    for (int64_t i = 0; i < c.rows * c.ins; i++)  // every 64 columns of another size
        in.x.push_back(rounded(random.normal() / float(1 << (i / 64 * 7 % 6)), c.form));
    for (int64_t i = 0; i < c.rows * c.columns(); i++) in.before.push_back(rounded(random.normal(), c.form));
    return in;
}

// What is wrong with the tiles' unit for these inputs, or nothing.
std::string judge(const Inputs& in, Random& random) {
    const Case& c = in.c;
    emulated::Machine& machine = emulated::machine;
    machine.faults = machine.products = machine.configurations = 0;
    Case plain = c;
    plain.best = 0;
    const int64_t panels = in.l.w.count();
    const Outcome got = pass(*amx_kernels(), plain, in.l, in.x, in.before, 0, c.rows, panels);
    const bool codes = c.weights >= I8, small = c.weights > I8 && (c.rows < 8 || c.group % 64 || c.group > 256);
    if (machine.faults) return std::string("a processor would stop: ") + machine.fault;
    if (machine.configured) return "tiles are not released";
    if ((c.weights == F32 || small) != (machine.products == 0)) return "tiles are used where they should not be, or not where they should";
    const int64_t chunks = 1 + in.l.w.steps() / 16 / (c.weights > I8 ? 2 : 8);
    if (machine.configurations > 2 + panels * chunks) return "tiles are configured too often";

    const int64_t step = 1 + c.rows * c.columns() * c.ins / 400000;  // not all outputs of large layers
    for (int64_t r = 0; r < c.rows; r++)
        for (int64_t i = random.below(step); i < c.columns(); i += random.between(1, 2 * step - 1)) {
            const float y = number_at(got.rows, r, i), wanted = ended(plain, in.l, got, in.x, in.before, r, i);
            if (codes && c.activation == NONE && !same(y, wanted)) return "codes: not the defined number";
            const float off = c.form == BF16 ? 0.02f : 1e-4f;
            if (!(std::fabs(y - wanted) <= off * (1 + std::fabs(wanted)))) return "not near the defined number";
        }
    const int64_t filling = c.tiled ? got.rows.lines() * LINE / bytes_of(c.form) : c.columns();
    for (int64_t r = 0; r < c.rows; r++)
        for (int64_t i = c.columns(); i < filling && !c.add; i++)
            if (number_at(got.rows, r, i) != 0) return "filling of a tile is not zero";
    if (codes || c.weights == F32) {
        const Outcome other = pass(*avx512_bf16_kernels(), plain, in.l, in.x, in.before, 0, c.rows, panels);
        if (std::memcmp(other.y.data, got.y.data, size_t(got.y.count))) return "other bits than the AVX-512 unit's";
    }
    for (int64_t i = 0; i < 3; i++) {  // among fewer rows, in two calls
        const int64_t first = random.below(c.rows), count = i ? 1 : random.between(1, c.rows - first);
        const Outcome part = pass(*amx_kernels(), plain, in.l, in.x, in.before, first, count, random.below(panels + 1));
        for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < c.columns(); k++)
                if (!same(number_at(part.rows, r, k), number_at(got.rows, first + r, k))) return "a row's bits depend on its neighbours";
    }
    if (c.best) {
        const Outcome found = pass(*amx_kernels(), c, in.l, in.x, in.before, 0, c.rows, random.below(panels + 1));
        for (int64_t r = 0; r < c.rows; r++) {
            vector<Best> best;
            for (int64_t k = 0; k < c.outs; k++) best.push_back({number_at(got.rows, r, k), int32_t(k)});
            std::stable_sort(best.begin(), best.end(), [](const Best& a, const Best& b) { return a.value > b.value; });
            best.resize(size_t(c.best), Best{-std::numeric_limits<float>::infinity(), -1});
            for (int64_t k = 0; k < c.best; k++) {
                const Best& one = found.best[size_t(r * c.best + k)];
                if (one.index != best[size_t(k)].index || !same(one.value, best[size_t(k)].value)) return "not the best";
            }
        }
    }
    if (machine.faults) return std::string("a processor would stop: ") + machine.fault;
    return "";
}

Case draw(Random& random) {
    Case c{};
    c.weights = Kind(random.below(8) ? 1 + random.below(4) : 0);
    c.form = random.chance(0.5) ? BF16 : F32;
    c.rows = random.chance(0.3) ? random.between(1, 3) : random.between(1, 70);
    c.outs = random.between(1, 200);
    c.ins = random.between(1, c.rows < 20 ? 700 : 300);
    const int32_t groups[] = {32, 64, 128, 32, 64, 128, 16, 48, 96, 160, 224, 256, 320};
    c.group = c.weights > I8 ? groups[random.below(13)] : 0;
    c.biased = random.chance(0.3), c.tiled = random.chance(0.4);
    const int64_t use = random.below(4);
    c.best = use ? 0 : int32_t(random.between(1, 4)), c.add = use == 1, c.gated = use >= 2;
    if (c.gated) c.outs += c.outs % 2;
    if (use && random.chance(0.7)) c.activation = Activation(random.between(1, 4));
    if (c.gated && c.activation == NONE) c.tiled = false;
    if (c.best) c.tiled = false;
    if (c.weights >= I8 && random.chance(0.4)) c.outliers = int32_t(random.between(1, 20));
    return c;
}

// Rows in several blocks together, and sums that rest between chunks.
const Case LARGE[] = {
    {BF16, BF16, 33, 70, 2100, 0, false, true, false, true, 0, NONE},   {I8, F32, 64, 130, 2100, 0, false, false, true, false, 0, NONE},
    {BF16, F32, 272, 300, 1100, 0, false, true, false, false, 3, NONE},     {I8, BF16, 259, 140, 2200, 0, true, true, false, true, 0, SILU},
    {BF16, BF16, 517, 330, 40, 0, true, false, false, true, 0, SILU},   {I4, F32, 150, 65, 600, 64, false, true, true, false, 0, NONE},
    {BF16, F32, 16, 64, 2100, 0, false, false, false, false, 0, NONE},  {I8, F32, 400, 200, 70, 0, false, false, false, false, 1, NONE},
    {I4, BF16, 33, 70, 1100, 32, true, false, false, true, 0, GELU},     {I8, BF16, 400, 200, 1100, 0, true, true, false, true, 0, SILU, 16},
};

int failures(uint64_t seed, int64_t cases) {
    int failed = 0;
    Random random{std::mt19937_64(seed)};
    const int64_t large = int64_t(sizeof LARGE / sizeof *LARGE);
    for (int64_t i = 0; i < cases + large; i++) {
        const Case c = i < large ? LARGE[i] : draw(random);
        const std::string wrong = judge(inputs(c, random), random);
        if (wrong.empty()) continue;
        failed++;
        std::printf("FAILED case %ld (%s): %s\n", long(i), c.reported().c_str(), wrong.c_str());
    }
    std::printf("%ld cases, %d failed\n", long(cases + large), failed);
    return failed;
}

// Every planted mistake must be noticed by some of a few cases.
int unnoticed() {
    struct Mistake {
        emulated::Plant plant;
        const char* name;
        Case c;
    };
    const Case halves{BF16, F32, 20, 70, 300, 0, false, false, false, false, 0, NONE};
    Case int4 = halves;
    int4.weights = I4, int4.group = 64;
    Case small = int4;
    small.group = 128, small.rows = 8;
    Case chunks = halves;
    chunks.ins = 2100;
    const Mistake mistakes[] = {
        {emulated::STORES_DROPPED, "stores to the configuration dropped", halves}, {emulated::STORES_DROPPED, "the same, int4", small},
        {emulated::SHORT_TILES, "tiles a row too short", halves},                  {emulated::SHORT_ROWS, "rows that do not go with sums", int4},
        {emulated::SPLIT_SUMS, "sums split where rows are few", halves},           {emulated::LATE_LOADS, "sums reloaded from the wrong row", chunks},
        {emulated::STALE_SUMS, "sums of the group before", int4},
    };
    int missed = 0;
    for (const Mistake& m : mistakes) {
        Random random{std::mt19937_64(7)};
        const Inputs in = inputs(m.c, random);
        emulated::machine.plant = emulated::NOTHING;
        const std::string sound = judge(in, random);
        emulated::machine.plant = m.plant;
        const std::string wrong = judge(in, random);
        emulated::machine.plant = emulated::NOTHING;
        emulated::release();
        const bool noticed = sound.empty() && !wrong.empty();
        missed += !noticed;
        std::printf("%s: %s: %s\n", noticed ? "noticed" : "MISSED", m.name, wrong.c_str());
    }
    return missed;
}

// What the manual says of a product, on numbers where another order or rounding gives another result.
int wrong_products() {
    using namespace emulated;
    struct alignas(64) {
        uint8_t bytes[64];
    } shapes{};
    shapes.bytes[0] = 1;
    for (int t = 0; t < 3; t++) shapes.bytes[16 + 2 * t] = uint8_t(t == 1 ? 8 : 4), shapes.bytes[48 + t] = uint8_t(t == 2 ? 2 : 1);
    const auto product = [&](float c, const float (&a)[4], const float (&b)[4]) {
        uint16_t x[4], y[4];
        for (int i = 0; i < 4; i++) x[i] = to_bf16(a[i]), y[i] = to_bf16(b[i]);
        configure(&shapes);
        load(0, &c, 4), load(1, x, 8), load(2, y, 4);
        dot_bf16(0, 1, 2);
        store(0, &c, 4);
        release();
        return c;
    };
    int wrong = 0;
    machine.faults = 0;
    wrong += product(1, {1, 2, 3, 4}, {5, 6, 7, 8}) != 71;
    wrong += product(0, {0x1p30f, 1, -0x1p30f, 1}, {1, 1, 1, 1}) != 2;               // numbers of a kind are summed first
    wrong += product(0x1p24f, {1, 1, 0, 0}, {1, 1, 0, 0}) != 0x1p24f + 2;            // and added at the end only
    wrong += product(0x1p24f, {1, 0, 0, 0}, {1, 0, 0, 0}) != 0x1p24f;                // to nearest, ties to even
    wrong += product(0x1p-140f, {0x1p-70f, 0, 0, 0}, {0x1p-70f, 0, 0, 0}) != 0;      // denormal numbers are zero
    wrong += machine.faults != 0;
    load(0, shapes.bytes, 64);
    wrong += machine.faults != 1;                                                    // tiles are not configured
    configure(&shapes);
    load(3, shapes.bytes, 64);
    wrong += machine.faults != 2;                                                    // a tile without rows
    dot_bytes(0, 2, 1, true, true);
    wrong += machine.faults != 3;                                                    // shapes that do not go together
    shapes.bytes[40] = 1;
    configure(&shapes);
    wrong += machine.faults != 4;                                                    // reserved bytes
    release();
    if (wrong) std::printf("FAILED: %d products are not what the manual says\n", wrong);
    return wrong;
}

}  // namespace

int main(int count, char** given) {
    set_threads(1);
    const uint64_t seed = count > 1 ? std::strtoull(given[1], nullptr, 10) : 1;
    const int64_t cases = count > 2 ? std::strtoll(given[2], nullptr, 10) : 150;
    const int wrong = wrong_products();
    const int failed = failures(seed, cases), missed = unnoticed();
    return wrong || failed || missed;
}
