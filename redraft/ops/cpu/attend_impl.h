// Attention over pages. Included inside an anonymous namespace after vec_*.h and vec_math.h; attend.h is included before it, outside.
//
// An element of a score or of a mix is one chain of fused multiply-adds in a fixed order: over the head for a score, over path
// indices for a mix. Blocks of queries and columns may therefore be cut to fit the registers, and a score may be computed anywhere.
//
// A group of pages is attended in three passes: all scores; weights, relative to the largest score of the group; the mix. Keys and values
// of a page are converted once for all queries. Both products are the same tile: queries times turned keys, weights times values.
//
// With a window, keys at positions below its sinks are scored with another vector, the query rotated back. Which of the two scores a
// slot gets depends only on the position of the row. A slot that a row does not read has weight 0, and its value counts as 0.
//
// If queries, pages and results are bf16 and the processor multiplies pairs of bf16 (DOT_BF16), the links of these chains are pairs: of
// neighbours in the head, and of path indices 2 i and 2 i + 1. A weight is then rounded to bf16, and the sum is that of the rounded
// weights. The result is still a mean of values, and changes by less than its own rounding.

constexpr int64_t SPAN = PAGE * GROUP;            // path indices of a group
constexpr int64_t STRIDE = SPAN + 16;             // floats between rows of queries and of weights; constant: one register addresses a tile
constexpr int64_t WIDE = 2 * Vec::N;              // columns of a tile
constexpr int HIGH = Vec::N == 16 ? 12 : 6;       // rows of a tile whose sums fill the registers
constexpr int64_t MOST_ROWS = 256;                // of a task
constexpr float LOWEST = -3e38f;                  // the largest score of a query that reads nothing
constexpr float LOG2_E = 1.44269504f;             // from powers of e to powers of two

#if defined(__AVX512F__)
inline Vec low_pairs(Vec a, Vec b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
inline Vec high_pairs(Vec a, Vec b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
inline Vec low_twos(Vec a, Vec b) { return {_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))}; }
inline Vec high_twos(Vec a, Vec b) { return {_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))}; }
// 16 bytes of each of some rows, `step` bytes apart.
inline Vec quarters(const uint8_t* p, int64_t step) {
    const auto quarter = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
    const __m512 a = _mm512_insertf32x4(_mm512_castps128_ps512(quarter(0)), quarter(1), 1);
    return {_mm512_insertf32x4(_mm512_insertf32x4(a, quarter(2), 2), quarter(3), 3)};
}
// Of words of 32 bits: the bf16 numbers in their low and high halves, the signed byte i, the bits of `mask` after so many others.
inline Vec shifted(Vec x, int left) { return {_mm512_castsi512_ps(_mm512_sllv_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(left)))}; }
inline Vec low_half(Vec x) { return shifted(x, 16); }
inline Vec high_half(Vec x) { return {_mm512_and_ps(x.v, _mm512_castsi512_ps(_mm512_set1_epi32(int(0xffff0000))))}; }
inline Vec byte_of(Vec x, int i) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_castps_si512(shifted(x, 24 - 8 * i).v), 24))}; }
inline Vec code_of(Vec x, int right, int mask) {
    const __m512i low = _mm512_srlv_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(right));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(low, _mm512_set1_epi32(mask)))};
}
inline float first_number(Vec x) { return _mm512_cvtss_f32(x.v); }
template <class Both>
inline float folded(Vec x, Both both) {  // both: of two registers
    const __m512 a = both(x, Vec{_mm512_shuffle_f32x4(x.v, x.v, 0x4e)}).v, b = both(Vec{a}, Vec{_mm512_shuffle_f32x4(a, a, 0xb1)}).v;
    const __m512 c = both(Vec{b}, Vec{_mm512_permute_ps(b, 0x4e)}).v;
    return first_number(both(Vec{c}, Vec{_mm512_permute_ps(c, 0xb1)}));
}
#elif defined(__AVX2__)
inline Vec low_pairs(Vec a, Vec b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
inline Vec high_pairs(Vec a, Vec b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
inline Vec low_twos(Vec a, Vec b) { return {_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))}; }
inline Vec high_twos(Vec a, Vec b) { return {_mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a.v), _mm256_castps_pd(b.v)))}; }
// 16 bytes of each of some rows, `step` bytes apart.
inline Vec quarters(const uint8_t* p, int64_t step) {
    const auto quarter = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + i * step)); };
    return {_mm256_insertf128_ps(_mm256_castps128_ps256(quarter(0)), quarter(1), 1)};
}
// Of words of 32 bits: the bf16 numbers in their low and high halves, the signed byte i, the bits of `mask` after so many others.
inline Vec shifted(Vec x, int left) { return {_mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(left)))}; }
inline Vec low_half(Vec x) { return shifted(x, 16); }
inline Vec high_half(Vec x) { return {_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000))))}; }
inline Vec byte_of(Vec x, int i) { return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_castps_si256(shifted(x, 24 - 8 * i).v), 24))}; }
inline Vec code_of(Vec x, int right, int mask) {
    const __m256i low = _mm256_srlv_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(right));
    return {_mm256_cvtepi32_ps(_mm256_and_si256(low, _mm256_set1_epi32(mask)))};
}
inline float first_number(Vec x) { return _mm256_cvtss_f32(x.v); }
template <class Both>
inline float folded(Vec x, Both both) {  // both: of two registers
    const __m256 a = both(x, Vec{_mm256_permute2f128_ps(x.v, x.v, 0x01)}).v, b = both(Vec{a}, Vec{_mm256_permute_ps(a, 0x4e)}).v;
    return first_number(both(Vec{b}, Vec{_mm256_permute_ps(b, 0xb1)}));
}
#endif
// Transposes: a register of each of Vec::N words from rows `step` bytes apart.
inline void turn(const uint8_t* rows, int64_t step, Vec* to) {
#pragma GCC unroll 4
    for (int i = 0; i < Vec::N; i += 4) {
        Vec x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[j] = quarters(rows + 4 * i + j * step, 4 * step);
        const Vec a = low_pairs(x[0], x[1]), b = high_pairs(x[0], x[1]), c = low_pairs(x[2], x[3]), d = high_pairs(x[2], x[3]);
        to[i] = low_twos(a, c), to[i + 1] = high_twos(a, c), to[i + 2] = low_twos(b, d), to[i + 3] = high_twos(b, d);
    }
}
inline float peak(Vec x) { return folded(x, maximum); }
inline float total(Vec x) {
    return folded(x, [](Vec a, Vec b) { return a + b; });
}

// 2^x for x <= 0 to within 3 units in the last place, 2^-100 below that; NaN of NaN.
inline Vec power(Vec x) {
    const Vec middle = set1(0x1.8p23f + 127.0f);                  // its last bits: the exponent of 1
    const Vec bounded = maximum(set1(-100.0f), x), n = bounded + middle, r = bounded - (n - middle);
    Vec p = fma(set1(1.326472731e-3f), r, set1(9.671512991e-3f));  // minimax polynomial on |r| <= 1/2, 1 at 0
    p = fma(p, r, set1(5.550733581e-2f));
    p = fma(p, r, set1(2.402224243e-1f));
    p = fma(p, r, set1(6.931470037e-1f));
    return fma(p, r, set1(1.0f)) * shifted(n, 23);
}

