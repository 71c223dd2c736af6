// The kernels of one instruction set, and their data layouts. No PyTorch here: arguments are pointers.
//
// Bit-exactness: each output element is computed by one sequence of instructions, chosen when the library is loaded. The sequence
// does not depend on the number of rows, on the threads or on other elements.
#pragma once
#include <cstddef>
#include <cstdint>

// Always inlined: otherwise the linker might keep a copy that was compiled for a larger instruction set.
#define INLINE inline __attribute__((always_inline))

namespace redraft {

constexpr int64_t PANEL = 64;  // outputs of a linear layer that are packed together
constexpr int64_t LINE = 64;   // bytes of a row in a tile
constexpr int64_t TALL = 16;   // rows of a tile
constexpr int64_t PAGE = 32;   // slots of a page
constexpr int64_t CONTENDERS = 16;  // tokens so near to the largest sum that numpy decides; ops/native.py
constexpr int64_t MOST_RANKS = 1024;  // of low-rank terms
constexpr int64_t GROUP = 8;   // pages whose keys are attended one after another; groups are merged left to right

// I4, I2, G8: codes with a scale for each group; THIN: numbers of which some columns are missing
enum Kind : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3, G8 = 4, I2 = 5, THIN = 6 };
enum Activation : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4, SIGMOID = 5, QUICK_GELU = 6 };

INLINE constexpr int64_t bytes_of(Kind kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }

// A matrix of activations. stride > 0: element (r, c) is at data + r * stride + c * size. stride == 0: tiles, in which no two rows share
// a cache set. Columns are cut into lines of 64 bytes, the last one padded with zeros, and rows into blocks of 16. Block b is
// [lines][h][64 bytes] with h = min(16, rows - 16 b), and starts at data + 16 b * lines * 64.
struct Rows {
    uint8_t* data;
    int64_t rows, cols, stride;
    Kind kind;

    INLINE int64_t lines() const { return (cols * bytes_of(kind) + LINE - 1) / LINE; }
    INLINE int64_t tall(int64_t r) const { return rows - r / TALL * TALL < TALL ? rows - r / TALL * TALL : TALL; }
    INLINE uint8_t* at(int64_t r, int64_t c) const {
        const int64_t byte = c * bytes_of(kind);
        if (stride) return data + r * stride + byte;
        return data + r / TALL * TALL * lines() * LINE + (byte / LINE * tall(r) + r % TALL) * LINE + byte % LINE;
    }
    INLINE int64_t size() const { return stride ? rows * stride : rows * lines() * LINE; }
};

// A linear layer. A panel is 64 outputs: [steps][64][4 bytes]. A step holds 4 bytes of weights of each output: 1 float32, 2 bf16 or
// 4 int8. Missing ins and outs are zero; ins are padded to whole lines (16 steps). int4: the nibbles of two steps share a byte,
// [steps / 2][64][4 bytes], step 2 i in the low half and 2 i + 1 in the high half, stored as code + 8, or as the code if there are lows.
// gated: a panel holds 32 gate outputs and their 32 up outputs; otherwise outputs are in order.
struct Linear {
    const uint8_t* panels;
    const float* bias;      // [panels * 64] in the order of the panels, or null
    const float* scale;     // int8: [panels * 64]
    const int32_t* sums;    // int8: [panels * 64], the sum of the codes of an output
    const uint16_t *scales, *lows;     // groups: float16 [panels][tops][64], the scale and what is added to code * scale; lows may be null
    const int8_t *factors, *offsets;   // null, or [panels][groups][64]: factors of the scale and of the low of the group's top
    const int32_t* columns; // codes: [outliers], the outlier columns in ascending order
    const float* side;      // [panels][outliers][64], the weights in these columns
    int64_t outs, ins;
    Kind kind;
    int32_t group;          // columns that share a scale, a multiple of 16
    int32_t gated;
    int32_t outliers;
    int32_t per;            // groups of a top: 1 without factors

