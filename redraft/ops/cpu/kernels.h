// What the kernels of one instruction set offer, and how numbers lie in memory. No PyTorch here: pointers come in.
//
// Bit-exactness: an output element is computed by one instruction sequence, fixed when the library is loaded, that depends
// on neither the number of rows nor the threads nor what stands beside it.
#pragma once
#include <cstddef>
#include <cstdint>

// Always inlined: of a copy that the linker kept, it could pick the one compiled for a larger instruction set.
#define INLINE inline __attribute__((always_inline))

namespace redraft {

constexpr int64_t PANEL = 64;  // outputs of a linear layer that are packed side by side
constexpr int64_t LINE = 64;   // bytes of a row in a tile
constexpr int64_t TALL = 16;   // rows of a tile
constexpr int64_t PAGE = 32;   // slots of a page
constexpr int64_t GROUP = 16;  // pages whose keys are attended one after another; groups are merged left to right

enum Kind : int32_t { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };
enum Activation : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4 };

INLINE constexpr int64_t bytes_of(Kind kind) { return kind == F32 ? 4 : kind == BF16 ? 2 : 1; }

// A matrix of activations. stride > 0: (r, c) lies at data + r * stride + c * size. stride == 0: tiles, so that no two rows of a
// tile share a cache set: columns are cut into lines of 64 bytes, the last one filled with zeros, rows into blocks of 16; block b is
// [lines][h][64 bytes] with h = min(16, rows - 16 b), and begins at data + 16 b * lines * 64.
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

// A linear layer. A panel is 64 outputs: [steps][64][4 bytes], a step holding 4 bytes of each output's weights: 1 float32, 2 bf16 or
// 4 int8; what lacks at the end of ins and outs is zero, and ins are filled up to whole lines (16 steps). int4: two steps' nibbles in
// one byte, [steps / 2][64][4 bytes], step 2 i in the low half and 2 i + 1 in the high one, stored as code + 8.
// gated: a panel is 32 gate outputs and the 32 up outputs that belong to them; else outputs in order.
struct Linear {
    const uint8_t* panels;
    const float* bias;      // [panels * 64] in the panels' order, or null
    const float* scale;     // int8: [panels * 64]
    const int32_t* sums;    // int8: [panels * 64], the sum of an output's codes
    const uint16_t* scales; // int4: float16 [panels][groups][64]
    const int32_t* columns; // codes: [outliers], the columns beside them in ascending order
    const float* side;      // [panels][outliers][64], the weights in these columns
    int64_t outs, ins;
    Kind kind;
    int32_t group;          // int4: columns that share a scale, a multiple of 16
    int32_t gated;
    int32_t outliers;

    INLINE int64_t count() const { return (outs + PANEL - 1) / PANEL; }
    INLINE int64_t steps() const {
        const int64_t per_line = kind == F32 ? 16 : kind == BF16 ? 32 : 64;
        return (ins + per_line - 1) / per_line * 16;
    }
    INLINE int64_t panel_bytes() const { return steps() * PANEL * (kind == I4 ? 2 : 4); }
    INLINE int64_t groups() const { return kind == I4 ? (ins + group - 1) / group : 0; }
};

// y = x W^T + bias. x: tiles of the kind that Kernels::takes says. The sum of an element runs over its inputs in order, is rounded to y's
// kind with its bias, and then, where `add`, added to what y holds (rounded again); where w is gated and an activation given, y
// has outs / 2 columns and is activation(gate) * up of the rounded halves. best: where not null, no y is written; the `keep` largest outputs of each
// row (rounded first) go into what is there, best first, the lowest index of equal ones in front.
struct Best {
    float value;
    int32_t index;
};
struct LinearJob {
    Linear w;
    Rows x;
    const float* x_scale;   // int8 tiles: [rows], what a code of the row stands for
    const int32_t* x_sums;  // int4: [rows][groups], sums of the row's codes
    Rows y;
    Kind rounded;           // what numbers are rounded to: y may be float32 tiles of bf16 numbers
    Activation activation;
    int32_t add;
    Best* best;             // [rows][keep]
    int32_t keep;
    const float* x_outliers;  // [rows][outliers], the row's numbers in w's outlier columns
};

struct NormJob {
    Rows x, y;              // any layouts; y may be of another kind (float32 tiles of bf16 numbers)
    const uint8_t *weight, *bias;  // of x's kind; bias may be null
    float eps;
    int32_t rms;            // else LayerNorm
    Kind rounded;           // what y's numbers are rounded to
};

// Attention of some rows of sequences over their pages; everything that does not depend on the layer.
struct Seq {
    int32_t first, rows, chain_rows;  // rows of the batch; the first chain_rows of them are chain rows, the others nodes
    int32_t tail, chain;              // tentative rows written before; chain rows of the whole tail
    int32_t lanes;                    // 0 shared, 1 one a layer, 2 one a layer and kv head
    int32_t pages_per_lane, words;    // page ids of a lane; words of visibility of a node row
    int32_t coded_per_lane;           // pages of codes, in front of `pages`
    int32_t sinks, recent;            // a row sees keys at positions < sinks or > own - recent; recent 0: no such window
    int32_t none;
    const int32_t* pages;             // [lanes][pages_per_lane]
    const int32_t* coded;             // [lanes][coded_per_lane]
    const int32_t* lengths;           // [lanes] committed slots
    const int32_t* const* positions;  // [lanes] -> position of every committed slot, or null: slot i holds position i
    const uint64_t* visible;          // [node rows][words]: tentative nodes that the row sees
    const int32_t* at;                // [rows] positions of the rows
    const int32_t* tail_at;           // [tail + rows] positions of the tentative slots
};