inline uint32_t low_bits(int64_t count) { return count <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of a task: the slots that it sees, by path index.
struct Line {
    const Seq* seq;
    const int32_t* positions;  // of committed slots, or null
    const uint64_t* path;      // of a node row, else null
    int64_t length, base;      // committed slots; the path index of the first node
    int64_t seen, straight;    // path indices; the number of leading ones that equal their slots
    int64_t at, row;           // position; row of the batch
    int64_t low, near;         // the windows of the layer and the sequence show positions > low, and < sinks or > near
    bool all;                  // they hide nothing
    bool turned;               // with a window: keys before the end of its sinks are scored with the rotated query
    const float* logs;         // of committed slots, or null: added to the scores

    bool sees(int64_t position) const { return position > low && (position < seq->sinks || position > near); }
};

inline Line line_of(const AttendJob& job, const AttendRow& row, int64_t kv_head) {
    constexpr int64_t NONE = -(int64_t(1) << 40);
    const Seq& s = job.seqs[row.seq];
    const int64_t lane = s.lanes == 0 ? 0 : s.lanes == 1 ? job.layer : int64_t(job.layer) * job.pool.kv_heads + kv_head;
    Line line{};
    line.seq = &s;
    line.positions = s.positions ? s.positions[lane] : nullptr;
    line.length = s.lengths[lane];
    line.at = s.at[row.row];
    line.row = s.first + row.row;
    line.low = job.window ? line.at - job.window : NONE;
    const bool windowed = s.recent && (!s.windowed || s.windowed[int64_t(job.layer) * job.pool.kv_heads + kv_head]);
    line.near = windowed ? line.at - s.recent : NONE;
    line.logs = s.logs ? s.logs[lane] : nullptr;
    line.all = line.low < 0 && line.near < s.sinks;
    line.turned = job.far && windowed && s.turned && line.at + 1 > int64_t(s.sinks) + s.recent;
    if (row.row < s.chain_rows) {
        line.base = line.seen = line.straight = s.slots ? s.slots[row.row] + 1 : line.length + s.tail + row.row + 1;
        return line;
    }
    line.path = s.visible + (row.row - s.chain_rows) * int64_t(s.words);
    line.base = line.seen = line.straight = line.length + s.chain;
    bool gap = false;
    for (int64_t w = 0; w < s.words; w++) {
        line.seen += __builtin_popcountll(line.path[w]);
        if (gap) continue;
        gap = ~line.path[w] != 0;
        line.straight += gap ? __builtin_ctzll(~line.path[w]) : 64;
    }
    return line;
}

inline int64_t position_of(const Line& line, int64_t slot) {
    return slot >= line.length ? line.seq->tail_at[slot - line.length] : line.positions ? line.positions[slot] : slot;
}

// Whether path indices first .. first + 31 differ from slots first .. first + 31.
inline bool scattered(const Line& line, int64_t first) {
    return at_most(line.seen, first + PAGE) > line.straight && line.straight < line.seen;
}

// The slots of path indices first .. first + 31 that the row sees.
inline void slots_of(const Line& line, int64_t first, int32_t* slots) {
    const int64_t last = at_most(line.seen, first + PAGE);
    for (int64_t i = first; i < last && i < line.base; i++) slots[i - first] = int32_t(i);
    if (!line.path || last <= line.base) return;
    int64_t index = line.base;
    for (int64_t w = 0; w < line.seq->words && index < last; w++)
        for (uint64_t bits = line.path[w]; bits && index < last; bits &= bits - 1, index++)
            if (index >= first) slots[index - first] = int32_t(line.base + 64 * w + __builtin_ctzll(bits));
}

// Which of the path indices first .. first + 31 the row sees.
inline uint32_t visible(const Line& line, int64_t first) {
    const int64_t count = at_most(line.seen - first, PAGE);
    uint32_t bits = low_bits(count);
    if (line.all || !bits) return bits;
    if (!line.positions && first + count <= line.length) {  // slots are positions
        if (first > line.low && first > line.near) return bits;
        if (first + count - 1 <= line.low || (first >= line.seq->sinks && first + count - 1 <= line.near)) return 0;
    }
    int32_t slots[PAGE];
    slots_of(line, first, slots);
    for (int64_t i = 0; i < count; i++)
        if (!line.sees(position_of(line, slots[i]))) bits &= ~(1u << i);
    return bits;
}

// Which of the slots first .. first + 31 the row sees.
inline uint32_t seen_slots(const Line& line, int64_t first) {
    uint32_t bits = low_bits(line.base - first);
    for (int64_t w = 0; line.path && w < line.seq->words; w++)
        for (uint64_t own = line.path[w]; own; own &= own - 1) {
            const int64_t slot = line.base + 64 * w + __builtin_ctzll(own);
            if (slot >= first && slot < first + PAGE) bits |= 1u << (slot - first);
        }
    for (uint32_t left = line.all ? 0 : bits; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        if (!line.sees(position_of(line, first + i))) bits &= ~(1u << i);
    }
    return bits;
}

// Those of the slots first .. first + 31 in `bits` that are scored with the rotated query.
inline uint32_t sink_slots(const Line& line, int64_t first, uint32_t bits) {
    if (!line.turned || (!line.positions && first >= line.seq->sinks && first + PAGE <= line.length)) return 0;
    uint32_t found = 0;
    for (; bits; bits &= bits - 1)
        if (const int i = __builtin_ctz(bits); position_of(line, first + i) < line.seq->sinks) found |= 1u << i;
    return found;
}

inline int64_t slots_seen(const Line& line) {
    if (line.all) return line.seen;
    int64_t count = 0;
    for (int64_t first = 0; first < line.seen; first += PAGE) count += __builtin_popcount(visible(line, first));
    return count;
}

// ---- pages as numbers

constexpr int bits_of(Kind kind) { return kind == I2 ? 2 : 4; }  // of a code

// Of a value.
inline int64_t row_bytes(const Pool& pool) {
    if (pool.kind == I4 || pool.kind == I2) return pool.size * bits_of(pool.kind) / 8;
    return pool.size * bytes_of(pool.kind == THIN ? pool.numbers : pool.kind);
}

// A scale, a zero, a factor or an outlier of a unit.
inline float number_at(const Unit& unit, int64_t offset, int64_t i) {
    const uint8_t* at = unit.at + offset + i * bytes_of(unit.pool->numbers);
    uint32_t bits = 0;
    float x;
    __builtin_memcpy(&bits, at, size_t(bytes_of(unit.pool->numbers)));
    if (unit.pool->numbers == BF16) bits <<= 16;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline Vec number_of(const Unit& unit, int64_t offset, int64_t i) { return set1(number_at(unit, offset, i)); }

// Rows of a page, `bytes` long, as words of 4 bytes, transposed. Gives `put` one word of Vec::N slots at a time.
template <class Put>
inline void turn_rows(const uint8_t* rows, int64_t bytes, Put put) {
    for (int64_t done = 0; done < bytes; done += 4 * Vec::N)
        for (int64_t slot = 0; slot < PAGE; slot += Vec::N) {
            const uint8_t* from = rows + slot * bytes + done;
            const int64_t left = bytes - done;
            Vec x[Vec::N];
            if (left >= 4 * Vec::N) {
                turn(from, bytes, x);
#pragma GCC unroll 16
                for (int i = 0; i < Vec::N; i++) put(done / 4 + i, slot, x[i]);
            } else {
                alignas(64) float some[Vec::N][Vec::N] = {};
                for (int i = 0; i < Vec::N; i++) __builtin_memcpy(some[i], from + i * bytes, size_t(left));
                turn(reinterpret_cast<const uint8_t*>(some), sizeof some[0], x);
                for (int i = 0; 4 * i < left; i++) put(done / 4 + i, slot, x[i]);
            }
        }
}

// Keys with some channels, transposed; the others are 0.
inline void turn_thin(const Unit& unit, float* keys) {
    const Pool& pool = *unit.pool;
    const uint8_t* channels = unit.at + pool.channels;
    for (int64_t i = 0; i < pool.size * PAGE; i += Vec::N) store(keys + i, zero());
    turn_rows(unit.at, pool.kept * bytes_of(pool.numbers), [&](int64_t word, int64_t slot, Vec x) {
        const auto put = [&](int64_t i, Vec numbers) { store(keys + channels[i] * PAGE + slot, numbers); };
        if (pool.numbers == F32) return put(word, x);
        put(2 * word, low_half(x));
        if (2 * word + 1 < pool.kept) put(2 * word + 1, high_half(x));
    });
}

// Adds the product of the factors and the outliers to transposed keys that were decoded from codes.
inline void repair_keys(const Unit& unit, float* keys) {
    const Pool& pool = *unit.pool;
    for (int64_t j = 0; j < pool.rank; j++) {
        const uint8_t* left = unit.at + pool.key_left + j * PAGE * bytes_of(pool.numbers);
        for (int64_t slot = 0; slot < PAGE; slot += Vec::N) {
            const Vec factors = read(left + slot * bytes_of(pool.numbers), pool.numbers);
            for (int64_t channel = 0; channel < pool.size; channel++) {
                float* p = keys + channel * PAGE + slot;
                store(p, fma(factors, number_of(unit, pool.key_right, j * pool.size + channel), load(p)));
            }
        }
    }
    for (int64_t i = 0; i < pool.outliers * pool.size; i++)
        keys[i % pool.size * PAGE + unit.at[pool.key_places + i]] += number_at(unit, pool.key_outliers, i);
}

// Adds the same to a decoded value.
inline void repair_value(const Unit& unit, int64_t slot, float* to) {
    const Pool& pool = *unit.pool;
    for (int64_t j = 0; j < pool.rank; j++) {
        const Vec factor = number_of(unit, pool.value_left, j * PAGE + slot);
        const uint8_t* right = unit.at + pool.value_right + j * pool.size * bytes_of(pool.numbers);
        for (int64_t c = 0; c < pool.size; c += Vec::N)
            store(to + c, fma(factor, read_some(right + c * bytes_of(pool.numbers), pool.numbers, pool.size - c), load(to + c)));
    }
    for (int64_t i = slot * pool.outliers; i < (slot + 1) * pool.outliers; i++)
        to[unit.at[pool.value_places + i]] += number_at(unit, pool.value_outliers, i);
}

// Keys of a unit, transposed: float32 [size][32], or, if paired, words of two bf16 numbers [size / 2][32].
inline void turn_keys(const Unit& unit, bool paired, float* keys) {
    const Pool& pool = *unit.pool;
    const int64_t size = pool.size, bytes = row_bytes(pool);
    const auto put = [&](int64_t row, int64_t slot, Vec x) { store(keys + row * PAGE + slot, x); };
    if (pool.kind == F32 || paired) return turn_rows(unit.at, bytes, put);
    if (pool.kind == BF16)
        return turn_rows(unit.at, bytes, [&](int64_t word, int64_t slot, Vec x) {
            put(2 * word, slot, low_half(x));
            put(2 * word + 1, slot, high_half(x));
        });
    if (pool.kind == I8)  // times the scale of the slot
        return turn_rows(unit.at, bytes, [&](int64_t word, int64_t slot, Vec x) {
            const Vec scale = load(reinterpret_cast<const float*>(unit.at + pool.key_scales) + slot);
            for (int i = 0; i < 4 && 4 * word + i < size; i++) put(4 * word + i, slot, byte_of(x, i) * scale);
        });
    if (pool.kind == THIN) return turn_thin(unit, keys);
    const int bits = bits_of(pool.kind), parts = 8 / bits;
    if (pool.balance)
        return turn_rows(unit.at, bytes, [&](int64_t word, int64_t slot, Vec x) {  // times the scale of the slot, plus its zero
            const int64_t at = slot * bytes_of(pool.numbers);
            const Vec scale = read(unit.at + pool.key_scales + at, pool.numbers), zeros = read(unit.at + pool.key_zeros + at, pool.numbers);
            for (int i = 0; i < 4 * parts && 4 * word + i / parts < bytes; i++) {
                const int64_t channel = 4 * word + i / parts + i % parts * bytes;
                const Vec code = code_of(x, i / parts * 8 + i % parts * bits, (1 << bits) - 1);
                put(channel, slot, fma(code, scale, zeros) * number_of(unit, pool.balance, channel));
            }
        });
    turn_rows(unit.at, bytes, [&](int64_t word, int64_t slot, Vec x) {  // times the scale of the channel, plus its zero
        for (int i = 0; i < 4 * parts && 4 * word + i / parts < bytes; i++) {
            const int64_t channel = 4 * word + i / parts + i % parts * bytes;  // the first channels are in the lowest bits of bytes
            const Vec code = code_of(x, i / parts * 8 + i % parts * bits, (1 << bits) - 1);
            put(channel, slot, fma(code, number_of(unit, pool.key_scales, channel), number_of(unit, pool.key_zeros, channel)));
        }
    });
    repair_keys(unit, keys);
}

// Some bits of Vec::N bytes as numbers.
inline Vec from_bytes(const uint8_t* p, int right, int mask) {
#if defined(__AVX512F__)
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return code_of({_mm512_castsi512_ps(bytes)}, right, mask);
#else
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return code_of({_mm256_castsi256_ps(bytes)}, right, mask);
#endif
}

// Vec::N codes, followed by zeros.
inline Vec read_codes(const int8_t* codes, int64_t count) {
    if (count >= Vec::N) return from_i8(codes);
    alignas(64) int8_t t[Vec::N] = {};
    for (int64_t i = 0; i < count; i++) t[i] = codes[i];
    return from_i8(t);
}

// Numbers c .. of `size` codes of some bits: the first ones are in the lowest bits of bytes.
inline Vec read_bits(const uint8_t* codes, int bits, int64_t c, int64_t size) {
    const int64_t bytes = size * bits / 8;
    const int mask = (1 << bits) - 1;
    if (bytes % Vec::N == 0) return from_bytes(codes + c % bytes, int(c / bytes) * bits, mask);
    alignas(64) int8_t t[Vec::N] = {};
    for (int64_t i = c; i < c + Vec::N && i < size; i++) t[i - c] = int8_t(codes[i % bytes] >> int(i / bytes) * bits & mask);
    return from_i8(t);
}

// `size` numbers as float32, followed by zeros up to `padded`. part: gives those from a column on.
template <class Part>
inline void unpack(int64_t size, int64_t padded, float* to, Part part) {
    for (int64_t c = 0; c < size; c += Vec::N) store(to + c, part(c));
    for (int64_t c = (size + Vec::N - 1) / Vec::N * Vec::N; c < padded; c += Vec::N) store(to + c, zero());
}
template <Kind KIND>
inline void load_numbers(const uint8_t* from, int64_t size, int64_t padded, float* to) {
    if (size % Vec::N == 0) unpack(size, padded, to, [&](int64_t c) { return read(from + c * bytes_of(KIND), KIND); });
    else unpack(size, padded, to, [&](int64_t c) { return read_some(from + c * bytes_of(KIND), KIND, size - c); });
}
inline void load_numbers(const uint8_t* from, Kind kind, int64_t size, int64_t padded, float* to) {
    if (kind == F32) load_numbers<F32>(from, size, padded, to);
    else load_numbers<BF16>(from, size, padded, to);
}

// The value of a slot of a unit in the same form.
inline void load_value(const Unit& unit, int64_t slot, int64_t padded, float* to) {
    const Pool& pool = *unit.pool;
    const int64_t size = pool.size;
    const uint8_t* from = unit.at + pool.values + slot * row_bytes(pool);
    if (pool.kind == I8) {
        const Vec scale = set1(reinterpret_cast<const float*>(unit.at + pool.value_scales)[slot]);
        unpack(size, padded, to, [&](int64_t c) { return read_codes(reinterpret_cast<const int8_t*>(from) + c, size - c) * scale; });
    } else if (pool.kind == I4 || pool.kind == I2) {
        const Vec scale = number_of(unit, pool.value_scales, slot), zeros = number_of(unit, pool.value_zeros, slot);
        unpack(size, padded, to, [&](int64_t c) { return fma(read_bits(from, bits_of(pool.kind), c, size), scale, zeros); });
        repair_value(unit, slot, to);
    } else {
        load_numbers(from, pool.kind == THIN ? pool.numbers : pool.kind, size, padded, to);
    }
}

// Steps 1 and 2 of redraft/kv/quantization/int8.py, bit for bit.
inline void encode(const uint8_t* from, Kind kind, int64_t size, int8_t* codes, float* scale) {
    constexpr float MOST = 127.0f, LARGEST = 2.679388e36f;
    const auto part = [&](int64_t c) { return read_some(from + c * bytes_of(kind), kind, size - c); };
    Vec most = zero();
    bool numbers = true;
    for (int64_t c = 0; c < size; c += Vec::N) {
        numbers = numbers && !any_above(part(c), set1(__builtin_inff()));
        most = maximum(most, absolute(part(c)));
    }
    const float step = numbers ? largest(most) / MOST : __builtin_nanf("");
    *scale = step > LARGEST && step < __builtin_inff() ? LARGEST : step;
    const bool none = !(step > 0 && step < __builtin_inff());  // codes of 0, which times the scale give 0 or NaN
    for (int64_t c = 0; c < size; c += Vec::N) {
        alignas(64) int8_t t[Vec::N] = {};
        if (!none) to_i8(t, maximum(minimum(part(c) / set1(*scale), set1(MOST)), set1(-MOST)));
        __builtin_memcpy(codes + c, t, size_t(at_most(size - c, Vec::N)));
    }
}

// ---- the tile

// The content of a word of 4 bytes on both sides.
struct Singles {
    static Vec add(Vec sums, Vec a, Vec b) { return fma(a, b, sums); }
};
#ifdef DOT_BF16
constexpr bool PAIRS = true;
struct Pairs {  // of bf16
    static Vec add(Vec sums, Vec a, Vec b) {
        return {_mm512_dpbf16_ps(sums.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))};
    }
};
// Words of two rows of bf16 [size], or of zeros where a row is null: number c of both in word c, [padded].
inline void pair_rows(const uint8_t* a, const uint8_t* b, int64_t size, int64_t padded, float* to) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                           39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < padded; c += 32) {
        const uint32_t inside = low_bits(size - c);
        const __m512i x = _mm512_maskz_loadu_epi16(a ? inside : 0, a + 2 * c), y = _mm512_maskz_loadu_epi16(b ? inside : 0, b + 2 * c);
        _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(x, first, y));
        _mm512_storeu_si512(to + c + 16, _mm512_permutex2var_epi16(x, second, y));
    }
}
// Rounds the weights of a page to bf16, two in a word of p, and returns them.
inline Vec pair_weights(const Vec* x, float* p) {
    const Vec weights = {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(x[1].v, x[0].v))};
    store(p, weights);
    return weights;
}
#else
constexpr bool PAIRS = false;
#endif