    INLINE int64_t count() const { return (outs + PANEL - 1) / PANEL; }
    INLINE int64_t steps() const {
        const int64_t per_line = kind == F32 ? 16 : kind == BF16 ? 32 : 64;
        return (ins + per_line - 1) / per_line * 16;
    }
    INLINE int64_t panel_bytes() const { return steps() * PANEL * (kind == I4 ? 2 : 4); }
    INLINE bool grouped() const { return kind == I4 || kind == G8; }
    INLINE int64_t groups() const { return grouped() ? (ins + group - 1) / group : 0; }
    INLINE int64_t tops() const { return (groups() + per - 1) / per; }
    INLINE int64_t offset() const { return lows ? 0 : 8; }  // what stored codes of 4 bits have added
};

// y = x W^T + bias. x: tiles of the kind that Kernels::takes returns. The sum of an element runs over its inputs in order. It is rounded
// with its bias to the kind of y and then, if `add`, added to y (rounded again). If w is gated and an activation is given, y has
// outs / 2 columns and is activation(gate) * up of the rounded halves. best: if not null, y is not written; the `keep` largest (rounded)
// outputs of each row are merged into it, best first, of equal ones the lowest index first.
struct Best {
    float value;
    int32_t index;
};
// What belongs to rows of codes, int8 tiles.
struct Coded {
    float* scale;     // [rows]
    float* factors;   // groups: [rows][groups], of the scale: 1, 1/2, 1/4, 1/8 or 1/16
    int32_t* sums;    // groups: [rows][groups], of the codes; with lows the bits of a float32, the sum times its factor
    float* outliers;  // [rows][outliers], the numbers of a row in the outlier columns of the weights

    INLINE Coded from(const Linear& w, int64_t row) const {
        return {scale + row, factors + row * w.groups(), sums + row * w.groups(), outliers + row * w.outliers};
    }
};
struct LinearJob {
    Linear w;
    Rows x;
    Coded codes;
    Rows y;
    Kind rounded;           // the kind to round to: y may be float32 tiles of bf16 numbers
    Activation activation;
    int32_t add;
    Best* best;             // [rows][keep]
    int32_t keep;
    float limit = __builtin_inff(), shift = 0;  // gated with an activation: gates are at most limit, ups within it, and shift is added to these

    INLINE bool bounded() const { return limit != __builtin_inff() || shift != 0; }
};

// y = the norm of x; or y = y + factor * norm, each step rounded.
struct NormJob {
    Rows x, y;              // any layouts; y may have another kind (float32 tiles of bf16 numbers)
    const uint8_t *weight, *bias;  // weight: of the kind `gains`, null: x is taken without a norm; bias: of the kind of x, or null
    float eps;
    int32_t rms;            // 1: RMS norm, 0: LayerNorm
    Kind rounded;           // the kind to which numbers of y are rounded
    Kind gains;
    float factor = 1;
    int32_t add = 0;
};

// What is added to the outputs first..first + outs of a linear layer: (x a^T) b. a [rank][ins]; b [rank][outs].
struct LowRank {
    const uint8_t *a, *b;
    int64_t ins, outs, first;
    int32_t rank;  // at most MOST_RANKS
    Kind kind;     // of a and b
};

// The experts of rows: the `keep` largest of the softmax of x, of equal ones the lowest index first. chosen: [rows][keep], by ascending
// index; values: their chances, divided by the sum of these from the largest on if `renormalise`, then rounded.
struct RouteJob {
    Rows x;                 // float32, strided
    Best* chosen;
    int32_t keep, renormalise;
    Kind rounded;
};

// The rows of one sequence and its pages; everything that does not depend on the layer.
struct Seq {
    int32_t first, rows, chain_rows;  // rows of the batch; the first chain_rows are chain rows, the others nodes
    int32_t tail, chain;              // tentative rows written before; chain rows of the whole tail
    int32_t lanes;                    // 0 shared, 1 one for each layer, 2 one for each layer and kv head
    int32_t pages_per_lane, words;    // page ids of a lane; words of visibility of a node row
    int32_t encoded_per_lane;         // pages of codes, before `pages`
    int32_t sinks, recent;            // a row sees keys at positions < sinks or > its own - recent; recent 0: no such window
    int32_t turned;                   // 1: keys at positions < sinks are scored with the rotated query
    const int32_t* pages;             // [lanes][pages_per_lane]
    const int32_t* encoded;           // [lanes][encoded_per_lane]
    const int32_t* lengths;           // [lanes] committed slots
    const int32_t* const* positions;  // [lanes] -> position of every committed slot, or null: slot i holds position i
    const uint64_t* visible;          // [node rows][words]: tentative nodes that the row sees
    const int32_t* at;                // [rows] positions of the rows
    const int32_t* tail_at;           // [tail + rows] positions of the tentative slots
    const uint8_t* windowed;          // [layers][kv_heads] whether the window holds, or null: everywhere
    const float* const* logs;         // [lanes] -> logarithm of the number of tokens of every committed slot, or null: all 0
    const int32_t* slots;             // [rows] committed slots that the rows write, ascending, or null: the slots after the tail

