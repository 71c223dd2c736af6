// Stand-alone test of attention over pages. No library, one instruction set, reported by the flags:
//   g++ -std=c++17 -O2 -ffp-contract=off -mavx2 -mfma -mf16c attend_test.cpp ../attend.cpp ../threads.cpp -pthread -o attend_test
//   (or -mavx512f -mavx512bw -mavx512dq -mavx512vl, and with them -mavx512bf16 or, on any of these processors,
//   -DREDRAFT_EMULATE_BF16; with -fsanitize=address,undefined too)
// attend_test [seed [worlds]]: results against a definition in double, and against each row computed alone on committed slots.
// attend_test bench [row|shared|prefill]: speed beside the bandwidth and the arithmetic of the same run.
#include "../attend.h"
#include "../threads.h"
#ifdef REDRAFT_EMULATE_BF16
#include "bf16_emulated.h"
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <immintrin.h>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

namespace redraft {
namespace {
#if defined(__AVX512BF16__) || defined(REDRAFT_EMULATE_BF16)
#define DOT_BF16
#endif
#if defined(__AVX512F__)
#include "../vec_avx512.h"
#else
#include "../vec_avx2.h"
#endif
#include "../vec_math.h"

#include "../attend_impl.h"
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
    bool chance(double p) { return double(engine() >> 11) * 0x1p-53 < p; }
    float normal() { return std::normal_distribution<float>()(engine); }
    template <class T> T of(std::initializer_list<T> list) { return list.begin()[below(int64_t(list.size()))]; }
};

float as_float(const uint8_t* p, Kind kind) {
    if (kind == F32) {
        float x;
        std::memcpy(&x, p, 4);
        return x;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void keep_float(uint8_t* p, Kind kind, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (kind == BF16) {
        const uint16_t half = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        std::memcpy(p, &half, 2);
    } else {
        std::memcpy(p, &bits, 4);
    }
}

// Memory on large pages where the kernel gives them, as an engine should hold its pool.
struct Block {
    uint8_t* data;
    explicit Block(size_t bytes, int value) {
        constexpr size_t LARGE = size_t(1) << 21;
        const bool large = bytes >= LARGE;
        data = static_cast<uint8_t*>(large ? std::aligned_alloc(LARGE, (bytes + LARGE - 1) / LARGE * LARGE) : std::malloc(bytes));
        if (large) madvise(data, bytes, MADV_HUGEPAGE);
        std::memset(data, value, bytes);
    }
    Block(const Block&) = delete;
    ~Block() { std::free(data); }
};

// A pool of blocks that are handed out at random; pages of any lane kind are carved from them.
struct Memory {
    Pool pool{};
    size_t size;
    std::unique_ptr<Block> bytes;
    vector<int32_t> blocks;

    static bool coded(Kind kind) { return kind == I4 || kind == I2; }
    static int64_t row_bytes(const Pool& p) {  // of a value
        return coded(p.kind) ? p.size * bits_of(p.kind) / 8 : p.size * bytes_of(p.kind == THIN ? p.numbers : p.kind);
    }

    // Units of keys, then values, then scales and zeros; numbers: the kind of the numbers of pages of codes or with some channels.
    Memory(Random& random, int64_t count, int32_t layers, int32_t kv_heads, int32_t head_size, Kind kind, Kind numbers = F32) {
        pool.layers = layers, pool.kv_heads = kv_heads, pool.size = head_size, pool.kind = kind;
        pool.numbers = numbers;
        pool.values = PAGE * row_bytes(pool);
        pool.key_scales = 2 * pool.values;
        const int64_t each = bytes_of(numbers), channels = coded(kind) ? head_size * each : 4 * PAGE;
        pool.value_scales = pool.key_scales + channels;
        pool.key_zeros = pool.value_scales + (coded(kind) ? PAGE * each : 4 * PAGE), pool.value_zeros = pool.key_zeros + channels;
        pool.unit_bytes = coded(kind) ? pool.value_zeros + PAGE * each : kind == I8 ? pool.key_zeros : pool.key_scales;
        if (coded(kind)) repair(head_size / 8 % 3, head_size / 24 % 3);
        if (kind == THIN) pool.kept = head_size - 3, pool.channels = pool.unit_bytes, pool.unit_bytes += head_size;
        pool.per_block = layers * kv_heads;
        pool.block_bytes = pool.per_block * pool.unit_bytes;
        size = size_t(count * pool.block_bytes);
        bytes = std::make_unique<Block>(size, 0xff);  // NaN, wherever nothing is written
        pool.data = bytes->data;
        for (int64_t i = 0; i < count; i++) blocks.push_back(int32_t(i));
        std::shuffle(blocks.begin(), blocks.end(), random.engine);
    }
    void repair(int32_t rank, int32_t pairs) {
        pool.rank = rank, pool.outliers = 2 * pairs;
        const auto take = [&](int64_t count, int64_t each) {
            const int64_t at = pool.unit_bytes;
            pool.unit_bytes += (count * each + 15) / 16 * 16;
            return at;
        };
        const int64_t each = bytes_of(pool.numbers);
        pool.key_left = take(rank * PAGE, each), pool.key_right = take(rank * pool.size, each);
        pool.value_left = take(rank * PAGE, each), pool.value_right = take(rank * pool.size, each);
        pool.key_outliers = take(2 * pairs * pool.size, each), pool.key_places = take(2 * pairs * pool.size, 1);
        pool.value_outliers = take(2 * pairs * PAGE, each), pool.value_places = take(2 * pairs * PAGE, 1);
    }
    int32_t block() {
        if (blocks.empty()) std::abort();
        const int32_t id = blocks.back();
        blocks.pop_back();
        return id;
    }
};

struct Node {
    int32_t parent;  // -1: the last chain row
};

// What a node sees of its tree.
enum Sees { PATH, SOME, NONE, ALL };  // its ancestors and itself; any nodes up to itself; no node; all nodes

// A slot that a row sees; index: among those that it would see without windows.
struct Slot {
    int64_t slot, position, index;
};

// A text in the pool: committed slots, a chain, and a tree, all keys and values written.
struct Text {
    Memory *memory, *block;  // block: of the first encoded_per_lane pages of every lane
    int32_t lanes = 0, count = 1, per_lane = 0, encoded_per_lane = 0, chain = 0, sinks = 0, recent = 0, apart = 0;  // apart: 0 reads all
    double density = 1;
    vector<int32_t> pages, encoded, lengths;
    vector<vector<int32_t>> positions;  // of committed slots by lane; empty: none kept
    vector<Node> nodes;
    Sees sees = PATH;
    vector<int32_t> odd;  // positions of the chain and the nodes where these do not follow from the tree
    int32_t next = 0;     // position of the first chain row
    int32_t key_at = -1;  // of its key, where that is another one

    Text(Memory& m, Memory& b, int32_t kind) : memory(&m), block(&b), lanes(kind) {
        count = kind == 0 ? 1 : kind == 1 ? m.pool.layers : m.pool.layers * m.pool.kv_heads;
        lengths.assign(size_t(count), 0);
    }
    int64_t lane(int64_t layer, int64_t head) const { return lanes == 0 ? 0 : lanes == 1 ? layer : layer * memory->pool.kv_heads + head; }

    // Pages for `slots` slots of every lane; the first `shared` of them are those of another text.
    void room(int64_t slots, const Text* from = nullptr, int64_t shared = 0) {
        per_lane = int32_t((slots + PAGE - 1) / PAGE) - encoded_per_lane;
        take(*memory, pages, per_lane, from, shared);
        take(*block, encoded, encoded_per_lane, nullptr, 0);
    }
    void take(Memory& of, vector<int32_t>& list, int64_t each, const Text* from, int64_t shared) const {
        const int32_t pages_a_block = lanes == 0 ? 1 : lanes == 1 ? of.pool.layers : int32_t(of.pool.per_block);
        int32_t left = 0, block = 0;
        for (int64_t i = 0; i < count * each; i++) {
            if (i < shared) {
                list.push_back(from->pages[size_t(i)]);
                continue;
            }
            if (!left) left = pages_a_block, block = of.block();
            list.push_back(block * pages_a_block + --left);
        }
    }
    bool in_block(int64_t slot) const { return slot < PAGE * encoded_per_lane; }
    const Pool& pool_of(int64_t slot) const { return in_block(slot) ? block->pool : memory->pool; }
    uint8_t* place(int64_t layer, int64_t head, int64_t slot, bool value) const {
        const Pool& p = pool_of(slot);
        return unit(layer, head, slot) + (value ? p.values : 0) + slot % PAGE * Memory::row_bytes(p);
    }
    float* scale(int64_t layer, int64_t head, int64_t slot, bool value) const {
        return reinterpret_cast<float*>(unit(layer, head, slot) + (value ? memory->pool.value_scales : memory->pool.key_scales)) + slot % PAGE;
    }
    float number(int64_t layer, int64_t head, int64_t slot, bool value, int64_t d) const {
        if (in_block(slot)) return coded_number(layer, head, slot, value, d);
        const Kind kind = memory->pool.kind;
        const uint8_t* at = place(layer, head, slot, value) + d * bytes_of(kind);
        return kind == I8 ? float(int8_t(*at)) * *scale(layer, head, slot, value) : as_float(at, kind);
    }
    // A byte holds the codes of channels d, d + size * bits / 8 ...; keys have a grid for each channel, values for each slot.
    float coded_number(int64_t layer, int64_t head, int64_t slot, bool value, int64_t d) const {
        const Pool& p = block->pool;
        if (p.kind == THIN) return thin_number(layer, head, slot, value, d);
        const int64_t part = Memory::row_bytes(p), each = bytes_of(p.numbers), at = (value ? slot % PAGE : d) * each;
        const uint8_t byte = place(layer, head, slot, value)[d % part], *own = unit(layer, head, slot);
        const int bits = bits_of(p.kind);
        const float scale = as_float(own + (value ? p.value_scales : p.key_scales) + at, p.numbers);
        float x = float(byte >> d / part * bits & ((1 << bits) - 1)) * scale + as_float(own + (value ? p.value_zeros : p.key_zeros) + at, p.numbers);
        const auto number = [&](int64_t offset, int64_t i) { return as_float(own + offset + i * each, p.numbers); };
        for (int64_t j = 0; j < p.rank; j++)
            x += number(value ? p.value_left : p.key_left, j * PAGE + slot % PAGE) * number(value ? p.value_right : p.key_right, j * p.size + d);
        for (int64_t i = 0; i < p.outliers; i++) {
            const int64_t entry = value ? slot % PAGE * p.outliers + i : i * p.size + d;
            if (own[(value ? p.value_places : p.key_places) + entry] == (value ? d : slot % PAGE)) x += number(value ? p.value_outliers : p.key_outliers, entry);
        }
        return x;
    }
    float thin_number(int64_t layer, int64_t head, int64_t slot, bool value, int64_t d) const {
        const Pool& p = block->pool;
        const uint8_t* own = unit(layer, head, slot);
        const int64_t each = bytes_of(p.numbers);
        if (value) return as_float(place(layer, head, slot, true) + d * each, p.numbers);
        for (int64_t i = 0; i < p.kept; i++)
            if (own[p.channels + i] == d) return as_float(own + (slot % PAGE * p.kept + i) * each, p.numbers);
        return 0.0f;
    }
    uint8_t* unit(int64_t layer, int64_t head, int64_t slot) const {
        const Pool& p = pool_of(slot);
        const size_t own = size_t(lane(layer, head)), page = size_t(slot / PAGE);
        const int64_t id = in_block(slot) ? encoded[own * size_t(encoded_per_lane) + page] : pages[own * size_t(per_lane) + page - size_t(encoded_per_lane)];
        const int64_t unit = lanes == 0 ? (id * p.layers + layer) * p.kv_heads + head : lanes == 1 ? id * p.kv_heads + head : id;
        return p.data + unit / p.per_block * p.block_bytes + unit % p.per_block * p.unit_bytes;
    }
    int64_t rows() const { return chain + int64_t(nodes.size()); }
    int64_t last_slot(int64_t lane) const { return lengths[size_t(lane)] + rows(); }

    vector<int32_t> path(int64_t node) const {
        vector<int32_t> found;
        for (int64_t at = node; at >= 0; at = nodes[size_t(at)].parent) found.insert(found.begin(), int32_t(at));
        return found;
    }
    vector<int32_t> seen_nodes(int64_t node) const {
        if (sees == PATH) return path(node);
        vector<int32_t> found;
        for (int32_t i = 0; i < int32_t(nodes.size()); i++)
            if (sees == ALL || (sees == SOME && i <= node && (i * 7 + node * 5) % 11 < 6)) found.push_back(i);
        return found;
    }
    int32_t position(int64_t row) const {  // rows: the chain, then the nodes
        if (!odd.empty()) return odd[size_t(row)];
        return next + (row < chain ? int32_t(row) : chain + int32_t(path(row - chain).size()) - 1);
    }
    // Slots that a row sees, in text order.
    vector<Slot> seen(int64_t row, int64_t layer, int64_t head, int64_t window, bool all = false) const {
        const int64_t own = lane(layer, head), length = lengths[size_t(own)], at = position(row);
        vector<Slot> found;
        int64_t index = 0;
        const auto see = [&](int64_t slot, int64_t position) {
            const bool in_layers = !window || position > at - window, in_own = !recent || position < sinks || position > at - recent;
            if (all || (in_layers && in_own)) found.push_back({slot, position, index});
            index++;
        };
        for (int64_t i = 0; i < length; i++) see(i, positions.empty() ? i : positions[size_t(own)][size_t(i)]);
        for (int64_t i = 0; i < chain && i <= row; i++) see(length + i, position(i));
        if (row < chain) return found;
        for (int32_t node : seen_nodes(row - chain)) see(length + chain + node, position(chain + node));
        return found;
    }
    // By how many positions a row's queries turn back for sinks.
    int64_t gone(int64_t row) const { return recent ? std::max<int64_t>(0, position(row) + 1 - sinks - recent) : 0; }
    // Whether a query reads what the row would see there without windows.
    bool reads(int64_t row, int64_t query_head, int64_t share, int64_t index) const {
        if (!apart) return true;
        const uint64_t head = uint64_t(apart > 1 ? query_head : query_head / share);
        uint64_t x = uint64_t(row) * 1000003 + head * 8191 + uint64_t(index) * 131 + uint64_t(density * 4096);
        x = (x ^ x >> 15) * 0x9e3779b97f4a7c15u;
        return double(x >> 40) < density * 0x1p24;
    }
};

void fill_codes(Text& text, Random& random, float spread) {
    const Pool& p = text.block->pool;
    const auto put = [&](uint8_t* unit, int64_t offset, int64_t count, float middle, float about) {
        for (int64_t i = 0; i < count; i++) keep_float(unit + offset + i * bytes_of(p.numbers), p.numbers, middle + about * random.normal());
    };
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.kv_heads; head++)
            for (int64_t page = 0; page < text.encoded_per_lane; page++) {
                uint8_t* unit = text.unit(layer, head, page * PAGE);
                if (p.kind == THIN) {
                    put(unit, 0, PAGE * p.kept, 0.0f, spread), put(unit, p.values, PAGE * p.size, 0.0f, 1.0f);
                    for (int64_t i = 0; i < p.kept; i++) unit[p.channels + i] = uint8_t(i < p.kept / 2 ? i : i + 3);
                    continue;
                }
                for (int64_t i = 0; i < p.key_scales; i++) unit[i] = uint8_t(random.below(256));
                put(unit, p.key_scales, p.size, 0.2f * spread, 0.05f * spread), put(unit, p.key_zeros, p.size, -1.5f * spread, 0.3f * spread);
                put(unit, p.value_scales, PAGE, 0.2f, 0.05f), put(unit, p.value_zeros, PAGE, -1.5f, 0.3f);
                put(unit, p.key_left, p.rank * PAGE, 0.0f, 1.0f), put(unit, p.key_right, p.rank * p.size, 0.0f, 0.2f * spread);
                put(unit, p.value_left, p.rank * PAGE, 0.0f, 1.0f), put(unit, p.value_right, p.rank * p.size, 0.0f, 0.2f);
                put(unit, p.key_outliers, p.outliers * p.size, 0.0f, spread), put(unit, p.value_outliers, p.outliers * PAGE, 0.0f, 1.0f);
                for (int64_t i = 0; i < p.outliers * p.size; i++) unit[p.key_places + i] = uint8_t(random.below(PAGE));
                for (int64_t i = 0; i < p.outliers * PAGE; i++) unit[p.value_places + i] = uint8_t(random.below(p.size));
            }
}

void fill(Text& text, Random& random, float spread, int64_t from = 0) {
    const Pool& p = text.memory->pool;
    fill_codes(text, random, spread);
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.kv_heads; head++)
            for (int64_t slot = std::max<int64_t>(from, PAGE * text.encoded_per_lane); slot < text.last_slot(text.lane(layer, head)); slot++)
                for (bool value : {false, true}) {
                    vector<float> numbers;
                    for (int64_t d = 0; d < p.size; d++) numbers.push_back(random.normal() * (value ? 1.0f : spread));
                    uint8_t* to = text.place(layer, head, slot, value);
                    if (p.kind == I8)
                        encode(reinterpret_cast<const uint8_t*>(numbers.data()), F32, p.size, reinterpret_cast<int8_t*>(to), text.scale(layer, head, slot, value));
                    for (int64_t d = 0; d < p.size && p.kind != I8; d++) keep_float(to + d * bytes_of(p.kind), p.kind, numbers[size_t(d)]);
                    for (int64_t d = 0; d < p.size && p.kind == I8; d++)
                        if (!(std::fabs(text.number(layer, head, slot, value, d) - numbers[size_t(d)]) <= 0.5001f * *text.scale(layer, head, slot, value))) std::abort();
                }
}

// Rows first..last of a text as attention gets them; chain rows before `first` count as committed if all rows are of the chain.
struct Part {
    const Text* text;
    int64_t first, last;
    vector<int32_t> lengths, at, tail_at;
    vector<vector<int32_t>> positions;
    vector<const int32_t*> tables;
    vector<uint64_t> visible;
    vector<uint32_t> picks;
    Seq seq{};