// Rows of the right side of a product, two registers of each: as words of 4 bytes, as bf16, or two rows as words of two bf16.
struct Words {
    static constexpr int ROWS = 1, BYTES = 4;
    static void read(const uint8_t* at, Vec (*to)[2]) {
        const float* row = reinterpret_cast<const float*>(at);
        to[0][0] = load(row), to[0][1] = load(row + Vec::N);
    }
};
struct Halves {
    static constexpr int ROWS = 1, BYTES = 2;
    static void read(const uint8_t* at, Vec (*to)[2]) {
        const uint16_t* row = reinterpret_cast<const uint16_t*>(at);
        to[0][0] = from_bf16(row), to[0][1] = from_bf16(row + Vec::N);
    }
};
struct Twos {
    static constexpr int ROWS = 2, BYTES = 4;
    static void read(const uint8_t* at, Vec (*to)[2]) {
        Vec x[1][2];
        Words::read(at, x);
        for (int c = 0; c < 2; c++) to[0][c] = low_half(x[0][c]), to[1][c] = high_half(x[0][c]);
    }
};

// The right side of a product: `length` rows on each of some pages, one page after another. While products with a page are summed,
// `bytes` of memory at its `next` are fetched, if that is not null: spread like this, fetches do not delay loads.
struct Right {
    const uint8_t *pages[GROUP], *next[GROUP];
    int64_t count, length, columns, stride, bytes;  // stride: bytes between rows, or pairs of rows
};