    // Slots of a lane with `length` committed ones, tentative ones included.
    INLINE int64_t held(int64_t length) const { return slots ? length : length + tail + rows; }
};

// Where units are stored: unit u is at data + u / per_block * block_bytes + u % per_block * unit_bytes, and holds keys [32][size], then
// values. I8: codes of vectors (redraft/kv/quantization/int8.py) with scales float32 [32]. I4, I2: codes [32][size / 2 or 4], of keys by
// channel and of values by slot (redraft/kv/quantization/kivi.py), with scales and zeros of kind `numbers`; `rank` pairs of factors and
// `outliers` numbers of each group are added to what they mean (redraft/kv/quantization/gear.py). With `balance` keys have a grid by slot
// too, and what their codes mean is times the factor of the channel (redraft/kv/quantization/mikv.py). THIN: keys [32][kept] of the channels
// that `channels` names, and values [32][size], of kind `numbers` (redraft/kv/quantization/think.py).
struct Pool {
    uint8_t* data;
    int64_t block_bytes, unit_bytes, per_block, values;  // values: bytes from the start of the unit
    int32_t layers, kv_heads, size;                    // size: of a head
    Kind kind;
    int64_t key_scales, value_scales;                  // I8, I4, I2: bytes from the start of the unit
    int64_t key_zeros, value_zeros;                    // I4, I2
    int64_t key_left, key_right;                       // [rank][32], [rank][size] of kind `numbers`: factors of slots and of channels
    int64_t value_left, value_right;
    int64_t key_outliers, key_places;                  // [outliers][size] of kind `numbers`, and the slot of each in a byte
    int64_t value_outliers, value_places;              // [32][outliers], and the channel of each
    int64_t channels;                                  // THIN: bytes [kept]
    int64_t balance;                                   // [size] of kind `numbers`, 0: none
    Kind numbers;                                      // I4, I2, THIN
    int32_t rank, outliers, kept;
};

// The unit of page `page` (an id of the lane kind) for a layer and kv head.
INLINE int64_t unit_of(const Seq& s, const Pool& p, int64_t layer, int64_t head, int64_t page, const int32_t* pages, int64_t per_lane) {
    const int64_t lane = s.lanes == 0 ? 0 : s.lanes == 1 ? layer : layer * p.kv_heads + head;
    const int64_t id = pages[lane * per_lane + page];
    return s.lanes == 0 ? (id * p.layers + layer) * p.kv_heads + head : s.lanes == 1 ? id * p.kv_heads + head : id;
}
INLINE uint8_t* at_unit(const Pool& p, int64_t unit) { return p.data + unit / p.per_block * p.block_bytes + unit % p.per_block * p.unit_bytes; }
INLINE int64_t length_of(const Seq& s, const Pool& p, int64_t layer, int64_t head) {
    return s.lengths[s.lanes == 0 ? 0 : s.lanes == 1 ? layer : layer * p.kv_heads + head];
}

// A unit and the pool that defines its format.
struct Unit {
    uint8_t* at;
    const Pool* pool;
};
// The unit of the page with slots 32 page .. 32 page + 31 of a lane. The first encoded_per_lane pages belong to `encoded`.
INLINE Unit find_unit(const Seq& s, const Pool& exact, const Pool& encoded, int64_t layer, int64_t head, int64_t page) {
    if (page < s.encoded_per_lane) return {at_unit(encoded, unit_of(s, encoded, layer, head, page, s.encoded, s.encoded_per_lane)), &encoded};
    return {at_unit(exact, unit_of(s, exact, layer, head, page - s.encoded_per_lane, s.pages, s.pages_per_lane)), &exact};
}