    Part(const Text& t, int64_t from, int64_t to, int32_t words) : text(&t), first(from), last(to), lengths(t.lengths), positions(t.positions) {
        const bool tree_only = from >= t.chain && !t.nodes.empty();
        const int64_t grown = tree_only ? 0 : from;
        for (size_t lane = 0; lane < lengths.size(); lane++) {
            lengths[lane] += int32_t(grown);
            for (int64_t i = 0; i < grown && !positions.empty(); i++) positions[lane].push_back(t.position(i));
        }
        for (const auto& list : positions) tables.push_back(list.data());
        seq.rows = int32_t(to - from);
        seq.chain_rows = int32_t(std::max<int64_t>(0, std::min<int64_t>(to, t.chain) - from));
        seq.tail = tree_only ? int32_t(from) : 0;
        seq.chain = tree_only ? t.chain : seq.chain_rows;
        for (int64_t row = from; row < to; row++) {
            at.push_back(t.position(row));
            if (row < t.chain) continue;
            visible.resize(visible.size() + size_t(words));
            for (int32_t node : t.seen_nodes(row - t.chain)) visible[visible.size() - size_t(words) + size_t(node / 64)] |= uint64_t(1) << node % 64;
        }
        for (int64_t row = tree_only ? 0 : from; row < to; row++) tail_at.push_back(t.key_at < 0 ? t.position(row) : t.key_at);
        seq.words = words;
    }
    Seq made(int32_t place) {
        seq.first = place, seq.lanes = text->lanes, seq.pages_per_lane = text->per_lane, seq.pages = text->pages.data();
        seq.lengths = lengths.data(), seq.at = at.data(), seq.visible = visible.data(), seq.tail_at = tail_at.data();
        seq.positions = tables.empty() ? nullptr : tables.data();
        seq.encoded_per_lane = text->encoded_per_lane, seq.encoded = text->encoded.data(), seq.sinks = text->sinks, seq.recent = text->recent;
        seq.turned = 1;
        return seq;
    }
    // Bits of what the rows read in a layer.
    Picked picked(int64_t layer, int64_t heads, const std::function<bool(const Text*, int64_t, int64_t, int64_t)>& reads) {
        if (!text->apart) return {};
        const int64_t kv_heads = text->memory->pool.kv_heads, share = heads / kv_heads, apart = text->apart;
        Picked made{nullptr, text->per_lane + text->encoded_per_lane, int32_t(apart)};
        picks.assign(size_t((last - first) * kv_heads * apart * made.words), 0);
        for (int64_t row = first; row < last; row++)
            for (int64_t head = 0; head < kv_heads; head++)
                for (const Slot& one : text->seen(row, layer, head, 0, true))
                    for (int64_t g = 0; g < apart; g++)
                        if (reads(text, row, head * share + g, one.index))
                            picks[size_t((((row - first) * kv_heads + head) * apart + g) * made.words + one.slot / 32)] |= 1u << one.slot % 32;
        made.bits = picks.data();
        return made;
    }
};

struct Setting {
    int32_t layer, heads, window;
    Kind q_kind, out_kind;
    bool tiles;
    float scale;
    Pool block{};                  // without data where nothing is encoded
    vector<double> frequencies{};  // by which queries turn back for sinks; none: they do not turn
    float softcap = 0;
    vector<float> sink_logits{};   // of query heads; none: no such scores
};

// Numbers of rows [heads * size], as floats of what was written.
using Result = vector<vector<float>>;
struct Queries {
    std::function<float(const Text*, int64_t row, int64_t column)> number;
    std::function<bool(const Text*, int64_t row, int64_t query_head, int64_t index)> reads;