// out[q][2 registers] = sum over k of a[q][k] * b[k][2 registers], or that added to out. first: of what this tile fetches, `each` bytes.
template <class Product, class Form, int Q>
inline void tile(const float* a, const Right& b, int64_t column, bool add, int64_t first, int64_t each, float* out, int64_t stride) {
    Vec sums[Q][2];
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) {
        sums[i][0] = add ? load(out + i * stride) : zero();
        sums[i][1] = add ? load(out + i * stride + Vec::N) : zero();
    }
    const int64_t step = each * Form::ROWS > b.length * LINE ? 2 * LINE : LINE;
    for (int64_t page = 0; page < b.count; page++, a += b.length) {
        const uint8_t *at = b.pages[page] + column * Form::BYTES, *ahead = b.next[page] && each > 0 ? b.next[page] + first : at;
        const uint8_t* end = ahead == at ? at : ahead + each;
        for (int64_t k = 0; k < b.length; k += Form::ROWS, at += b.stride) {
            __builtin_prefetch(ahead, 0, 2);
            __builtin_prefetch(ahead + LINE, 0, 2);
            ahead = ahead < end ? ahead + step : ahead;
            Vec row[Form::ROWS][2];
            Form::read(at, row);
#pragma GCC unroll 2
            for (int r = 0; r < Form::ROWS; r++)
#pragma GCC unroll 16
                for (int i = 0; i < Q; i++) {
                    const Vec x = set1(a[i * STRIDE + k + r]);
                    sums[i][0] = Product::add(sums[i][0], x, row[r][0]);
                    sums[i][1] = Product::add(sums[i][1], x, row[r][1]);
                }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < Q; i++) {
        store(out + i * stride, sums[i][0]);
        store(out + i * stride + Vec::N, sums[i][1]);
    }
}
template <class Product, class Form, int Q = HIGH>
inline void tile_of(int64_t rows, const float* a, const Right& b, int64_t column, bool add, int64_t first, int64_t each, float* out,
                    int64_t stride) {
    if constexpr (Q > 1)
        if (rows < Q) return tile_of<Product, Form, Q - 1>(rows, a, b, column, add, first, each, out, stride);
    tile<Product, Form, Q>(a, b, column, add, first, each, out, stride);
}

// A product of matrices, a [count][STRIDE] times b, written to out or added to it.
template <class Product, class Form>
inline void multiply(const float* a, int64_t count, const Right& b, bool add, float* out, int64_t stride) {
    // in 32 bits, because divisions take long
    const uint32_t blocks = uint32_t(count + HIGH - 1) / HIGH, tiles = blocks * uint32_t(b.columns / WIDE);
    const int64_t height = uint32_t(count + blocks - 1) / blocks, each = (uint32_t(b.bytes / LINE) + tiles - 1) / tiles * LINE;
    int64_t first = 0;
    for (int64_t q = 0; q < count; q += height)
        for (int64_t c = 0; c < b.columns; c += WIDE, first += each) {
            const int64_t some = first < b.bytes ? each : 0;
            tile_of<Product, Form>(at_most(count - q, height), a + q * STRIDE, b, c, add, first, some, out + q * stride + c, stride);
        }
}

// ---- a worker

// A worker's memory; queries, weights and what is like them: [queries][STRIDE], q and far: for every SPAN words of the head.
struct Scratch {
    float *keys, *values, *q, *p, *tail;
    float *far, *far_p, *far_tail;  // rotated queries and their scores
    Mixed group, whole;             // whole: of all groups so far
    uint32_t* reads;                // [queries][GROUP]: the path indices of a page that a query reads
};

inline int64_t carve(const AttendShape& shape, float* memory, Scratch* made) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
        float* at = memory ? memory + used : nullptr;
        used += (count + 15) / 16 * 16;
        return at;
    };
    const auto take_mixed = [&] {
        const int64_t queries = (shape.queries + 15) / 16 * 16;
        return Mixed{take(queries), take(queries), take(queries), take(queries * shape.padded)};
    };
    const int64_t rows = shape.queries * STRIDE, parts = (shape.size + SPAN - 1) / SPAN;
    made->keys = take(shape.size * PAGE);
    made->values = take(shape.padded * SPAN);
    made->q = take(parts * rows);
    made->p = take(rows);
    made->tail = take(shape.queries * shape.tail);
    made->far = take(shape.turned * parts * rows);
    made->far_p = take(shape.turned * rows);
    made->far_tail = take(shape.turned * shape.queries * shape.tail);
    made->group = take_mixed();
    made->whole = take_mixed();
    made->reads = reinterpret_cast<uint32_t*>(take(shape.queries * GROUP));
    return used;
}

inline int64_t attend_scratch(const AttendShape& shape) {
    Scratch scratch;
    return carve(shape, nullptr, &scratch);
}

inline void clear(float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += Vec::N) store(p + i, zero());
}