// The slots that the rows of a sequence read, of those they see: bits [rows][kv_heads * apart][words], bit j of word i is slot 32 i + j.
// apart: 1, or the number of query heads of a kv head if they read different slots. No bits: all.
struct Picked {
    const uint32_t* bits;
    int32_t words, apart;
};

// A statistic of the attention weights of a sequence: the weight of a slot, averaged over the query heads of a kv head (MASS); 1 where it is
// below 1 / the number of slots that the row sees (LOW); 1 where the largest of the query heads is above threshold / that number (ABOVE).
// slots: of the longest lane, with tentative ones. Weights are counted in steps of 2^-32, so sums in double are exact and do not depend on
// how rows are grouped into steps.
enum Statistic : int32_t { MASS = 0, LOW = 1, ABOVE = 2 };
struct Watched {
    double *chain, *nodes;  // [layers][kv_heads][slots]: chain is summed over chain rows at positions >= `since`; nodes has one for each node row
    const uint8_t* heads;   // [layers][query heads]: whether it counts, as weight 0 if not; null: all do
    int64_t slots;
    int32_t seq, since, statistic, each;  // each: chain has one for each chain row too
    float threshold;
    int32_t none;
};

struct AttendJob {
    const Seq* seqs;
    int64_t count;
    Pool pool, encoded;              // encoded: the pool of encoded pages; no data if there are none
    int32_t layer, heads, window;  // heads: query heads; window: keys at positions > own - window are seen, 0: all
    Rows q;                        // [T, heads * size], strided
    Rows out;                      // [T, heads * size]
    float scale, softcap;          // softcap: 0, or scores s become softcap * tanh(s / softcap)
    const Watched* watched = nullptr;
    int64_t watches = 0;
    const float* far = nullptr;       // cos, then sin, [T][half]: rotate queries for keys at positions < sinks
    int64_t half = 0;
    const Picked* picked = nullptr;   // [count], or null: every row reads all slots that it sees
    const float* sink_logits = nullptr;  // [heads], or null: the score of one more slot of each query head, which has no value
};

struct AttendKernels;  // attend.h

struct Kernels {
    const char* name;
    Kind (*takes)(Kind weights);                                             // the kind of tiles that linear needs for such weights
    int64_t (*pieces)(const Linear&);  // what linear counts: panels, or halves of them
    void (*linear)(const LinearJob&, int64_t first, int64_t last, float* scratch);  // pieces; scratch: [rows of x][64]
    void (*norm)(const NormJob&, int64_t first, int64_t last);               // rows
    void (*copy)(const Rows& x, const Rows& y, int64_t first, int64_t last); // rows first..last in another layout or kind; tile padding is zeroed
    void (*quantize)(const Rows& x, const Linear& w, const Rows& tiles, const Coded& codes, int64_t first, int64_t last);  // of x for w
    void (*activate)(const Rows& x, const Rows& y, Activation, int32_t gated, int64_t first, int64_t last);
    void (*cap)(const Rows& x, const Rows& y, float limit, int64_t first, int64_t last);  // y = limit * tanh(x / limit)
    void (*low_rank)(const Rows& x, const Rows& y, const LowRank&, int64_t row);  // adds the term to a row of y, and rounds
    void (*route)(const RouteJob&, int64_t first, int64_t last);             // rows
    // x [T, heads * size] strided, in place: head h of row r is rotated by cos, sin [T][size / 2] (half-split pairs)
    void (*rope)(const Rows& x, int64_t heads, int64_t size, const float* cos, const float* sin, int64_t first, int64_t last);
    int64_t (*contenders)(uint64_t key, const int64_t* ids, const double* values, int64_t count, int64_t* places);  // [CONTENDERS]
    // out [rows][count] = a [rows][size] times b [count][size]; each element is one chain over size; scratch: [size][32]
    void (*products)(const float* a, const float* b, int64_t rows, int64_t count, int64_t size, float* out, float* scratch);
    const AttendKernels* attend;
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();       // F, BW, DQ, VL
const Kernels* avx512_vnni_kernels();  // and VNNI
const Kernels* avx512_bf16_kernels();  // and BF16
const Kernels* amx_kernels();          // and AMX-TILE, AMX-BF16, AMX-INT8

}  // namespace redraft