    float operator()(const Text* text, int64_t row, int64_t column) const { return number(text, row, column); }
};

struct Buffer {
    vector<uint8_t> bytes;
    Rows rows{};
    Buffer(int64_t count, int64_t cols, Kind kind, bool tiles) {
        rows = {nullptr, count, cols, tiles ? 0 : cols * bytes_of(kind), kind};
        bytes.assign(size_t(rows.size()), 0xff);  // exactly as large as reported: sanitizers see any byte beyond
        rows.data = bytes.data();
    }
};

// Statistics of one part's layer, [kv heads][slots], then those of each node row.
struct Noted {
    size_t part;
    int32_t since;
    bool low;
    int64_t slots = 0;
    vector<double> numbers{};
};

Result attended(const Pool& pool, const Setting& setting, vector<Part>& parts, const Queries& queries, const AttendChoices& choices, int workers,
                Noted* noted = nullptr) {
    vector<Seq> seqs;
    int32_t total = 0;
    for (Part& part : parts) {
        seqs.push_back(part.made(total));
        total += int32_t(part.last - part.first);
    }
    const int64_t cols = int64_t(setting.heads) * pool.size;
    Buffer q(total, cols, setting.q_kind, false), out(total, cols, setting.out_kind, setting.tiles);
    const int64_t half = int64_t(setting.frequencies.size());
    vector<float> far(size_t(2 * total * half));
    int64_t r = 0;
    for (const Part& part : parts)
        for (int64_t row = part.first; row < part.last; row++, r++) {
            for (int64_t k = 0; k < half; k++) {
                const double angle = -double(part.text->gone(row)) * setting.frequencies[size_t(k)];
                far[size_t(r * half + k)] = float(std::cos(angle)), far[size_t((total + r) * half + k)] = float(std::sin(angle));
            }
            for (int64_t c = 0; c < cols; c++) keep_float(q.rows.at(r, c), setting.q_kind, queries(part.text, row, c));
        }
    Watched watched{};
    vector<double> chain, nodes;  // of all layers, exactly as large as reported
    if (noted) {
        const Seq& seq = seqs[noted->part];
        noted->slots = *std::max_element(parts[noted->part].lengths.begin(), parts[noted->part].lengths.end()) + seq.tail + seq.rows;
        const size_t block = size_t(pool.layers * pool.kv_heads * noted->slots);
        chain.resize(block), nodes.resize(block * size_t(seq.rows - seq.chain_rows));
        watched = {chain.data(), nodes.data(), nullptr, noted->slots, int32_t(noted->part), noted->since, noted->low ? LOW : MASS, 0, 1.0f, 0};
    }
    vector<Picked> picked;
    bool sparse = false;
    for (Part& part : parts) {
        picked.push_back(part.picked(setting.layer, setting.heads, queries.reads));
        sparse = sparse || picked.back().bits;
    }
    const AttendJob job{seqs.data(), int64_t(seqs.size()), pool, setting.block, setting.layer, setting.heads, setting.window, q.rows, out.rows,
                        setting.scale, setting.softcap, &watched, noted != nullptr, half ? far.data() : nullptr, half, sparse ? picked.data() : nullptr,
                        setting.sink_logits.empty() ? nullptr : setting.sink_logits.data()};
    static Attention memory;
    AttendPlan plan = plan_attention(seqs.data(), job.count, pool, setting.heads, choices);
    plan.ends = noted ? total : 0;
    memory.prepare(ATTEND, plan, setting.heads, workers);
    set_threads(workers);
    run([&](int worker, int all) { attend(ATTEND, job, plan, memory, worker, all); });
    if (noted) {
        const size_t some = size_t(pool.kv_heads * noted->slots), block = size_t(pool.layers) * some;
        bool own = true;
        for (size_t i = 0; i < chain.size(); i++) own = own && (i / some == size_t(setting.layer) || chain[i] == 0);
        check(own, "statistics of another layer");
        noted->numbers.assign(chain.begin() + setting.layer * some, chain.begin() + (setting.layer + 1) * some);
        for (size_t node = 0; node * block < nodes.size(); node++)
            noted->numbers.insert(noted->numbers.end(), nodes.begin() + node * block + setting.layer * some, nodes.begin() + node * block + (setting.layer + 1) * some);
    }
    Result result;
    for (int64_t i = 0; i < total; i++) {
        result.emplace_back();
        for (int64_t c = 0; c < cols; c++) result.back().push_back(as_float(out.rows.at(i, c), setting.out_kind));
        if (!setting.tiles) continue;
        for (int64_t c = cols; c * bytes_of(setting.out_kind) % LINE; c++)  // the last line's end is zero
            if (as_float(out.rows.at(i, cols - 1) + (c - cols + 1) * bytes_of(setting.out_kind), setting.out_kind) != 0) result.back()[0] = NAN;
    }
    return result;
}

// What a text's statistics lie between: weights may fall on either side of 1 / t.
struct Bounds {
    double least = 0, most = 0;
};
// Whether products are added in pairs of bf16.
bool pairs(const Setting& setting, const Pool& pool) {
    return PAIRS && setting.q_kind == BF16 && setting.out_kind == BF16 && pool.kind == BF16 && !setting.block.data;
}

// The weights that a query gives to the slots that its row sees; 0 to those that it does not read.
vector<double> weights_of(const Setting& setting, const Text& text, int64_t row, int64_t h, const vector<Slot>& slots, const Queries& queries) {
    const Pool& p = text.memory->pool;
    const int64_t size = p.size, share = setting.heads / p.kv_heads, half = int64_t(setting.frequencies.size());
    vector<double> q, far, scores;
    for (int64_t d = 0; d < size; d++) {
        uint8_t held[4];
        keep_float(held, setting.q_kind, queries(&text, row, h * size + d));
        q.push_back(as_float(held, setting.q_kind));
    }
    far = q;
    for (int64_t k = 0; k < half; k++) {
        const double angle = -double(text.gone(row)) * setting.frequencies[size_t(k)];
        far[size_t(k)] = q[size_t(k)] * std::cos(angle) - q[size_t(k + half)] * std::sin(angle);
        far[size_t(k + half)] = q[size_t(k + half)] * std::cos(angle) + q[size_t(k)] * std::sin(angle);
    }
    if (pairs(setting, p))  // such queries are bf16; of numbers that lie between two of these, either is right
        for (double& x : far) {
            uint8_t held[4];
            keep_float(held, BF16, float(x));
            x = as_float(held, BF16);
        }
    const double sink = setting.sink_logits.empty() ? -INFINITY : double(setting.sink_logits[size_t(h)]);
    double most = sink;
    for (const Slot& one : slots) {
        double s = 0;
        const vector<double>& mine = text.recent && one.position < text.sinks ? far : q;
        for (int64_t d = 0; d < size; d++) s += mine[size_t(d)] * text.number(setting.layer, h / share, one.slot, false, d);
        s *= setting.scale;
        if (setting.softcap) s = setting.softcap * std::tanh(s / setting.softcap);
        scores.push_back(queries.reads(&text, row, h, one.index) ? s : -INFINITY);
        most = std::max(most, scores.back());
    }
    double total = sink == -INFINITY ? 0 : std::exp(sink - most);
    for (double& s : scores) total += s = s == -INFINITY ? 0 : std::exp(s - most);
    for (double& s : scores) s = total == 0 ? 0 : s / total;
    return scores;
}

vector<Bounds> defined(const Setting& setting, const Text& text, const Queries& queries, const Noted& noted) {
    const Pool& p = text.memory->pool;
    const int64_t share = setting.heads / p.kv_heads, block = p.kv_heads * noted.slots;
    vector<Bounds> result(size_t(block * (1 + int64_t(text.nodes.size()))));
    for (int64_t row = 0; row < text.rows(); row++)
        for (int64_t head = 0; head < p.kv_heads && text.position(row) >= noted.since; head++) {
            const auto slots = text.seen(row, setting.layer, head, setting.window);
            vector<double> means(slots.size());
            for (int64_t h = head * share; h < (head + 1) * share; h++) {
                const vector<double> weights = weights_of(setting, text, row, h, slots, queries);
                for (size_t i = 0; i < slots.size(); i++) means[i] += weights[i] / double(share);
            }
            const int64_t place = row < text.chain ? 0 : row - text.chain + 1;
            for (size_t i = 0; i < slots.size(); i++) {
                Bounds& to = result[size_t(place * block + head * noted.slots + slots[i].slot)];
                const double limit = 1 / double(slots.size());
                to.least += noted.low ? means[i] < limit * 0.9999 : means[i] * 0.9999;
                to.most += noted.low ? means[i] < limit * 1.0001 : means[i] * 1.0001;
            }
        }
    return result;
}

// spread: how far values lie from the result, on average over their weights.
vector<double> defined(const Setting& setting, const Text& text, int64_t row, const Queries& queries, vector<double>* spread) {
    const Pool& p = text.memory->pool;
    const int64_t size = p.size, share = setting.heads / p.kv_heads;
    vector<double> result(size_t(setting.heads * size));
    spread->assign(result.size(), 0);
    for (int64_t h = 0; h < setting.heads; h++) {
        const auto slots = text.seen(row, setting.layer, h / share, setting.window);
        const vector<double> weights = weights_of(setting, text, row, h, slots, queries);
        const auto value = [&](size_t i, int64_t d) { return text.number(setting.layer, h / share, slots[i].slot, true, d); };
        for (size_t i = 0; i < slots.size(); i++)
            for (int64_t d = 0; d < size; d++) result[size_t(h * size + d)] += weights[i] * value(i, d);
        for (size_t i = 0; i < slots.size(); i++)
            for (int64_t d = 0; d < size; d++) (*spread)[size_t(h * size + d)] += weights[i] * std::fabs(value(i, d) - result[size_t(h * size + d)]);
    }
    return result;
}

template <class T>
bool same_bits(const vector<T>& a, const vector<T>& b) {
    return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

// The same row decoded as the last of a plain text: every slot of its path is copied in order into fresh pages and committed, but for
// the encoded pages, which are the same.
Text flattened(const Text& text, int64_t row) {
    Text flat(*text.memory, *text.block, text.lanes);
    const Pool& p = text.memory->pool;
    flat.room(*std::max_element(text.lengths.begin(), text.lengths.end()) - PAGE * text.encoded_per_lane + text.rows() + 2);
    flat.encoded = text.encoded, flat.encoded_per_lane = text.encoded_per_lane, flat.sinks = text.sinks, flat.recent = text.recent;
    flat.apart = text.apart, flat.density = text.density, flat.chain = 1;
    flat.odd = {text.position(row)};
    const bool positions = !text.positions.empty() || !text.odd.empty() || text.sees != PATH;
    if (positions) flat.positions.resize(size_t(flat.count));
    for (int64_t layer = 0; layer < p.layers; layer++)
        for (int64_t head = 0; head < p.kv_heads; head++) {
            const auto slots = text.seen(row, layer, head, 0, true);
            const size_t lane = size_t(flat.lane(layer, head));
            flat.lengths[lane] = int32_t(slots.size()) - 1;
            for (size_t i = 0; i < slots.size(); i++)
                for (bool value : {false, true}) {
                    if (text.in_block(slots[i].slot)) continue;
                    std::memcpy(flat.place(layer, head, int64_t(i), value), text.place(layer, head, slots[i].slot, value), size_t(p.size * bytes_of(p.kind)));
                    if (p.kind == I8) *flat.scale(layer, head, int64_t(i), value) = *text.scale(layer, head, slots[i].slot, value);
                }
            flat.key_at = int32_t(slots.back().position);
            if (!positions || !flat.positions[lane].empty()) continue;
            for (size_t i = 0; i + 1 < slots.size(); i++) flat.positions[lane].push_back(int32_t(slots[i].position));
        }
    return flat;
}

void grow_tree(Text& text, Random& random, int64_t count) {
    const bool fan = random.chance(0.2), straight = random.chance(0.2);
    for (int64_t i = 0; i < count; i++) {
        const int64_t recent = std::max<int64_t>(-1, i - 6);
        text.nodes.push_back({int32_t(fan ? -1 : straight ? i - 1 : recent + random.below(i - recent))});
    }
}

struct World {
    Random random;
    Setting setting{};
    Memory memory, block;
    vector<Text> texts;
    int32_t words = 1;
    uint64_t seed;

    static Memory memory_for(Random& random, Setting& setting, uint64_t number) {
        const int32_t size = random.of({8, 8, 24, 48, 64, 64, 80, 128}), kv_heads = random.of({1, 2}), share = random.of({1, 2, 3, 4, 7});
        setting = {int32_t(random.below(2)), kv_heads * share, random.chance(0.3) ? int32_t(1 + random.below(700)) : 0, random.of({F32, BF16}),
                   random.of({F32, BF16}), random.chance(0.5), 1.0f / std::sqrt(float(size))};
        Kind kind = random.of({F32, BF16});
        if (number % 4 == 2) kind = I8;
        if (random.chance(0.3)) setting.softcap = random.of({0.5f, 3.0f, 50.0f});
        Random own{std::mt19937_64(~number)};  // so that the rest of a world does not depend on these
        for (int32_t h = 0; number % 3 && h < setting.heads; h++) setting.sink_logits.push_back(own.of({1.0f, 1.0f, 20.0f}) * own.normal());
        if (number % 2) kind = setting.q_kind = setting.out_kind = BF16;  // as in most engines; such products may be added in pairs
        const int32_t half = random.of({size / 2, size / 2, 2, 0});
        for (int32_t k = 0; k < half; k++) setting.frequencies.push_back(std::pow(100.0, -double(k) / half));
        return Memory(random, 1500, 2, kv_heads, size, kind);
    }
    static Memory block_for(Random& random, Setting& setting, const Pool& exact, Kind kind) {
        Memory made(random, random.chance(0.5) ? 500 : 0, exact.layers, exact.kv_heads, exact.size, kind, random.of({F32, BF16}));
        if (made.blocks.empty()) made.pool.data = nullptr;
        setting.block = made.pool;
        return made;
    }

    explicit World(uint64_t number) : random{std::mt19937_64(number)}, memory(memory_for(random, setting, number)), block(block_for(random, setting, memory.pool, number % 4 == 1 ? I2 : number % 4 == 3 ? THIN : I4)), seed(number) {
        const int64_t count = 1 + random.below(3);
        for (int64_t i = 0; i < count; i++) {
            texts.push_back(text(setting.block.data ? random.of({0, 1, 2, 2}) : random.of({0, 0, 1, 2})));
            if (texts.back().lanes == 0 && random.chance(0.6)) share_prefix();
        }
        for (const Text& t : texts) words = std::max(words, int32_t((t.nodes.size() + 63) / 64));
    }

    int32_t length() {
        const int64_t base = random.of<int64_t>({0, 1, 32, 64, 480, 512, 544, 1024, 1536});
        return int32_t(std::max<int64_t>(0, base + random.below(5) - 2));
    }

    void tail_of(Text& t) {
        t.chain = int32_t(random.of<int64_t>({1, 1, 2, 5, 40, 70}));
        if (random.chance(0.6)) grow_tree(t, random, random.of<int64_t>({1, 3, 8, 30, 40, 70}));
        t.sees = random.of({PATH, PATH, PATH, SOME, NONE, ALL});
        int32_t longest = *std::max_element(t.lengths.begin(), t.lengths.end());
        t.next = longest;
        if (random.chance(0.4)) t.sinks = random.of({0, 1, 4, 33, 200, 600}), t.recent = int32_t(1 + random.below(random.of({30, 600})));
        if (random.chance(0.4)) t.apart = random.chance(0.5) ? setting.heads / memory.pool.kv_heads : 1, t.density = random.of({0.005, 0.1, 0.5, 0.97});
        const bool evicted = t.lanes != 0 || !random.chance(0.7);
        if (evicted) t.next += int32_t(random.below(100));
        if (evicted && random.chance(0.5))
            for (int64_t row = 0; row < t.rows(); row++) t.odd.push_back(int32_t(random.below(random.chance(0.5) ? 40 : t.next + 100)));
        if (!evicted) return;
        for (int32_t length : t.lengths) {
            t.positions.emplace_back();
            for (int32_t slot = 0, at = t.next - length; slot < length; slot++) {  // distinct, ascending, some left out at the beginning
                t.positions.back().push_back(slot < length / 2 ? slot : at + slot);
            }
        }
    }

    Text text(int32_t kind) {
        Text t(memory, block, kind);
        const bool encoded = setting.block.data && kind && random.chance(0.8);
        const int32_t least = encoded ? int32_t(random.below(4 * PAGE)) : 0, one = length();
        for (int32_t& l : t.lengths) l = least + (random.chance(0.5) ? one : length());
        tail_of(t);
        if (encoded)
            t.encoded_per_lane = std::min<int32_t>(20, *std::min_element(t.lengths.begin(), t.lengths.end()) / PAGE - int32_t(random.below(2)));
        t.encoded_per_lane = std::max(0, t.encoded_per_lane);
        t.room(t.last_slot(std::max_element(t.lengths.begin(), t.lengths.end()) - t.lengths.begin()));
        fill(t, random, random.of({1.0f, 3.0f}));
        return t;
    }

    // Others that list the first pages of the last text, whose slots there are committed.
    void share_prefix() {
        const size_t origin = texts.size() - 1;
        const int64_t others = 1 + random.below(3);
        for (int64_t i = 0; i < others; i++) {
            const int64_t shared = texts[origin].lengths[0] / PAGE;
            Text t(memory, block, 0);
            t.lengths[0] = int32_t(shared * PAGE + random.below(90));
            tail_of(t);
            t.room(t.last_slot(0), &texts[origin], shared);
            fill(t, random, 1.0f, shared * PAGE);
            texts.push_back(std::move(t));
        }
    }
};

vector<Part> whole(const World& world) {
    vector<Part> parts;
    for (const Text& t : world.texts) parts.emplace_back(t, 0, t.chain + int64_t(t.nodes.size()), world.words);
    return parts;
}

// The texts' rows cut into steps at random places, as chunked prefill and drafters with several levels cut them.
vector<vector<Part>> cut(World& world) {
    vector<vector<Part>> steps;
    for (const Text& t : world.texts) {
        const int64_t end = t.chain + int64_t(t.nodes.size());
        for (int64_t from = 0, to, step = 0; from < end; from = to, step++) {
            to = std::min<int64_t>(end, from + 1 + world.random.below(40));
            if (from < t.chain && to > t.chain && from > 0) to = t.chain;  // a chain with nodes begins where the committed slots end
            if (t.sees == ALL && to > t.chain) to = end;
            if (int64_t(steps.size()) <= step) steps.emplace_back();
            steps[size_t(step)].emplace_back(t, from, to, world.words);
        }
    }
    return steps;
}

void test_world(uint64_t seed) {
    World world(seed);
    const Setting& setting = world.setting;
    const Pool& pool = world.memory.pool;
    const std::string name = "world " + std::to_string(seed) + " (size " + std::to_string(pool.size) + ", window " + std::to_string(setting.window) + "): ";
    vector<std::pair<const Text*, vector<float>>> questions;
    for (const Text& t : world.texts) {
        questions.push_back({&t, {}});
        for (int64_t i = 0; i < (t.chain + int64_t(t.nodes.size())) * setting.heads * pool.size; i++) questions.back().second.push_back(world.random.normal());
    }
    const int64_t share = setting.heads / pool.kv_heads;
    const Queries queries{[&](const Text* text, int64_t row, int64_t column) {
                              for (const auto& [whose, numbers] : questions)
                                  if (whose == text) return numbers[size_t(row * setting.heads * pool.size + column)];
                              std::abort();
                          },
                          [&](const Text* text, int64_t row, int64_t head, int64_t index) { return text->reads(row, head, share, index); }};

    AttendChoices plain;
    vector<Part> all = whole(world);
    const Result base = attended(pool, setting, all, queries, plain, 1);

    // against the definition, some rows; and the same rows decoded alone after a committed text
    const double tolerance = setting.out_kind == BF16 ? 0x1p-8 : 0;
    const double weights = pairs(setting, pool) ? 0x1p-8 : 0;  // what rounding changes of a weight at most
    size_t place = 0;
    for (const Text& t : world.texts) {
        const int64_t rows = t.chain + int64_t(t.nodes.size());
        for (int64_t row = 0; row < rows; row++, place++) {
            if (rows > 6 && row && row + 1 < rows && !world.random.chance(6.0 / double(rows))) continue;
            vector<double> spread;
            const vector<double> right = defined(setting, t, row, queries, &spread);
            double worst = 0;
            for (size_t c = 0; c < right.size(); c++) {
                const double off = std::fabs(base[place][c] - right[c]) / (1e-4 + tolerance * std::fabs(right[c]) + weights * spread[c]);
                worst = off <= worst ? worst : std::isnan(off) ? 1e9 : off;  // NaN compares false
            }
            check(worst <= 1, name + "row " + std::to_string(row) + " is off by " + std::to_string(worst) + " tolerances");
            if (world.memory.blocks.size() < 150) continue;
            Text flat = flattened(t, row);
            vector<Part> alone;
            alone.emplace_back(flat, 0, 1, 1);
            const Queries own{[&](const Text*, int64_t, int64_t column) { return queries(&t, row, column); },
                              [&](const Text*, int64_t, int64_t head, int64_t index) { return queries.reads(&t, row, head, index); }};
            check(same_bits(attended(pool, setting, alone, own, plain, 1)[0], base[place]), name + "row " + std::to_string(row) + " as committed text");
            for (int32_t page : flat.pages)
                if (flat.lanes == 0) world.memory.blocks.push_back(page);
        }
    }

    const auto same_as_base = [&](const Result& got, const vector<Part>& parts, const std::string& what) {
        size_t at = 0;
        bool good = true;
        for (const Part& part : parts) {
            size_t from = 0;
            for (const Text& t : world.texts) {
                if (&t == part.text) break;
                from += size_t(t.chain) + t.nodes.size();
            }
            for (int64_t row = part.first; row < part.last; row++) good = same_bits(got[at++], base[from + size_t(row)]) && good;
        }
        check(good, name + what);
    };
    for (int workers : {1, 2, 3}) {
        AttendChoices choices{workers, world.random.of({0, 16, 1000}), world.random.of({1, 16, 100, 256}), int32_t(world.random.below(2))};
        same_as_base(attended(pool, setting, all, queries, choices, workers), all, "choices of " + std::to_string(workers) + " workers");
        choices.few = 1000, choices.shared = 1;
        same_as_base(attended(pool, setting, all, queries, choices, workers), all, "shared groups, " + std::to_string(workers) + " workers");
    }
    for (const Text& t : world.texts) {
        vector<Part> one;
        one.emplace_back(t, 0, t.chain + int64_t(t.nodes.size()), world.words);
        same_as_base(attended(pool, setting, one, queries, plain, 1), one, "a text alone");
    }
    const size_t which = size_t(world.random.below(int64_t(all.size())));
    const Text& seen = *all[which].text;
    for (bool low : {false, true}) {
        const int32_t since = seen.next + int32_t(world.random.below(4)) - 1;
        Noted first{which, since, low};
        for (int workers : {1, 2, 3}) {
            Noted noted{which, since, low};
            AttendChoices choices{workers, world.random.of({0, 16, 1000}), world.random.of({1, 16, 100, 256}), 1};
            same_as_base(attended(pool, setting, all, queries, choices, workers, &noted), all, "watched");
            if (workers == 1) first = noted;
            check(same_bits(noted.numbers, first.numbers), name + "statistics by " + std::to_string(workers) + " workers");
        }
        vector<Part> one;
        one.emplace_back(seen, 0, seen.chain + int64_t(seen.nodes.size()), world.words);
        Noted alone{0, since, low};
        attended(pool, setting, one, queries, plain, 1, &alone);
        check(same_bits(alone.numbers, first.numbers), name + "statistics of a text alone");
        const vector<Bounds> right = defined(setting, seen, queries, first);
        bool good = right.size() == first.numbers.size();
        for (size_t i = 0; good && i < right.size(); i++) good = right[i].least - 1e-6 <= first.numbers[i] && first.numbers[i] <= right[i].most + 1e-6;
        check(good, name + (low ? "low weights" : "weights") + " as defined");
    }
    for (vector<Part>& step : cut(world)) same_as_base(attended(pool, setting, step, queries, plain, 2), step, "cut into steps");
}

// ---- speed ----

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double best_of(int times, const std::function<void()>& work) {
    double best = 1e9;
    for (int i = 0; i < times; i++) {
        const double start = seconds();
        work();
        best = std::min(best, seconds() - start);
    }
    return best;
}

double bandwidth(int times) {
    const int64_t count = 512 << 18;  // floats in 512 MiB
    static const Block block(size_t(count) * 4, 0);
    const float* data = reinterpret_cast<const float*>(block.data);
    [[maybe_unused]] static volatile float sink[64];
    return double(count) * 4 / best_of(times, [&] {
        run([&](int worker, int workers) {
            const Share share(count / 64, worker, workers);
            Vec sums[8];
            for (Vec& x : sums) x = zero();
            for (int64_t i = share.first; i < share.last; i++)
                for (int j = 0; j < 64 / Vec::N; j++) sums[j] = sums[j] + load(data + i * 64 + j * Vec::N);
            for (int j = 1; j < 8; j++) sums[0] = sums[0] + sums[j];
            sink[worker] = sum(sums[0]);
        });
    });
}

double arithmetic(int times) {
    [[maybe_unused]] static volatile float sink[64];
    const int64_t rounds = 2000000;
    int all = 1;
    const double time = best_of(times, [&] {
        run([&](int worker, int workers) {
            all = workers;
            Vec x[12];
            for (Vec& one : x) one = set1(float(worker));
            for (int64_t i = 0; i < rounds; i++)
                for (Vec& one : x) one = fma(one, set1(0.5f), set1(1.0f));
            for (int j = 1; j < 12; j++) x[0] = x[0] + x[j];
            sink[worker] = sum(x[0]);
        });
    });
    return 2.0 * 12 * Vec::N * double(rounds) * all / time;
}

struct Bench {
    Random random{std::mt19937_64(7)};
    Memory memory;
    vector<Text> texts;
    vector<Seq> seqs;
    vector<Part> parts;
    Setting setting{0, 32, 0, BF16, BF16, true, 0.125f};
    int32_t layers;

    // `count` texts of `length` committed tokens, all in common but the last slots, each with `rows` chain rows
    Bench(int64_t count, int32_t length, int32_t rows, int32_t layers_)
        : memory(random, (length + rows) / PAGE + 8 + count * (rows / PAGE + 3), layers_, 8, 64, BF16), layers(layers_) {
        uint32_t x = 1;
        for (size_t i = 0; i < memory.size; i += 2) keep_float(memory.pool.data + i, BF16, float(int32_t(x = x * 1664525 + 1013904223)) * 0x1p-31f);
        texts.reserve(size_t(count));
        for (int64_t i = 0; i < count; i++) {
            texts.emplace_back(memory, memory, 0);
            texts.back().lengths[0] = texts.back().next = length;
            texts.back().chain = rows;
            texts.back().room(length + rows, texts.data(), i ? length / PAGE : 0);
        }
        int32_t place = 0;
        parts.reserve(size_t(count));
        for (Text& t : texts) {
            parts.emplace_back(t, 0, t.chain, 1);
            seqs.push_back(parts.back().made(place));
            place += t.chain;
        }
    }

    double time(int workers, int times, int32_t shared = 1) {
        const int64_t total = int64_t(seqs.size()) * texts[0].chain;
        Buffer q(total, 32 * 64, BF16, false), out(total, 32 * 64, BF16, true);
        for (int64_t r = 0; r < total; r++)
            for (int64_t c = 0; c < 32 * 64; c++) keep_float(q.rows.at(r, c), BF16, random.normal());
        AttendChoices choices;
        choices.workers = workers, choices.shared = shared;
        Attention scratch;
        set_threads(workers);
        return best_of(times, [&] {
            const AttendPlan plan = plan_attention(seqs.data(), int64_t(seqs.size()), memory.pool, 32, choices);
            scratch.prepare(ATTEND, plan, 32, workers);
            run([&](int worker, int all) {
                for (int32_t layer = 0; layer < layers; layer++) {
                    const AttendJob job{seqs.data(), int64_t(seqs.size()), memory.pool, Pool{}, layer, 32, 0, q.rows, out.rows, setting.scale, 0};
                    attend(ATTEND, job, plan, scratch, worker, all);
                    barrier();
                }
            });
        }) / layers;
    }
};

void bench(const std::string& only) {
    const auto wanted = [&](const char* name) { return only.empty() || only == name; };
    for (int workers : {1, 2}) {
        set_threads(workers);
        const double bytes = bandwidth(8), flops = arithmetic(8);
        std::printf("%d threads, %zu floats a register: reads %.1f GB/s, float32 %.0f GFLOP/s\n", workers, size_t(Vec::N), bytes / 1e9, flops / 1e9);
        if (wanted("cache")) {
            Bench decode(1, 256, 1, 1);
            decode.setting.layer = 0;
            const double time = decode.time(workers, 400) / (9 * 8.0 / workers);
            std::printf("  a page of a kv head in cache: %.0f ns, worth %.0f float32 registers multiplied and added\n", time * 1e9, time * flops / workers / 2 / Vec::N);
        }
        if (wanted("row")) {
            Bench decode(1, 8192, 1, 16);
            const double time = decode.time(workers, 20), rate = 8192.0 * 8 * 64 * 2 * 2 / time;
            std::printf("  1 row, 8192 cached: %.0f us a layer, %.1f GB/s, %.0f %% of the reads\n", time * 1e6, rate / 1e9, 100 * rate / bytes);
        }
        if (wanted("shared")) {
            Bench one(1, 4096, 1, 16), eight(8, 4096, 1, 16);
            const double a = one.time(workers, 20), b = eight.time(workers, 20), c = eight.time(workers, 5, 0);
            std::printf("  4096 cached: one %.0f us a layer, eight sharing %.0f us (%.2f times), not shared %.0f us\n", a * 1e6, b * 1e6, b / a, c * 1e6);
        }
        for (int32_t length : {0, 4096}) {
            if (!wanted("prefill")) break;
            Bench prefill(1, length, 512, 2);
            const double time = prefill.time(workers, 10), work = 4.0 * 32 * 64 * 512 * (length + 513 / 2.0);
            std::printf("  512 rows behind %d: %.2f ms a layer, %.0f GFLOP/s, %.0f %% of float32\n", length, time * 1e3, work / time / 1e9, 100 * work / time / flops);
        }
    }
}

}  // namespace

int main(int count, char** words) {
    if (count > 1 && !std::strcmp(words[1], "bench")) {
        bench(count > 2 ? words[2] : "");
        return 0;
    }
    const uint64_t first = count > 1 ? std::strtoull(words[1], nullptr, 10) : 1, worlds = count > 2 ? std::strtoull(words[2], nullptr, 10) : 24;
    for (uint64_t seed = first; seed < first + worlds; seed++) test_world(seed);
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