// The results of queries before their groups. sink_logits: null, or those of `heads` query heads, which queries have in turn.
inline void begin(const Mixed& to, int64_t count, int64_t padded, const float* sink_logits, int64_t heads) {
    for (int64_t q = 0; q < count; q += Vec::N) {
        store(to.most + q, set1(LOWEST));
        store(to.rounded + q, zero());
        store(to.exact + q, zero());
    }
    for (int64_t q = 0; sink_logits && q < count; q++) to.most[q] = sink_logits[q % heads] * LOG2_E, to.rounded[q] = to.exact[q] = 1.0f;
    clear(to.mix, count * padded);
}

// Merges one more group into the results of the groups before it. The arrays of both go on for a register.
inline void merge(const Mixed& to, const Mixed& from, int64_t count, int64_t padded) {
    for (int64_t q = 0; q < count; q += Vec::N) {
        alignas(64) float old[Vec::N], fresh[Vec::N];
        const Vec before = load(to.most + q), most = load(from.most + q), top = maximum(before, most);
        const Vec a = power(before - top), b = power(most - top);
        store(to.most + q, top);
        store(to.rounded + q, fma(load(to.rounded + q), a, load(from.rounded + q) * b));
        store(to.exact + q, fma(load(to.exact + q), a, load(from.exact + q) * b));
        store(old, a);
        store(fresh, b);
        for (int64_t i = 0; i < at_most(count - q, Vec::N); i++) {
            float* mix = to.mix + (q + i) * padded;
            const float* more = from.mix + (q + i) * padded;
            for (int64_t c = 0; c < padded; c += Vec::N) store(mix + c, fma(load(mix + c), set1(old[i]), load(more + c) * set1(fresh[i])));
        }
    }
}

// Writes `count` numbers to (r, c) and after it; in tiles they may cross lines.
inline void put(const Rows& out, int64_t r, int64_t c, Vec x, int64_t count) {
    const int64_t bytes = bytes_of(out.kind), room = out.stride ? count : (LINE - c * bytes % LINE) / bytes;
    if (count == Vec::N && room >= count) return write(out.at(r, c), out.kind, x);
    alignas(64) uint8_t t[4 * Vec::N];
    write(t, out.kind, x);
    const int64_t some = at_most(count, room);
    __builtin_memcpy(out.at(r, c), t, size_t(some * bytes));
    if (some < count) __builtin_memcpy(out.at(r, c + some), t + some * bytes, size_t((count - some) * bytes));
}

// Writes the results of `count` query heads of a row, from `head` on.
inline void write_results(const AttendJob& job, int64_t row, int64_t head, int64_t count, const Mixed& from, int64_t padded,
                          const Partials& partials) {
    const int64_t size = job.pool.size;
    for (int64_t i = 0; i < count; i++) {
        if (partials.ends) partials.ends[row * job.heads + head + i] = {from.most[i], from.exact[i]};
        const float sum = from.rounded[i];
        for (int64_t c = 0; c < size; c += Vec::N) {
            const Vec x = sum == 0.0f ? zero() : load(from.mix + i * padded + c) / set1(sum);
            put(job.out, row, (head + i) * size + c, x, at_most(size - c, Vec::N));
        }
    }
    const int64_t beyond = job.out.cols * bytes_of(job.out.kind) % LINE;
    if (head + count == job.heads && !job.out.stride && beyond)
        __builtin_memset(job.out.at(row, job.out.cols - 1) + bytes_of(job.out.kind), 0, size_t(LINE - beyond));
}

class Task {
public:
    Task(const AttendJob& job, const AttendShape& shape, const AttendRow* rows, int64_t count, int64_t kv_head, const uint8_t* const* then,
         const Partials& partials, float* memory)
        : job_(job), pool_(job.pool), shape_(shape), partials_(partials), rows_(rows), then_(then), count_(count), kv_head_(kv_head),
          share_(shape.share), queries_(count * shape.share), factor_((job.softcap ? 1.0f : job.scale) * LOG2_E) {
        carve(shape, memory, &s_);
        paired_ = PAIRS && pool_.kind == BF16 && job.q.kind == BF16 && job.out.kind == BF16 && !job.encoded.data;
        words_ = paired_ ? pool_.size / 2 : pool_.size;
        for (int64_t i = 0; i < count; i++) {
            lines_[i] = line_of(job, rows[i], kv_head);
            most_seen_ = most_seen_ < lines_[i].seen ? lines_[i].seen : most_seen_;
            for (int64_t g = 0; g < share_; g++) load_query(i, g);
        }
    }

    void one_group(int64_t group) {
        attend_group(group, false);
        const int64_t padded = shape_.padded;
        for (int64_t i = 0; i < count_; i++) {
            const Mixed to = partials_.groups.from((rows_[i].partial + group) * job_.heads + kv_head_ * share_, padded);
            const Mixed from = s_.group.from(i * share_, padded);
            for (int64_t g = 0; g < share_; g++) to.most[g] = from.most[g], to.rounded[g] = from.rounded[g], to.exact[g] = from.exact[g];
            __builtin_memcpy(to.mix, from.mix, size_t(share_ * padded * 4));
        }
    }

    void all_groups() {
        begin(s_.whole, queries_, shape_.padded, job_.sink_logits ? job_.sink_logits + kv_head_ * share_ : nullptr, share_);
        for (int64_t group = 0; group * SPAN < most_seen_; group++) {
            attend_group(group, true);
            merge(s_.whole, s_.group, queries_, shape_.padded);
        }
        for (int64_t i = 0; i < count_; i++)
            write_results(job_, lines_[i].row, kv_head_ * share_, share_, s_.whole.from(i * share_, shape_.padded), shape_.padded,
                          partials_);
    }

    // Adds the statistics of the rows to the slots of a group.
    void watch(const Watched& watched, int64_t group) {
        float limits[MOST_ROWS];
        const float share = watched.statistic == LOW ? 1.0f : watched.threshold;
        for (int64_t i = 0; i < count_; i++) limits[i] = watched.statistic == MASS ? 0.0f : share / float(slots_seen(lines_[i]));
        const Seq& seq = *lines_[0].seq;
        const int64_t slots = seq.held(lines_[0].length);
        for (int64_t page = group * GROUP; page < (group + 1) * GROUP && page * PAGE < slots; page++) watch_page(watched, page, limits);
    }

private:
    struct Place {
        Unit unit;
        int64_t slot;
    };

    // What the rows of the task read of a page. Rows first .. last contain all that read it in place.
    struct View {
        int64_t first, last;
        bool whole;                  // they are all rows, and all read all of it
        bool sunk, loose;            // there are rows with sinks; that read it scattered among other nodes
        uint32_t sinks[MOST_ROWS];   // of turned rows: slots that are scored with the rotated query

        void reset(int64_t rows) { first = rows, last = 0, whole = true, sunk = loose = false; }
        void add(int64_t row) {
            if (row < first) first = row;
            if (row >= last) last = row + 1;
        }
    };

    // ---- queries

    void load_query(int64_t i, int64_t g) {
        const Line& line = lines_[i];
        const uint8_t* from = job_.q.at(line.row, (kv_head_ * share_ + g) * pool_.size);
        place(from, job_.q.kind, s_.q, i * share_ + g);
        if (!line.turned) return;
        // rotated back by the number of hidden positions, in half-split pairs; other dimensions do not change
        const int64_t half = job_.half;
        const float *cos = job_.far + line.row * half, *sin = cos + job_.q.rows * half;
        float* x = s_.values;  // free until a page is read
        load_numbers(from, job_.q.kind, pool_.size, shape_.padded, x);
        for (int64_t d = 0; d < half; d++) {
            const float a = x[d], b = x[d + half];
            x[d] = a * cos[d] - b * sin[d];
            x[d + half] = b * cos[d] + a * sin[d];
        }
        for (int64_t c = 0; paired_ && c < shape_.padded; c += Vec::N) to_bf16(reinterpret_cast<uint16_t*>(x) + c, load(x + c));
        place(reinterpret_cast<uint8_t*>(x), paired_ ? BF16 : F32, s_.far, i * share_ + g);
    }