// Where units lie: unit u is at data + u / per_block * block_bytes + u % per_block * unit_bytes, and holds keys [32][size], then values.
// I8: codes of whole vectors, as redraft/kv/quantization/int8.py defines them, with scales float32 [32]. I4: codes [32][size / 2] of keys by
// channel and of values by slot, as redraft/kv/quantization/int4.py defines them, with scales and zeros of kind `numbers`.
struct Pool {
    uint8_t* data;
    int64_t block_bytes, unit_bytes, per_block, values;  // values: bytes from the unit's start
    int32_t layers, kv_heads, size;                    // size: of a head
    Kind kind;
    int64_t key_scales, value_scales;                  // I8, I4: bytes from the unit's start
    int64_t key_zeros, value_zeros;                    // I4
    Kind numbers;                                      // I4: of scales and zeros
};

// The unit of page `page` (an index in pages of a lane) for a layer and kv head.
INLINE int64_t unit_of(const Seq& s, const Pool& p, int64_t layer, int64_t head, int64_t page, const int32_t* pages, int64_t per_lane) {
    const int64_t lane = s.lanes == 0 ? 0 : s.lanes == 1 ? layer : layer * p.kv_heads + head;
    const int64_t id = pages[lane * per_lane + page];
    return s.lanes == 0 ? (id * p.layers + layer) * p.kv_heads + head : s.lanes == 1 ? id * p.kv_heads + head : id;
}
INLINE uint8_t* at_unit(const Pool& p, int64_t unit) { return p.data + unit / p.per_block * p.block_bytes + unit % p.per_block * p.unit_bytes; }
INLINE int64_t length_of(const Seq& s, const Pool& p, int64_t layer, int64_t head) {
    return s.lengths[s.lanes == 0 ? 0 : s.lanes == 1 ? layer : layer * p.kv_heads + head];
}

// A unit and the pool that says how it is stored.
struct Unit {
    uint8_t* at;
    const Pool* pool;
};
// The unit of the page that holds slots 32 page .. 32 page + 31 of a lane: the first coded_per_lane pages are of `coded`.
INLINE Unit find_unit(const Seq& s, const Pool& exact, const Pool& coded, int64_t layer, int64_t head, int64_t page) {
    if (page < s.coded_per_lane) return {at_unit(coded, unit_of(s, coded, layer, head, page, s.coded, s.coded_per_lane)), &coded};
    return {at_unit(exact, unit_of(s, exact, layer, head, page - s.coded_per_lane, s.pages, s.pages_per_lane)), &exact};
}

// What the rows of a sequence read of the slots that they see: bits [rows][kv_heads * apart][words], bit j of word i: slot 32 i + j.
// apart: 1, or the number of query heads of a kv head where these differ. No bits: all.
struct Picked {
    const uint32_t* bits;
    int32_t words, apart;
};

// Statistics wanted of a sequence's attention weights: of a slot's weight, averaged over the query heads of a kv head, the weight itself, or
// where `low`, 1 where it is below 1 / the number of slots that the row sees. slots: of the longest lane, tentative ones too. Weights are
// counted in steps of 2^-32, so that sums in double are exact: how rows are grouped into steps changes no bit.
struct Watched {
    double *chain, *nodes;  // [layers][kv_heads][slots], summed over chain rows from position `since` on; one such block of each node row
    int64_t slots;
    int32_t seq, since, low, none;
};

struct AttendJob {
    const Seq* seqs;
    int64_t count;
    Pool pool, coded;              // coded: of coded pages; without data where there are none
    int32_t layer, heads, window;  // heads: of queries; window: keys at positions > own - window are seen, 0: all
    Rows q;                        // [T, heads * size], strided
    Rows out;                      // [T, heads * size]
    float scale;
    const Watched* watched = nullptr;
    int64_t watches = 0;
    const float* far = nullptr;       // cos, then sin, [T][half]: queries turn by them for keys at positions < sinks
    int64_t half = 0;
    const Picked* picked = nullptr;   // [count], or null: every row reads all that it sees
};

struct AttendKernels;  // attend.h

struct Kernels {
    const char* name;
    Kind (*takes)(Kind weights);                                             // kind of the tiles that linear wants for such weights
    void (*linear)(const LinearJob&, int64_t first, int64_t last, float* scratch);  // panels; scratch: [rows of x][64]
    void (*norm)(const NormJob&, int64_t first, int64_t last);               // rows
    void (*copy)(const Rows& x, const Rows& y, int64_t first, int64_t last); // rows first..last in another layout or kind; a tile's padding is zeroed
    // codes of x for w; outliers [rows][w.outliers]: what stands in the columns whose codes are 0
    void (*quantize)(const Rows& x, const Linear& w, const Rows& codes, float* scale, int32_t* sums, float* outliers, int64_t first, int64_t last);
    void (*activate)(const Rows& x, const Rows& y, Activation, int32_t gated, int64_t first, int64_t last);
    // x [T, heads * size] strided, in place: head h of row r turned by cos, sin [T][size / 2] (half-split pairs)
    void (*rope)(const Rows& x, int64_t heads, int64_t size, const float* cos, const float* sin, int64_t first, int64_t last);
    void (*uniform)(uint64_t key, const int64_t* ids, int64_t count, double* to);  // core/noise.py's, bit for bit
    // out [rows][count] = a [rows][size] times b [count][size], each element one chain over size; scratch: [size][32]
    void (*products)(const float* a, const float* b, int64_t rows, int64_t count, int64_t size, float* out, float* scratch);
    const AttendKernels* attend;
};

const Kernels* avx2_kernels();
const Kernels* avx512_kernels();       // F, BW, DQ, VL
const Kernels* avx512_bf16_kernels();  // and BF16, VNNI
const Kernels* amx_kernels();          // and AMX-TILE, AMX-BF16, AMX-INT8

}  // namespace redraft