    // Places the words of a query where tiles read them.
    void place(const uint8_t* from, Kind kind, float* to, int64_t query) const {
        for (int64_t c = 0; c < words_; c += SPAN) {
            float* at = to + (c / SPAN * shape_.queries + query) * STRIDE;
            const int64_t some = at_most(words_ - c, SPAN);
            if (paired_) __builtin_memcpy(at, from + 4 * c, size_t(some * 4));
            else load_numbers(from + c * bytes_of(kind), kind, some, some, at);
        }
    }

    // ---- what is read

    Unit unit(const Seq& s, int64_t page) const { return find_unit(s, pool_, job_.encoded, job_.layer, kv_head_, page); }

    // The slots of a page that a query of a row may read.
    uint32_t picked(int64_t i, int64_t g, int64_t page) const {
        if (!job_.picked || !job_.picked[rows_[i].seq].bits) return ~0u;
        const Picked& one = job_.picked[rows_[i].seq];
        const int64_t head = one.apart > 1 ? kv_head_ * one.apart + g : kv_head_;
        return one.bits[(rows_[i].row * int64_t(pool_.kv_heads) * one.apart + head) * one.words + page];
    }

    // The path indices of the page at `place` in the group that a query reads; never more than its row sees.
    uint32_t& reads(int64_t query, int64_t place) { return s_.reads[query * GROUP + place]; }

    // The same where path indices are scattered.
    uint32_t picked_scattered(int64_t i, int64_t g, int64_t page) const {
        int32_t slots[PAGE];
        slots_of(lines_[i], page * PAGE, slots);
        uint32_t bits = 0;
        for (int64_t k = 0; k < at_most(lines_[i].seen - page * PAGE, PAGE); k++)
            bits |= (picked(i, g, slots[k] / PAGE) >> slots[k] % PAGE & 1) << k;
        return bits;
    }

    // Notes which path indices of some pages the rows read.
    void look(int64_t first, int64_t count) {
        for (int64_t place = 0; place < count; place++) views_[place].reset(count_);
        for (int64_t i = 0; i < count_; i++) {
            const Line& line = lines_[i];
            const int64_t whole = line.all && !job_.picked ? at_most(line.straight / PAGE - first, count) : 0;  // leading pages
            loose_[i] = 0;
            if (whole > 0) __builtin_memset(&reads(i * share_, 0), 0xff, size_t(share_ * GROUP * 4));
            for (int64_t place = 0; place < count; place++)
                if (place < whole || look_at(i, first + place, place)) views_[place].add(i);
        }
    }

    // The same for one row and page; whether it reads any of it in place.
    bool look_at(int64_t i, int64_t page, int64_t place) {
        const Line& line = lines_[i];
        View& view = views_[place];
        const uint32_t bits = visible(line, page * PAGE);
        const bool loose = bits && scattered(line, page * PAGE);
        uint32_t any = 0;
        for (int64_t g = 0; g < share_; g++) {
            const uint32_t read = !job_.picked || !bits ? bits : bits & (loose ? picked_scattered(i, g, page) : picked(i, g, page));
            view.whole = view.whole && read == ~0u;
            any |= reads(i * share_ + g, place) = read;
        }
        view.loose = view.loose || loose;
        view.whole = view.whole && !loose;
        loose_[i] |= uint8_t(loose << place);
        view.sinks[i] = loose ? 0 : sink_slots(line, page * PAGE, any);
        view.sunk = view.sunk || view.sinks[i];
        return any && !loose;
    }
    bool is_loose(int64_t i, int64_t place) const { return loose_[i] >> place & 1; }

    // ---- a group

    void attend_group(int64_t group, bool goes_on) {
        const int64_t first = group * GROUP, all = (most_seen_ + PAGE - 1) / PAGE, count = at_most(GROUP, all - first);
        const Seq& seq = *lines_[0].seq;
        const uint8_t* later[GROUP] = {};  // keys of the group that is attended next
        for (int64_t i = 0; i < GROUP; i++)
            later[i] = !goes_on ? then_[i] : first + GROUP + i < all ? unit(seq, first + GROUP + i).at : nullptr;
        look(first, count);
        for (int64_t place = 0; place < count; place++) score_page(first + place, place, unit(seq, first + place).at + pool_.values);
        weigh(count);
        if (count <= 0 || !views_[0].whole) clear(s_.group.mix, queries_ * shape_.padded);
        for (int64_t place = 0, end; place < count; place = end) {
            for (end = place + 1; end < count && views_[place].whole && views_[end].whole;) end++;
            if (views_[place].whole) mix_whole(first, place, end, later);
            else mix_page(first + place, place);
        }
    }

    // A product in the form of the queries. raw: the right side holds bf16 where queries are float32.
    template <class Raw>
    void product(const float* a, int64_t count, const Right& b, bool raw, bool add, float* out, int64_t stride) const {
#ifdef DOT_BF16
        if (paired_) return multiply<Pairs, Words>(a, count, b, add, out, stride);
#endif
        if (raw) multiply<Singles, Raw>(a, count, b, add, out, stride);
        else multiply<Singles, Words>(a, count, b, add, out, stride);
    }

    // Whether bf16 numbers are converted whenever they are multiplied with `queries` queries, not once.
    bool converts_late(const Unit& unit, int64_t queries) const { return !paired_ && unit.pool->kind == BF16 && queries <= HIGH; }

    // Turns the keys of a page for rows first .. last; returns whether they stay bf16.
    bool turn_page(const Unit& unit, int64_t first, int64_t last) const {
        const bool late = converts_late(unit, (last - first) * share_);
        turn_keys(unit, paired_ || late, s_.keys);
        return late;
    }

    // Dot products of rows first .. last, of queries in the layout of `from`, with the turned keys. next: memory needed soon, or null.
    void score(const float* from, bool late, int64_t first, int64_t last, float* out, int64_t stride, const uint8_t* next = nullptr) const {
        const int64_t q = first * share_, count = (last - first) * share_;
        for (int64_t c = 0; c < words_; c += SPAN, next = nullptr) {
            const uint8_t* keys = reinterpret_cast<const uint8_t*>(s_.keys + c * PAGE / (late ? 2 : 1));
            const Right b{{keys}, {next}, 1, at_most(words_ - c, SPAN), PAGE, PAGE * 4, pool_.values};
            product<Twos>(from + (c / SPAN * shape_.queries + q) * STRIDE, count, b, late, c > 0, out + q * stride, stride);
        }
        for (int64_t i = q; job_.softcap && i < q + count; i++)
            for (float* p = out + i * stride; p < out + i * stride + PAGE; p += Vec::N) store(p, capped(load(p) * set1(job_.scale), job_.softcap));
    }

    // Scores of a page, for sinks those of the rotated queries.
    void score_page(int64_t page, int64_t place, const uint8_t* next) {
        const View& view = views_[place];
        float *out = s_.p + place * PAGE, *far = s_.far_p + place * PAGE;
        if (view.first < view.last) {
            const bool late = turn_page(unit(*lines_[view.first].seq, page), view.first, view.last);
            score(s_.q, late, view.first, view.last, out, STRIDE, next);
            if (view.sunk) score(s_.far, late, view.first, view.last, far, STRIDE);
        }
        for (int64_t i = view.first; view.sunk && i < view.last; i++)
            for (int64_t q = i * share_; q < (i + 1) * share_; q++)
                for (int64_t c = 0; c < PAGE; c += Vec::N) {
                    float* p = out + q * STRIDE + c;
                    if (lines_[i].turned) store(p, keep_where(view.sinks[i] >> c, load(far + q * STRIDE + c), load(p)));
                }
        for (int64_t i = view.first; i < view.last; i++) weight(lines_[i], page, out + i * share_ * STRIDE);
        for (int64_t i = 0; view.loose && i < count_; i++)
            if (is_loose(i, place)) score_scattered(i, page, place);
    }

    // Adds the logarithms of what the slots of a page stand for to the scores of the queries of a row.
    void weight(const Line& line, int64_t page, float* out) const {
        const int64_t first = page * PAGE, count = at_most(line.length - first, PAGE);
        if (!line.logs || count <= 0) return;
        alignas(64) float more[PAGE] = {};
        __builtin_memcpy(more, line.logs + first, size_t(count * 4));
        const Vec each = set1(score_of_log());
        for (int64_t c = 0; c < PAGE; c += Vec::N) {
            const Vec x = load(more + c) * each;
            for (int64_t g = 0; g < share_; g++) store(out + g * STRIDE + c, load(out + g * STRIDE + c) + x);
        }
    }
    float score_of_log() const { return LOG2_E / factor_; }  // scores are multiplied by factor_ later

    // Scores of all node rows with all slots of the pages with nodes: tail[query][slot - tail_first_].
    void score_tail() {
        tail_scored_ = true;
        int64_t row = 0;
        while (!lines_[row].path) row++;
        const Line& line = lines_[row];
        const Seq& seq = *line.seq;
        const int64_t nodes = int64_t(seq.tail) + seq.rows - seq.chain;
        bool turned = false;
        for (int64_t i = row; i < count_; i++) turned |= lines_[i].turned;
        tail_first_ = line.base / PAGE * PAGE;
        for (int64_t slot = tail_first_; slot < line.base + nodes; slot += PAGE) {
            const bool late = turn_page(unit(seq, slot / PAGE), row, count_);
            score(s_.q, late, row, count_, s_.tail + slot - tail_first_, shape_.tail);
            if (turned) score(s_.far, late, row, count_, s_.far_tail + slot - tail_first_, shape_.tail);
        }
    }

    // Scores of a row with path indices among other nodes, in path order.
    void score_scattered(int64_t i, int64_t page, int64_t place) {
        if (!tail_scored_) score_tail();
        const Line& line = lines_[i];
        int32_t slots[PAGE];
        slots_of(line, page * PAGE, slots);
        for (int64_t k = 0; k < at_most(line.seen - page * PAGE, PAGE); k++) {
            const float* tail = line.turned && position_of(line, slots[k]) < line.seq->sinks ? s_.far_tail : s_.tail;
            const float more = line.logs && slots[k] < line.length ? line.logs[slots[k]] * score_of_log() : 0.0f;
            for (int64_t q = i * share_; q < (i + 1) * share_; q++)
                s_.p[q * STRIDE + place * PAGE + k] = tail[q * shape_.tail + slots[k] - tail_first_] + more;
        }
    }

    // Turns scores into weights, 0 where a query does not read; sums them. Few queries at a time, whose scores stay in the first cache.
    void weigh(int64_t pages) {
        for (int64_t q = 0, end; q < queries_; q = end) {
            end = at_most(q + 8, queries_);
            for (int64_t i = q; i < end; i++) find_most(i, pages);
            for (int64_t i = q; i < end; i++) expand(i, pages);
        }
    }

    void find_most(int64_t q, int64_t pages) {
        Vec most[SLOTS];
        for (int64_t c = 0; c < SLOTS; c++) most[c] = set1(LOWEST);
        for (int64_t place = 0; place < pages; place++) {
            const uint32_t bits = reads(q, place);
            const float* p = s_.p + q * STRIDE + place * PAGE;
            for (int64_t c = 0; bits && c < SLOTS; c++) {
                const Vec x = load(p + c * Vec::N);
                most[c] = maximum(most[c], bits == ~0u ? x : keep_where(bits >> c * Vec::N, x, set1(LOWEST)));
            }
        }
        for (int64_t c = 1; c < SLOTS; c++) most[0] = maximum(most[0], most[c]);
        s_.group.most[q] = peak(most[0]) * factor_;
    }

    void expand(int64_t q, int64_t pages) {
        const Vec most = set1(-s_.group.most[q]), factor = set1(factor_);
        Vec exact = zero(), rounded = zero();
        for (int64_t place = 0; place < pages; place++) {
            const uint32_t bits = reads(q, place);
            if (!bits) continue;
            float* p = s_.p + q * STRIDE + place * PAGE;
            Vec x[SLOTS];
            for (int64_t c = 0; c < SLOTS; c++) {
                x[c] = power(fma(load(p + c * Vec::N), factor, most));
                if (bits != ~0u) x[c] = keep_where(bits >> c * Vec::N, x[c], zero());
                exact = exact + x[c];
                if (!paired_) store(p + c * Vec::N, x[c]);
            }
#ifdef DOT_BF16
            const Vec ones = {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))};
            if (paired_) rounded = Pairs::add(rounded, pair_weights(x, weights(q, place)), ones);
#endif
        }
        s_.group.exact[q] = total(exact);
        s_.group.rounded[q] = paired_ ? total(rounded) : s_.group.exact[q];
    }

    // Weights of a page; pairs of bf16 take half of the room.
    float* weights(int64_t query, int64_t place) { return s_.p + query * STRIDE + place * (paired_ ? PAGE / 2 : PAGE); }

    // Mixes of all queries with pages that all of them read whole; while that runs, the pages `later` are fetched.
    void mix_whole(int64_t first, int64_t place, int64_t end, const uint8_t* const* later) {
        const Seq& seq = *lines_[0].seq;
        const int64_t length = paired_ ? PAGE / 2 : PAGE;
        bool late = pool_.size == shape_.padded;
        for (int64_t i = place; i < end; i++) late = late && converts_late(unit(seq, first + i), queries_);
        Right b{{}, {}, end - place, length, shape_.padded, late ? row_bytes(pool_) : shape_.padded * 4, pool_.values};
        for (int64_t i = place; i < end; i++) {
            const Unit here = unit(seq, first + i);
            float* values = s_.values + i * PAGE * shape_.padded;
            if (!late) take_page(here, ~0u, values);
            b.pages[i - place] = late ? here.at + pool_.values : reinterpret_cast<uint8_t*>(values);
            b.next[i - place] = later[i];
        }
        product<Halves>(weights(0, place), queries_, b, late, place > 0, s_.group.mix, shape_.padded);
    }

    void mix_page(int64_t page, int64_t place) {
        const View& view = views_[place];
        const auto read = [&](int64_t q) { return view.loose && is_loose(q / share_, place) ? 0 : reads(q, place); };
        const auto leading = [](uint32_t bits) { return bits == low_bits(length_of(bits)); };
        uint32_t held = 0, longest = 0;  // bits of the values in the scratch; the longest row of leading bits
        for (int64_t q = view.first * share_; q < view.last * share_; q++)
            if (const uint32_t bits = read(q); bits > longest && leading(bits)) longest = bits;
        for (int64_t q = view.first * share_, last = view.last * share_, end; q < last; q = end) {
            const uint32_t bits = read(q);
            for (end = q + 1; end < last && read(end) == bits;) end++;
            if (!bits) continue;
            const uint32_t wanted = leading(bits) && !(paired_ && length_of(bits) % 2) ? longest : bits;  // of which a product uses a part
            if (wanted != held) take_page(unit(*lines_[view.first].seq, page), held = wanted, s_.values);
            mix(q, end, place, bits);
        }
        for (int64_t i = 0; view.loose && i < count_; i++)
            if (is_loose(i, place)) mix_scattered(i, page, place);
    }

    void mix_scattered(int64_t i, int64_t page, int64_t place) {
        int32_t slots[PAGE];
        slots_of(lines_[i], page * PAGE, slots);
        for (int64_t q = i * share_, last = q + share_, end; q < last; q = end) {
            const uint32_t bits = reads(q, place);
            for (end = q + 1; end < last && reads(end, place) == bits;) end++;
            if (!bits) continue;
            take_values(bits, s_.values, [&](int64_t k) { return Place{unit(*lines_[i].seq, slots[k] / PAGE), slots[k] % PAGE}; });
            mix(q, end, place, bits);
        }
    }

    // Converts the values of the slots of a page in `bits`, with zeros between them.
    void take_page(const Unit& unit, uint32_t bits, float* to) {
        const int64_t length = length_of(bits), count = length * pool_.size;
        const Kind kind = unit.pool->kind;
        if (bits == low_bits(length) && (kind == F32 || kind == BF16) && !paired_ && pool_.size == shape_.padded)
            load_numbers(unit.at + pool_.values, kind, count, count, to);  // one row after another
        else
            take_values(bits, to, [&](int64_t i) { return Place{unit, i}; });
    }

    // Converts the values of path indices in `bits`, with zeros between them. from: the place of a path index.
    template <class From>
    void take_values(uint32_t bits, float* values, From from) {
        const int64_t count = length_of(bits);
        for (int64_t i = 0; i < count; i++) {
            float* to = values + i * shape_.padded;
#ifdef DOT_BF16
            const auto row = [&](int64_t k) -> const uint8_t* {
                if (!(bits >> k & 1)) return nullptr;
                const auto [unit, slot] = from(k);
                return unit.at + pool_.values + slot * row_bytes(pool_);
            };
            if (paired_ && i % 2 == 0) pair_rows(row(i), row(i + 1), pool_.size, shape_.padded, values + i / 2 * shape_.padded);
            if (paired_) continue;
#endif
            if (!(bits >> i & 1)) {
                clear(to, shape_.padded);
                continue;
            }
            const auto [unit, slot] = from(i);
            load_value(unit, slot, shape_.padded, to);
        }
    }
    static int64_t length_of(uint32_t bits) { return 32 - __builtin_clz(bits); }

    // Adds the values in the scratch to the mixes of queries q .. end.
    void mix(int64_t q, int64_t end, int64_t place, uint32_t bits) {
        const int64_t length = paired_ ? (length_of(bits) + 1) / 2 : length_of(bits);
        const Right b{{reinterpret_cast<uint8_t*>(s_.values)}, {}, 1, length, shape_.padded, shape_.padded * 4, 0};
        product<Halves>(weights(q, place), end - q, b, false, true, s_.group.mix + q * shape_.padded, shape_.padded);
    }

    // ---- statistics

    void watch_page(const Watched& watched, int64_t page, const float* limits) {
        View& view = views_[0];
        view.reset(count_);
        uint32_t bits[MOST_ROWS];
        for (int64_t i = 0; i < count_; i++) {
            bits[i] = seen_slots(lines_[i], page * PAGE);
            if (!bits[i]) continue;
            view.add(i);
            view.sunk |= (view.sinks[i] = sink_slots(lines_[i], page * PAGE, bits[i])) != 0;
        }
        score_page(page, 0, nullptr);
        for (int64_t i = view.first; i < view.last; i++) {
            if (!bits[i]) continue;
            alignas(64) float sums[PAGE], most[PAGE];
            clear(sums, PAGE);
            clear(most, PAGE);
            for (int64_t g = 0; g < share_; g++) {
                if (watched.heads && !watched.heads[int64_t(job_.layer) * job_.heads + kv_head_ * share_ + g]) continue;
                const auto [peak, sum] = partials_.ends[lines_[i].row * job_.heads + kv_head_ * share_ + g];
                const uint32_t read = bits[i] & picked(i, g, page);
                for (int64_t c = 0; c < PAGE; c += Vec::N) {
                    const Vec x = power(fma(load(s_.p + (i * share_ + g) * STRIDE + c), set1(factor_), set1(-peak))) / set1(sum);
                    const Vec own = keep_where(read >> c, x, zero());
                    store(sums + c, load(sums + c) + own);
                    store(most + c, maximum(load(most + c), own));
                }
            }
            note(watched, lines_[i], page * PAGE, bits[i], limits[i], sums, most);
        }
    }

    void note(const Watched& watched, const Line& line, int64_t first, uint32_t bits, float limit, const float* sums,
              const float* most) const {
        constexpr double STEPS = 4294967296.0;
        const int64_t block = int64_t(job_.layer) * pool_.kv_heads + kv_head_, node = line.row - line.seq->first - line.seq->chain_rows;
        const int64_t all_slots = int64_t(pool_.layers) * pool_.kv_heads * watched.slots, row = line.row - line.seq->first;
        double* all = node >= 0 ? watched.nodes + node * all_slots : watched.chain + (watched.each ? row * all_slots : 0);
        double* to = all + block * watched.slots + first;
        for (; bits; bits &= bits - 1) {
            const int i = __builtin_ctz(bits);
            const float weight = sums[i] / float(shape_.share);
            to[i] += watched.statistic == LOW ? double(weight < limit)
                : watched.statistic == ABOVE ? double(most[i] > limit) : __builtin_nearbyint(double(weight) * STEPS) / STEPS;
        }
    }

    static constexpr int64_t SLOTS = PAGE / Vec::N;  // registers of the scores of a page

    const AttendJob& job_;
    const Pool& pool_;
    const AttendShape& shape_;
    const Partials& partials_;
    const AttendRow* rows_;
    const uint8_t* const* then_;
    const int64_t count_, kv_head_, share_, queries_;
    const float factor_;  // from scores to powers of two
    int64_t words_, most_seen_ = 0, tail_first_ = 0;
    bool paired_;  // queries and pages of bf16, with products added in pairs
    bool tail_scored_ = false;
    Scratch s_;
    Line lines_[MOST_ROWS];
    View views_[GROUP];
    uint8_t loose_[MOST_ROWS];  // places in the group that a row reads scattered
};

inline void attend_task(const AttendJob& job, const AttendShape& shape, const AttendRow* rows, const AttendTask& task, int64_t kv_head,
                        const uint8_t* const* then, const Partials& partials, float* scratch) {
    Task one(job, shape, rows, task.rows, kv_head, then, partials, scratch);
    if (task.group < 0) one.all_groups();
    else one.one_group(task.group);
}

inline void attend_merge(const AttendJob& job, const AttendShape& shape, const AttendRow& row, const Partials& partials, float* scratch) {
    const Seq& seq = job.seqs[row.seq];
    const int64_t most = seq.lanes == 2 ? shape.share : shape.queries;  // query heads whose lanes end at the same slot
    Scratch s;
    carve(shape, scratch, &s);
    for (int64_t head = 0, count; head < job.heads; head += count) {
        count = at_most(job.heads - head, most);
        const int64_t slots = seq.held(length_of(seq, job.pool, job.layer, head / shape.share));
        begin(s.whole, count, shape.padded, job.sink_logits ? job.sink_logits + head : nullptr, count);
        for (int64_t group = 0; group * SPAN < slots; group++)
            merge(s.whole, partials.groups.from((row.partial + group) * job.heads + head, shape.padded), count, shape.padded);
        write_results(job, job.seqs[row.seq].first + row.row, head, count, s.whole, shape.padded, partials);
    }
}

inline void attend_watch(const AttendJob& job, const AttendShape& shape, const Watched& watched, int64_t kv_head, int64_t group,
                         const Partials& partials, float* scratch) {
    const Seq& seq = job.seqs[watched.seq];
    const int64_t most = at_most(MOST_ROWS, shape.queries / shape.share);
    AttendRow rows[MOST_ROWS];
    for (int64_t row = 0, count = 0; row < seq.rows; row++) {
        if (seq.at[row] >= watched.since) rows[count++] = {watched.seq, int32_t(row), -1};
        if (!count || (count < most && row + 1 < seq.rows)) continue;
        Task(job, shape, rows, count, kv_head, nullptr, partials, scratch).watch(watched, group);
        count = 0;
    }
}

// Rows of a times rows of b, 32 of them transposed at once.
inline void products(const float* a, const float* b, int64_t rows, int64_t count, int64_t size, float* out, float* scratch) {
    alignas(64) float some[HIGH * PAGE], block[HIGH * STRIDE];
    for (int64_t first = 0; first < count; first += PAGE) {
        const int64_t width = at_most(count - first, PAGE);
        clear(scratch, size * PAGE);
        for (int64_t i = 0; i < width; i++)
            for (int64_t d = 0; d < size; d++) scratch[d * PAGE + i] = b[(first + i) * size + d];
        for (int64_t r = 0, take; r < rows; r += take) {
            take = at_most(rows - r, HIGH);
            for (int64_t d = 0, length; d < size; d += length) {
                length = at_most(size - d, SPAN);
                for (int64_t i = 0; i < take; i++) __builtin_memcpy(block + i * STRIDE, a + (r + i) * size + d, size_t(length) * 4);
                const Right b{{reinterpret_cast<uint8_t*>(scratch + d * PAGE)}, {}, 1, length, PAGE, PAGE * 4, 0};
                multiply<Singles, Words>(block, take, b, d > 0, some, PAGE);
            }
            for (int64_t i = 0; i < take; i++) __builtin_memcpy(out + (r + i) * count + first, some + i * PAGE, size_t(width) * 4);
        }
    }
}

constexpr AttendKernels ATTEND = {attend_scratch, attend_task, attend_merge, encode, attend_watch};
