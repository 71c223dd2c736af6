// Attention over pages. Included inside an anonymous namespace after vec_*.h and vec_math.h; attend.h is included before it, outside.
//
// An element of a score or of a mix is one chain of fused multiply-adds in a fixed order: over the head for a score, over path
// indices for a mix. Blocks of queries and columns may therefore be cut to fit the registers, and a score may be computed anywhere.
//
// With a window, keys at positions below its sinks are scored with another vector, the query rotated back. Which of the two scores a
// slot gets depends only on the position of the row. Slots that a row does not read do not affect its sums.
//
// If queries, pages and results are bf16 and the processor multiplies pairs of bf16 (DOT_BF16), the links of these chains are pairs: of
// neighbours in the head, and of path indices 2 i and 2 i + 1, with zero for hidden slots. A weight is then rounded to bf16, and the sum
// is that of the rounded weights. The result is still a mean of values, and changes by less than its own rounding.

constexpr int64_t SLOTS = PAGE / Vec::N;  // registers of the scores of a page
constexpr int WIDE = Vec::N == 16 ? 8 : 6;  // queries of a block with sums that fill the registers, two registers each
constexpr int64_t BATCH = 32;             // queries that are scored, weighted and mixed together
constexpr int64_t MOST_ROWS = 256;        // of a task

#if defined(__AVX512F__)
// Transposes 16 x 16 numbers.
inline void turn(Vec* x) {
    __m512 t[16], u[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
        t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; i++) {  // u[4 b + i] holds columns i, i + 4, i + 8, i + 12 of rows 4 b .. 4 b + 3
        const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
        const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
        x[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
        x[i + 8].v = _mm512_shuffle_f32x4(a, c, 0xdd);
        x[i + 4].v = _mm512_shuffle_f32x4(b, d, 0x88);
        x[i + 12].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}
// The first and the second numbers of bf16 pairs.
inline Vec first_of(Vec pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))}; }
inline Vec second_of(Vec pairs) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v), _mm512_set1_epi32(int(0xffff0000))))};
}
inline float first_number(Vec x) { return _mm512_cvtss_f32(x.v); }
inline float peak(Vec x) {
    const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
#elif defined(__AVX2__)
// Transposes 8 x 8 numbers.
inline void turn(Vec* x) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        x[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        x[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}
// The first and the second numbers of bf16 pairs.
inline Vec first_of(Vec pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))}; }
inline Vec second_of(Vec pairs) {
    return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs.v), _mm256_set1_epi32(int(0xffff0000))))};
}
inline float first_number(Vec x) { return _mm256_cvtss_f32(x.v); }
inline float peak(Vec x) {
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
#endif

// Low or high halves of Vec::N bytes as numbers.
inline Vec from_u4(const uint8_t* p, bool high) {
#if defined(__AVX512F__)
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_cvtepi32_ps(_mm512_and_si512(high ? _mm512_srli_epi32(bytes, 4) : bytes, _mm512_set1_epi32(15)))};
#else
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtepi32_ps(_mm256_and_si256(high ? _mm256_srli_epi32(bytes, 4) : bytes, _mm256_set1_epi32(15)))};
#endif
}

inline float minus_infinity() { return -__builtin_inff(); }
inline uint32_t low_bits(int64_t count) { return count <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline float exponential_of(float x) { return first_number(exponential(set1(x))); }

// A row of a task: the slots that it sees, by path index.
struct Line {
    const Seq* seq;
    const int32_t* positions;  // of committed slots, or null
    const uint64_t* path;      // of a node row, else null
    int64_t length, base;      // committed slots; the path index of the first node
    int64_t seen, straight;    // path indices; the number of leading ones that equal their slots
    int64_t at, row;           // position; row of the batch
    bool turned;               // with a window: keys before the end of its sinks are scored with the rotated query
};

inline Line line_of(const AttendJob& job, const AttendRow& row, int64_t kv_head) {
    const Seq& s = job.seqs[row.seq];
    const int64_t lane = s.lanes == 0 ? 0 : s.lanes == 1 ? job.layer : int64_t(job.layer) * job.pool.kv_heads + kv_head;
    Line line{};
    line.seq = &s;
    line.positions = s.positions ? s.positions[lane] : nullptr;
    line.length = s.lengths[lane];
    line.at = s.at[row.row];
    line.row = s.first + row.row;
    line.turned = job.far && s.recent && line.at + 1 > int64_t(s.sinks) + s.recent;
    if (row.row < s.chain_rows) {
        line.base = line.seen = line.straight = line.length + s.tail + row.row + 1;
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

// The positions that the windows of the row show: that of the layer, positions > own - window, and that of the sequence.
struct Sight {
    int64_t low, sinks, near;  // seen: positions > low, and < sinks or > near
    bool all;

    Sight(const Line& line, int64_t window) {
        const int64_t none = -(int64_t(1) << 40);
        low = window ? line.at - window : none;
        sinks = line.seq->sinks;
        near = line.seq->recent ? line.at - line.seq->recent : none;
        all = low < 0 && near < sinks;
    }
    bool sees(int64_t position) const { return position > low && (position < sinks || position > near); }
};

// Whether path indices first .. first + 31 differ from slots first .. first + 31.
inline bool scattered(const Line& line, int64_t first) { return at_most(line.seen, first + PAGE) > line.straight && line.straight < line.seen; }

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
inline uint32_t visible(const Line& line, int64_t first, int64_t window) {
    const int64_t count = at_most(line.seen - first, PAGE);
    uint32_t bits = low_bits(count);
    const Sight sight(line, window);
    if (sight.all || !bits) return bits;
    if (!line.positions && first + count <= line.length) {  // slots are positions
        if (first > sight.low && first > sight.near) return bits;
        if (first + count - 1 <= sight.low || (first >= sight.sinks && first + count - 1 <= sight.near)) return 0;
    }
    int32_t slots[PAGE];
    slots_of(line, first, slots);
    for (int64_t i = 0; i < count; i++)
        if (!sight.sees(position_of(line, slots[i]))) bits &= ~(1u << i);
    return bits;
}

// Which of the slots first .. first + 31 the row sees.
inline uint32_t seen_slots(const Line& line, int64_t first, int64_t window) {
    uint32_t bits = low_bits(line.base - first);
    for (int64_t w = 0; line.path && w < line.seq->words; w++)
        for (uint64_t own = line.path[w]; own; own &= own - 1) {
            const int64_t slot = line.base + 64 * w + __builtin_ctzll(own);
            if (slot >= first && slot < first + PAGE) bits |= 1u << (slot - first);
        }
    const Sight sight(line, window);
    for (uint32_t left = sight.all ? 0 : bits; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        if (!sight.sees(position_of(line, first + i))) bits &= ~(1u << i);
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

inline int64_t slots_seen(const Line& line, int64_t window) {
    if (Sight(line, window).all) return line.seen;
    int64_t count = 0;
    for (int64_t first = 0; first < line.seen; first += PAGE) count += __builtin_popcount(visible(line, first, window));
    return count;
}

// The keys of Vec::N slots, `words` words of 4 bytes of each, transposed.
template <Kind KIND, bool WHOLE>
inline void load_block(const uint8_t* from, int64_t row_bytes, int64_t words, float* to) {
    constexpr int64_t PER = KIND == F32 ? 1 : 2;  // numbers of a word
    Vec x[Vec::N];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::N; i++) {
        const uint8_t* row = from + i * row_bytes;
        x[i] = WHOLE ? load(reinterpret_cast<const float*>(row)) : read_some(row, F32, words);
    }
    turn(x);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::N; i++) {
        if (!WHOLE && i >= words) return;
        float* row = to + i * PER * PAGE;
        if (KIND == F32) {
            store(row, x[i]);
        } else {
            store(row, first_of(x[i]));
            store(row + PAGE, second_of(x[i]));
        }
    }
}

// Keys of a unit as float32 [size][32].
template <Kind KIND>
inline void load_keys(const uint8_t* unit, int64_t size, float* keys) {
    constexpr int64_t PER = KIND == F32 ? 1 : 2;
    const int64_t words = size / PER, row_bytes = words * 4;
    for (int64_t slot = 0; slot < PAGE; slot += Vec::N)
        for (int64_t word = 0; word < words; word += Vec::N) {
            const uint8_t* from = unit + slot * row_bytes + word * 4;
            float* to = keys + word * PER * PAGE + slot;
            if (word + Vec::N <= words) load_block<KIND, true>(from, row_bytes, words - word, to);
            else load_block<KIND, false>(from, row_bytes, words - word, to);
        }
}
inline void load_keys(const uint8_t* unit, Kind kind, int64_t size, float* keys) {
    if (kind == F32) load_keys<F32>(unit, size, keys);
    else load_keys<BF16>(unit, size, keys);
}

// The codes of one slot as numbers, followed by zeros.
inline Vec read_codes(const int8_t* codes, int64_t count) {
    if (count >= Vec::N) return from_i8(codes);
    alignas(64) int8_t t[Vec::N] = {};
    for (int64_t i = 0; i < count; i++) t[i] = codes[i];
    return from_i8(t);
}
inline void load_value(const int8_t* codes, float scale, int64_t size, int64_t padded, float* to) {
    for (int64_t c = 0; c < padded; c += Vec::N) store(to + c, read_codes(codes + c, size - c) * set1(scale));
}

// Keys of a unit of codes as float32 [size][32].
inline void load_keys(const int8_t* codes, const float* scales, int64_t size, float* keys) {
    for (int64_t slot = 0; slot < PAGE; slot += Vec::N)
        for (int64_t c = 0; c < size; c += Vec::N) {
            Vec x[Vec::N];
#pragma GCC unroll 16
            for (int i = 0; i < Vec::N; i++) x[i] = read_codes(codes + (slot + i) * size + c, size - c) * set1(scales[slot + i]);
            turn(x);
            for (int64_t i = 0; i < Vec::N && c + i < size; i++) store(keys + (c + i) * PAGE + slot, x[i]);
        }
}

// A register of `size` 4-bit codes: the first half is in the low halves of bytes, the second in the high halves.
inline Vec read_nibbles(const uint8_t* codes, int64_t c, int64_t size) {
    const int64_t half = size / 2;
    if (half % Vec::N == 0) return from_u4(codes + c % half, c >= half);
    alignas(64) float t[Vec::N] = {};
    for (int64_t i = 0; i < Vec::N && c + i < size; i++) t[i] = float(c + i < half ? codes[c + i] & 15 : codes[c + i - half] >> 4);
    return load(t);
}

// Keys of a unit of 4-bit codes as float32 [size][32]: code times the scale of its channel, plus the zero of the channel.
inline void load_keys(const Unit& unit, int64_t size, float* keys) {
    const Pool& pool = *unit.pool;
    const int64_t bytes = bytes_of(pool.numbers);
    for (int64_t c = 0; c < size; c += Vec::N) {
        const Vec scale = read_some(unit.at + pool.key_scales + c * bytes, pool.numbers, size - c);
        const Vec zeros = read_some(unit.at + pool.key_zeros + c * bytes, pool.numbers, size - c);
        for (int64_t slot = 0; slot < PAGE; slot += Vec::N) {
            Vec x[Vec::N];
#pragma GCC unroll 16
            for (int i = 0; i < Vec::N; i++) x[i] = fma(read_nibbles(unit.at + (slot + i) * (size / 2), c, size), scale, zeros);
            turn(x);
            for (int64_t i = 0; i < Vec::N && c + i < size; i++) store(keys + (c + i) * PAGE + slot, x[i]);
        }
    }
}
inline void load_value(const Unit& unit, int64_t slot, int64_t size, int64_t padded, float* to) {
    const Pool& pool = *unit.pool;
    const auto number = [&](int64_t offset) { return set1(first_number(read_some(unit.at + offset + slot * bytes_of(pool.numbers), pool.numbers, 1))); };
    const Vec scale = number(pool.value_scales), zeros = number(pool.value_zeros);
    const uint8_t* codes = unit.at + pool.values + slot * (size / 2);
    for (int64_t c = 0; c < padded; c += Vec::N) store(to + c, c < size ? fma(read_nibbles(codes, c, size), scale, zeros) : zero());
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

// The values of one slot as float32, followed by zeros.
inline void load_value(const uint8_t* from, Kind kind, int64_t size, int64_t padded, float* to) {
    for (int64_t c = 0; c < padded; c += Vec::N)
        store(to + c, size - c >= Vec::N ? read(from + c * bytes_of(kind), kind) : size > c ? read_some(from + c * bytes_of(kind), kind, size - c) : zero());
}

struct Float32 {
    static Vec get(const uint8_t* row, int64_t c) { return load(reinterpret_cast<const float*>(row) + c); }
    static constexpr int64_t bytes = 4;
};
struct Bfloat16 {
    static Vec get(const uint8_t* row, int64_t c) { return from_bf16(reinterpret_cast<const uint16_t*>(row) + c); }
    static constexpr int64_t bytes = 2;
};

// The content of a word of 4 bytes of a query and of a key.
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
#else
constexpr bool PAIRS = false;
#endif

// Memory that is needed soon, fetched while words are multiplied, some bytes for each word. Spread like this, and in order, the fetches
// do not delay loads. They go to the second cache, because the queue of the first is too short.
struct Ahead {
    const uint8_t* at;  // or null
    int64_t step;
    void fetch(int64_t word) const {
        if (!at) return;
        __builtin_prefetch(at + word * step, 0, 2);
        if (step > LINE) __builtin_prefetch(at + word * step + LINE, 0, 2);
    }
};

// out[q][C registers] = sum over words d of q[d] * keys[d]
template <class Product, int Q, int C>
inline void dot_block(const float* q, int64_t stride, const float* keys, int64_t words, Ahead ahead, float* out, int64_t out_stride) {
    Vec sums[Q][C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) sums[i][c] = zero();
    for (int64_t d = 0; d < words; d++) {
        ahead.fetch(d);
        Vec key[C];
        for (int c = 0; c < C; c++) key[c] = load(keys + d * PAGE + c * Vec::N);
        for (int i = 0; i < Q; i++) {
            const Vec x = set1(q[i * stride + d]);
            for (int c = 0; c < C; c++) sums[i][c] = Product::add(sums[i][c], x, key[c]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) store(out + i * out_stride + c * Vec::N, sums[i][c]);
}

template <class Product, int Q>
inline void dot_page(const float* q, int64_t stride, const float* keys, int64_t words, Ahead ahead, float* out, int64_t out_stride) {
    for (int64_t c = 0; c < PAGE; c += 2 * Vec::N, ahead.at = nullptr) dot_block<Product, Q, 2>(q, stride, keys + c, words, ahead, out + c, out_stride);
}

// Scores of some queries with a page's 32 slots.
template <class Product>
inline void dots(const float* q, int64_t stride, int64_t count, const float* keys, int64_t words, Ahead ahead, float* out, int64_t out_stride) {
    for (int64_t i = 0, take; i < count; i += take, ahead.at = nullptr) {
        take = at_most(count - i, WIDE);
        const float* x = q + i * stride;
        float* to = out + i * out_stride;
        switch (take) {
            case 1: dot_page<Product, 1>(x, stride, keys, words, ahead, to, out_stride); break;
            case 2: dot_page<Product, 2>(x, stride, keys, words, ahead, to, out_stride); break;
            case 3: dot_page<Product, 3>(x, stride, keys, words, ahead, to, out_stride); break;
            case 4: dot_page<Product, 4>(x, stride, keys, words, ahead, to, out_stride); break;
            case 5: dot_page<Product, 5>(x, stride, keys, words, ahead, to, out_stride); break;
            case 6: dot_page<Product, 6>(x, stride, keys, words, ahead, to, out_stride); break;
            case 7: dot_page<Product, WIDE < 7 ? 6 : 7>(x, stride, keys, words, ahead, to, out_stride); break;
            default: dot_page<Product, WIDE < 8 ? 6 : 8>(x, stride, keys, words, ahead, to, out_stride);
        }
    }
}

// The visible slots of a page in path order, and the offset of their values from those of the first slot.
struct Taken {
    uint32_t bits;
    int64_t step, count;
    int32_t place[PAGE];
    int64_t offset[PAGE];
};

inline void take(uint32_t bits, int64_t step, Taken* taken) {
    if (taken->bits == bits && taken->step == step) return;
    taken->bits = bits;
    taken->step = step;
    taken->count = 0;
    for (; bits; bits &= bits - 1) {
        const int32_t slot = __builtin_ctz(bits);
        taken->place[taken->count] = slot;
        taken->offset[taken->count++] = slot * step;
    }
}

// mix[q][C registers] = mix * shrink[q] + sum over the selected slots of p[q][place] * values
template <int Q, int C, class Source>
inline void mix_block(const float* p, const Taken& taken, const uint8_t* values, int64_t ahead, const float* shrink, float* mix, int64_t stride) {
    Vec sums[Q][C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) sums[i][c] = load(mix + i * stride + c * Vec::N) * set1(shrink[i]);
    for (int64_t s = 0; s < taken.count; s++) {
        const uint8_t* from = values + taken.offset[s];
        const float* weights = p + taken.place[s];
        if (ahead)
            for (int64_t b = 0; b < C * Vec::N * Source::bytes; b += LINE) __builtin_prefetch(from + ahead + b, 0, 2);
        Vec value[C];
        for (int c = 0; c < C; c++) value[c] = Source::get(from, c * Vec::N);
        for (int i = 0; i < Q; i++) {
            const Vec x = set1(weights[i * PAGE]);
            for (int c = 0; c < C; c++) sums[i][c] = fma(x, value[c], sums[i][c]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < C; c++) store(mix + i * stride + c * Vec::N, sums[i][c]);
}

template <int Q, class Source>
inline void mix_page(const float* p, const Taken& taken, const uint8_t* values, int64_t ahead, const float* shrink, float* mix, int64_t stride, int64_t size) {
    constexpr int MOST = Q <= (Vec::N == 16 ? 4 : 3) ? 4 : 2;
    for (int64_t c = 0, some; c < size; c += some * Vec::N) {
        const int64_t left = (size - c + Vec::N - 1) / Vec::N;
        const uint8_t* from = values + c * Source::bytes;
        some = left >= MOST ? MOST : left >= 2 ? 2 : 1;
        if (some == MOST) mix_block<Q, MOST, Source>(p, taken, from, ahead, shrink, mix + c, stride);
        else if (some == 2) mix_block<Q, 2, Source>(p, taken, from, ahead, shrink, mix + c, stride);
        else mix_block<Q, 1, Source>(p, taken, from, ahead, shrink, mix + c, stride);
    }
}

template <class Source>
inline void mixes(const float* p, int64_t count, const Taken& taken, const uint8_t* values, int64_t ahead, const float* shrink, float* mix,
                  int64_t stride, int64_t size) {
    for (int64_t i = 0, take; i < count; i += take, ahead = 0) {
        take = at_most(count - i, WIDE);
        const float* x = p + i * PAGE;
        const float* factor = shrink + i;
        float* to = mix + i * stride;
        switch (take) {
            case 1: mix_page<1, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 2: mix_page<2, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 3: mix_page<3, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 4: mix_page<4, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 5: mix_page<5, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 6: mix_page<6, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            case 7: mix_page<WIDE < 7 ? 6 : 7, Source>(x, taken, values, ahead, factor, to, stride, size); break;
            default: mix_page<WIDE < 8 ? 6 : 8, Source>(x, taken, values, ahead, factor, to, stride, size);
        }
    }
}

#ifdef DOT_BF16
// The same for pairs of slots: weights are bf16, a pair in each word of p; values are stored `step` bytes apart. Unpacking splits a
// register of 32 columns of two rows into even and odd fours of columns, and they stay split until the end of the group.
template <int Q, int C, bool WHOLE>
inline void mix_pairs(const float* p, uint32_t bits, const uint8_t* values, int64_t step, int64_t ahead, const float* shrink, float* mix,
                      int64_t stride, int64_t columns) {
    Vec sums[Q][2 * C];
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < 2 * C; c++) sums[i][c] = load(mix + i * stride + c * Vec::N) * set1(shrink[i]);
    for (int64_t pair = 0; pair < PAGE / 2; pair++, bits >>= 2) {
        if (!WHOLE && !(bits & 3)) continue;
        const uint8_t* from = values + 2 * pair * step;
        if (ahead)
            for (int64_t b = 0; b < C * LINE; b += LINE) {
                __builtin_prefetch(from + ahead + b, 0, 2);
                __builtin_prefetch(from + step + ahead + b, 0, 2);
            }
        Vec value[2 * C];
        for (int c = 0; c < C; c++) {
            const uint32_t inside = low_bits(columns - 32 * c);
            const __m512i a = WHOLE ? _mm512_loadu_si512(from + c * LINE) : _mm512_maskz_loadu_epi16(bits & 1 ? inside : 0, from + c * LINE);
            const __m512i b = WHOLE ? _mm512_loadu_si512(from + step + c * LINE) : _mm512_maskz_loadu_epi16(bits & 2 ? inside : 0, from + step + c * LINE);
            value[2 * c].v = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
            value[2 * c + 1].v = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
        }
        for (int i = 0; i < Q; i++) {
            const Vec x = set1(p[i * PAGE + pair]);
            for (int c = 0; c < 2 * C; c++) sums[i][c] = Pairs::add(sums[i][c], x, value[c]);
        }
    }
    for (int i = 0; i < Q; i++)
        for (int c = 0; c < 2 * C; c++) store(mix + i * stride + c * Vec::N, sums[i][c]);
}

template <int Q>
inline void mix_pairs(const float* p, uint32_t bits, const uint8_t* values, int64_t step, int64_t ahead, const float* shrink, float* mix,
                      int64_t stride, int64_t size) {
    constexpr int C = Q <= 4 ? 2 : 1;
    const bool whole = bits == ~0u && size % (32 * C) == 0;
    for (int64_t c = 0; c < size; c += 32 * C) {
        if (whole) mix_pairs<Q, C, true>(p, bits, values + 2 * c, step, ahead, shrink, mix + c, stride, size - c);
        else if (size - c > 32) mix_pairs<Q, C, false>(p, bits, values + 2 * c, step, ahead, shrink, mix + c, stride, size - c);
        else mix_pairs<Q, 1, false>(p, bits, values + 2 * c, step, ahead, shrink, mix + c, stride, size - c);
    }
}

inline void mix_pairs(const float* p, int64_t count, uint32_t bits, const uint8_t* values, int64_t step, int64_t ahead, const float* shrink, float* mix,
                      int64_t stride, int64_t size) {
    for (int64_t i = 0, take; i < count; i += take, ahead = 0) {
        take = at_most(count - i, WIDE);
        const float* x = p + i * PAGE;
        const float* factor = shrink + i;
        float* to = mix + i * stride;
        switch (take) {
            case 1: mix_pairs<1>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 2: mix_pairs<2>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 3: mix_pairs<3>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 4: mix_pairs<4>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 5: mix_pairs<5>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 6: mix_pairs<6>(x, bits, values, step, ahead, factor, to, stride, size); break;
            case 7: mix_pairs<7>(x, bits, values, step, ahead, factor, to, stride, size); break;
            default: mix_pairs<8>(x, bits, values, step, ahead, factor, to, stride, size);
        }
    }
}

// Restores the order of columns.
inline void mend(float* mix, int64_t padded) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t c = 0; c < padded; c += 32) {
        const Vec even = load(mix + c), odd = load(mix + c + 16);
        store(mix + c, {_mm512_permutex2var_ps(even.v, low, odd.v)});
        store(mix + c + 16, {_mm512_permutex2var_ps(even.v, high, odd.v)});
    }
}

// Writes the weights of a page in bf16 to p and adds them to the sums so far.
inline Vec keep_weights(const Vec* x, float* p, Vec sums) {
    const Vec ones = {_mm512_castsi512_ps(_mm512_set1_epi32(0x3f803f80))};
    const Vec weights = {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(x[1].v, x[0].v))};
    store(p, weights);
    return Pairs::add(sums, weights, ones);
}
#endif

// A worker's memory. Of queries: q, mix [padded], sums and exact [16] by slot modulo a register, most; whole_*: over all groups so far.
struct Scratch {
    float *keys, *values, *q, *mix, *sums, *exact, *most, *whole_mix, *whole_most, *p, *tail;
    float *far, *far_p, *far_tail;  // rotated queries and their scores
    uint32_t* picks;                // of a query: the slots of a page that it reads, in path order
    Sums* whole_sum;
};

inline int64_t carve(const AttendShape& shape, float* memory, Scratch* made) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
        float* at = memory ? memory + used : nullptr;
        used += (count + 15) / 16 * 16;
        return at;
    };
    made->keys = take(shape.size * PAGE);
    made->values = take(shape.padded * PAGE);
    made->p = take(BATCH * PAGE);
    made->q = take(shape.queries * shape.padded);
    made->mix = take(shape.queries * shape.padded);
    made->sums = take(shape.queries * 16);
    made->exact = take(shape.queries * 16);
    made->most = take(shape.queries);
    made->whole_mix = take(shape.queries * shape.padded);
    made->whole_sum = reinterpret_cast<Sums*>(take(2 * shape.queries));
    made->whole_most = take(shape.queries);
    made->tail = take(shape.queries * shape.tail);
    made->far = take(shape.turned * shape.queries * shape.padded);
    made->far_p = take(shape.turned * BATCH * PAGE);
    made->far_tail = take(shape.turned * shape.queries * shape.tail);
    made->picks = reinterpret_cast<uint32_t*>(take(shape.queries));
    return used;
}

inline int64_t attend_scratch(const AttendShape& shape) {
    Scratch scratch;
    return carve(shape, nullptr, &scratch);
}

// Merges one more group into the result of the groups before it. A group without a key has no effect.
inline void merge_group(float* most, Sums* sum, float* mix, float group_most, Sums group_sum, const float* group_mix, int64_t size) {
    if (group_most == minus_infinity()) return;
    const float top = *most < group_most ? group_most : *most;
    const float old = exponential_of(*most - top), fresh = exponential_of(group_most - top);
    sum->rounded = first_number(fma(set1(sum->rounded), set1(old), set1(group_sum.rounded) * set1(fresh)));
    sum->exact = first_number(fma(set1(sum->exact), set1(old), set1(group_sum.exact) * set1(fresh)));
    *most = top;
    for (int64_t c = 0; c < size; c += Vec::N) store(mix + c, fma(load(mix + c), set1(old), load(group_mix + c) * set1(fresh)));
}

// Writes `count` numbers to (r, c) and after it; in tiles they may cross lines.
inline void put(const Rows& out, int64_t r, int64_t c, Vec x, int64_t count) {
    alignas(64) uint8_t t[4 * Vec::N];
    write(t, out.kind, x);
    const int64_t bytes = bytes_of(out.kind);
    for (int64_t done = 0, some; done < count; done += some) {
        const int64_t room = out.stride ? count : (LINE - (c + done) * bytes % LINE) / bytes;
        some = at_most(count - done, room);
        if (some == Vec::N) write(out.at(r, c), out.kind, x);
        else __builtin_memcpy(out.at(r, c + done), t + done * bytes, size_t(some * bytes));
    }
}

inline void write_result(const AttendJob& job, int64_t row, int64_t head, float most, Sums sums, const float* mix, const Partials& partials) {
    const int64_t size = job.pool.size, first = head * size;
    const float sum = sums.rounded;
    if (partials.ends) partials.ends[row * job.heads + head] = {most, sums.exact};
    for (int64_t c = 0; c < size; c += Vec::N) {
        const Vec x = sum == 0.0f ? zero() : load(mix + c) / set1(sum);
        put(job.out, row, first + c, x, at_most(size - c, Vec::N));
    }
    const int64_t beyond = job.out.cols * bytes_of(job.out.kind) % LINE;
    if (head == job.heads - 1 && !job.out.stride && beyond)
        __builtin_memset(job.out.at(row, job.out.cols - 1) + bytes_of(job.out.kind), 0, size_t(LINE - beyond));
}

class Task {
public:
    Task(const AttendJob& job, const AttendShape& shape, const AttendRow* rows, int64_t count, int64_t kv_head, const uint8_t* then, const Partials& partials,
         float* memory)
        : job_(job), pool_(job.pool), shape_(shape), partials_(partials), rows_(rows), then_(then), count_(count), kv_head_(kv_head) {
        carve(shape, memory, &s_);
        direct_ = pool_.size % Vec::N == 0 && pool_.kind != I8;
        paired_ = PAIRS && pool_.kind == BF16 && job.q.kind == BF16 && job.out.kind == BF16 && !job.encoded.data;
        words_ = paired_ ? pool_.size / 2 : pool_.size;
        for (int64_t i = 0; i < count; i++) {
            lines_[i] = line_of(job, rows[i], kv_head);
            most_seen_ = most_seen_ < lines_[i].seen ? lines_[i].seen : most_seen_;
            load_queries(i);
            if (lines_[i].turned) turn_queries(i);
        }
    }

    void one_group(int64_t group) {
        attend_group(group, false);
        for (int64_t i = 0; i < count_; i++)
            for (int64_t g = 0; g < shape_.share; g++) {
                const int64_t at = (rows_[i].partial + group) * job_.heads + kv_head_ * shape_.share + g, q = i * shape_.share + g;
                partials_.most[at] = s_.most[q];
                partials_.sum[at] = sums_of(q);
                for (int64_t c = 0; c < shape_.padded; c += Vec::N) store(partials_.mix + at * shape_.padded + c, load(s_.mix + q * shape_.padded + c));
            }
    }

    void all_groups() {
        const int64_t queries = count_ * shape_.share, padded = shape_.padded;
        for (int64_t q = 0; q < queries; q++) {
            s_.whole_most[q] = minus_infinity();
            s_.whole_sum[q] = {};
        }
        clear(s_.whole_mix, queries * padded);
        for (int64_t group = 0; group * GROUP * PAGE < most_seen_; group++) {
            attend_group(group, true);
            for (int64_t q = 0; q < queries; q++)
                merge_group(s_.whole_most + q, s_.whole_sum + q, s_.whole_mix + q * padded, s_.most[q], sums_of(q), s_.mix + q * padded, shape_.size);
        }
        for (int64_t q = 0; q < queries; q++)
            write_result(job_, lines_[q / shape_.share].row, kv_head_ * shape_.share + q % shape_.share, s_.whole_most[q], s_.whole_sum[q],
                         s_.whole_mix + q * padded, partials_);
    }

    // Adds the statistics of the rows to the slots of a group.
    void watch(const Watched& watched, int64_t group) {
        float limits[MOST_ROWS];
        for (int64_t i = 0; i < count_; i++) limits[i] = watched.low ? 1.0f / float(slots_seen(lines_[i], job_.window)) : 0.0f;
        const int64_t end = at_most((group + 1) * GROUP, most_slots() / PAGE + (most_slots() % PAGE > 0));
        for (int64_t page = group * GROUP; page < end; page++) watch_page(watched, page, limits);
    }

private:
    // The slots of the lane, tentative ones included, are 0 .. most_slots() - 1.
    int64_t most_slots() const {
        const Seq& seq = *lines_[0].seq;
        return lines_[0].length + seq.tail + seq.rows;
    }

    void watch_page(const Watched& watched, int64_t page, const float* limits) {
        const int64_t first = page * PAGE, queries = count_ * shape_.share;
        uint32_t any = 0;
        for (int64_t i = 0; i < count_; i++) {
            any |= bits_[i] = seen_slots(lines_[i], first, job_.window);
            sinks_[i] = sink_slots(lines_[i], first, bits_[i]);
            for (int64_t g = 0; g < shape_.share; g++) s_.picks[i * shape_.share + g] = bits_[i] & picked(i, g, page);
        }
        if (!any) return;
        turn_keys(unit(*lines_[0].seq, page));
        alignas(64) float mean[PAGE];
        for (int64_t q = 0, count; q < queries; q += count) {
            count = at_most(queries - q, BATCH);
            score_page(q, count, nullptr);
            for (int64_t i = 0; i < count; i++) {
                const int64_t row = (q + i) / shape_.share, g = (q + i) % shape_.share;
                if (!bits_[row]) continue;
                if (!g) clear(mean, PAGE);
                add_weights(s_.p + i * PAGE, s_.picks[q + i], partials_.ends[lines_[row].row * job_.heads + kv_head_ * shape_.share + g], mean);
                if (g == shape_.share - 1) note(watched, lines_[row], first, bits_[row], limits[row], mean);
            }
        }
    }

    void add_weights(const float* p, uint32_t bits, Partials::End end, float* sums) const {
        for (int64_t c = 0; c < PAGE; c += Vec::N) {
            const Vec weights = exponential(load(p + c) * set1(job_.scale) - set1(end.most)) / set1(end.sum);
            store(sums + c, load(sums + c) + keep_where(bits >> c, weights, zero()));
        }
    }

    void note(const Watched& watched, const Line& line, int64_t first, uint32_t bits, float limit, const float* sums) const {
        constexpr double STEPS = 4294967296.0;
        const int64_t block = int64_t(job_.layer) * pool_.kv_heads + kv_head_, node = line.row - line.seq->first - line.seq->chain_rows;
        double* to = (node < 0 ? watched.chain : watched.nodes + node * pool_.layers * pool_.kv_heads * watched.slots) + block * watched.slots + first;
        for (; bits; bits &= bits - 1) {
            const int i = __builtin_ctz(bits);
            const float weight = sums[i] / float(shape_.share);
            to[i] += watched.low ? double(weight < limit) : __builtin_nearbyint(double(weight) * STEPS) / STEPS;
        }
    }
    static void clear(float* p, int64_t count) {
        for (int64_t i = 0; i < count; i += Vec::N) store(p + i, zero());
    }

    Sums sums_of(int64_t q) const {
        const float rounded = sum(load(s_.sums + q * 16));
        return {rounded, paired_ && partials_.ends ? sum(load(s_.exact + q * 16)) : rounded};
    }

    void load_queries(int64_t i) {
        for (int64_t g = 0; g < shape_.share; g++) {
            const uint8_t* from = job_.q.at(lines_[i].row, (kv_head_ * shape_.share + g) * shape_.size);
            float* to = s_.q + (i * shape_.share + g) * shape_.padded;
            if (paired_) __builtin_memcpy(to, from, size_t(row_bytes()));
            else load_value(from, job_.q.kind, shape_.size, shape_.padded, to);
        }
    }

    // Queries of a row rotated back by the number of hidden positions, in half-split pairs; other dimensions do not change.
    void turn_queries(int64_t i) {
        const int64_t half = job_.half, row = lines_[i].row;
        const float *cos = job_.far + row * half, *sin = cos + job_.q.rows * half;
        for (int64_t g = 0; g < shape_.share; g++) {
            float* to = s_.far + (i * shape_.share + g) * shape_.padded;
            float* x = s_.values;  // free until a page is read
            load_value(job_.q.at(row, (kv_head_ * shape_.share + g) * shape_.size), job_.q.kind, shape_.size, shape_.padded, x);
            for (int64_t d = 0; d < half; d++) {
                const float a = x[d], b = x[d + half];
                x[d] = a * cos[d] - b * sin[d];
                x[d + half] = b * cos[d] + a * sin[d];
            }
            for (int64_t c = 0; c < shape_.padded; c += Vec::N) {
                if (paired_) to_bf16(reinterpret_cast<uint16_t*>(to) + c, load(x + c));
                else store(to + c, load(x + c));
            }
        }
    }

    // The slots of a page that a query of a row may read.
    uint32_t picked(int64_t i, int64_t g, int64_t page) const {
        if (!job_.picked || !job_.picked[rows_[i].seq].bits) return ~0u;
        const Picked& one = job_.picked[rows_[i].seq];
        const int64_t head = one.apart > 1 ? kv_head_ * one.apart + g : kv_head_;
        return one.bits[(rows_[i].row * int64_t(pool_.kv_heads) * one.apart + head) * one.words + page];
    }

    Unit unit(const Seq& s, int64_t page) const { return find_unit(s, pool_, job_.encoded, job_.layer, kv_head_, page); }

    int64_t most_pages() const { return (most_seen_ + PAGE - 1) / PAGE; }

    void attend_group(int64_t group, bool goes_on) {
        const int64_t queries = count_ * shape_.share;
        clear(s_.mix, queries * shape_.padded);
        clear(s_.sums, queries * 16);
        if (partials_.ends) clear(s_.exact, queries * 16);
        for (int64_t q = 0; q < queries; q++) s_.most[q] = minus_infinity();
        const int64_t first = group * GROUP, last = at_most(first + GROUP, most_pages());
        for (int64_t page = first; page < last; page++) attend_page(page, page + 1 < (goes_on ? most_pages() : last));
#ifdef DOT_BF16
        for (int64_t q = 0; q < queries && paired_; q++) mend(s_.mix + q * shape_.padded, shape_.padded);
#endif
    }

    // Keys of a unit transposed, words of 4 bytes by slots; pairs of bf16 are transposed like float32.
    void turn_keys(const Unit& unit) {
        switch (unit.pool->kind) {
            case I4: return load_keys(unit, words_, s_.keys);
            case I8: return load_keys(reinterpret_cast<const int8_t*>(unit.at), reinterpret_cast<const float*>(unit.at + pool_.key_scales), words_, s_.keys);
            default: return load_keys(unit.at, paired_ ? F32 : pool_.kind, words_, s_.keys);
        }
    }

    // Writes the values of a slot of a unit to the scratch, at place `place`.
    void take_value(const Unit& unit, int64_t slot, int64_t place) {
        const uint8_t* from = unit.at + unit.pool->values + slot * row_bytes();
        float* to = s_.values + place * shape_.padded;
        switch (unit.pool->kind) {
            case I4: return load_value(unit, slot, shape_.size, shape_.padded, to);
            case I8:
                return load_value(reinterpret_cast<const int8_t*>(from), reinterpret_cast<const float*>(unit.at + pool_.value_scales)[slot], shape_.size,
                                  shape_.padded, to);
            default: return load_value(from, pool_.kind, pool_.size, shape_.padded, to);
        }
    }

    // Dot products of `count` queries, from `from` on, with the page of transposed keys.
    void score(const float* from, int64_t count, const uint8_t* next, float* out, int64_t stride) {
        const Ahead ahead{next, pool_.values / words_};
#ifdef DOT_BF16
        if (paired_) return dots<Pairs>(from, shape_.padded, count, s_.keys, words_, ahead, out, stride);
#endif
        dots<Singles>(from, shape_.padded, count, s_.keys, words_, ahead, out, stride);
    }

    // The products of queries q .. q + count, written to p; for sinks (sinks_) those of the rotated queries.
    void score_page(int64_t q, int64_t count, const uint8_t* next) {
        score(s_.q + q * shape_.padded, count, next, s_.p, PAGE);
        uint32_t any = 0;
        for (int64_t i = 0; i < count; i++) any |= sinks_[(q + i) / shape_.share];
        if (!any) return;
        score(s_.far + q * shape_.padded, count, nullptr, s_.far_p, PAGE);
        for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < PAGE; c += Vec::N) {
                float* p = s_.p + i * PAGE + c;
                store(p, keep_where(sinks_[(q + i) / shape_.share] >> c, load(s_.far_p + i * PAGE + c), load(p)));
            }
    }

    // Runs of rows that see the page in place share one reading of it; rows that see it scattered are processed one by one.
    void attend_page(int64_t page, bool more) {
        int64_t in_place = 0, any = -1;
        bool gather = false;
        for (int64_t i = 0; i < count_; i++) {
            bits_[i] = visible(lines_[i], page * PAGE, job_.window);
            scattered_[i] = bits_[i] && scattered(lines_[i], page * PAGE);
            gather |= scattered_[i];
            if (!bits_[i] || scattered_[i]) continue;
            pick(i, page);
            if (!bits_[i]) continue;
            sinks_[i] = sink_slots(lines_[i], page * PAGE, bits_[i]);
            in_place++;
            any = i;
        }
        if (any >= 0) attend_in_place(page, *lines_[any].seq, in_place * shape_.share, more);
        if (!gather) return;
        if (!tail_scored_) score_tail();
        for (int64_t i = 0; i < count_; i++)
            if (scattered_[i]) attend_scattered(i, page * PAGE);
    }

    // The slots that the queries of a row read of those that the row sees in place; never more than the row sees.
    void pick(int64_t i, int64_t page) {
        uint32_t any = 0;
        for (int64_t g = 0; g < shape_.share; g++) any |= s_.picks[i * shape_.share + g] = bits_[i] & picked(i, g, page);
        bits_[i] = any;
    }

    void attend_in_place(int64_t page, const Seq& seq, int64_t queries, bool more) {
        const Unit here = unit(seq, page);
        const uint8_t* next = more ? unit(seq, page + 1).at : then_;
        turn_keys(here);
        const bool raw = here.pool->kind != I4 && (paired_ || (direct_ && queries <= WIDE));  // else converts values to float32 once
        if (!raw)
            for (int64_t slot = 0; slot < PAGE; slot++) take_value(here, slot, slot);
        for (int64_t i = 0; i < count_;) {
            if (!bits_[i] || scattered_[i]) {
                i++;
                continue;
            }
            int64_t end = i + 1;
            while (end < count_ && bits_[end] && !scattered_[end]) end++;
            attend_run(i * shape_.share, end * shape_.share, raw ? here.at + pool_.values : nullptr, next);
            next = nullptr;
            i = end;
        }
    }

    int64_t row_bytes() const { return pool_.size * bytes_of(pool_.kind); }

    // Queries first..last of rows that see the page in place. raw: its values as stored, or null if they are in the scratch. next: the page
    // needed after this one, or null.
    void attend_run(int64_t first, int64_t last, const uint8_t* raw, const uint8_t* next) {
        for (int64_t q = first; q < last; q += BATCH, next = nullptr) {
            const int64_t count = at_most(last - q, BATCH);
            score_page(q, count, next);
            weigh(q, count);
            for (int64_t i = 0; i < count;) {
                const uint32_t bits = s_.picks[q + i];
                int64_t end = i + 1;
                while (end < count && s_.picks[q + end] == bits) end++;
                mix(q, i, end, bits, raw, raw && next && !i ? next + pool_.values - raw : 0);
                i = end;
            }
        }
    }

    // Adds the values selected by `bits` to the mixes of queries q + first .. q + last, with the weights of the batch.
    void mix(int64_t q, int64_t first, int64_t last, uint32_t bits, const uint8_t* raw, int64_t ahead) {
        float* to = s_.mix + (q + first) * shape_.padded;
        const float* p = s_.p + first * PAGE;
        const uint8_t* values = raw ? raw : reinterpret_cast<const uint8_t*>(s_.values);
#ifdef DOT_BF16
        if (paired_) return mix_pairs(p, last - first, bits, values, row_bytes(), ahead, shrink_ + first, to, shape_.padded, shape_.size);
#endif
        take(bits, raw ? row_bytes() : shape_.padded * 4, &taken_);
        if (raw && pool_.kind == BF16) mixes<Bfloat16>(p, last - first, taken_, values, ahead, shrink_ + first, to, shape_.padded, shape_.size);
        else mixes<Float32>(p, last - first, taken_, values, ahead, shrink_ + first, to, shape_.padded, shape_.size);
    }

    // Turns the dot products of queries q .. q + count into weights; shrink_ scales their sums and mixes so far.
    void weigh(int64_t q, int64_t count) {
        uint32_t raised = 0;
        for (int64_t i = 0; i < count; i++) raised |= uint32_t(bound(s_.p + i * PAGE, s_.picks[q + i], s_.most + q + i, shrink_ + i)) << i;
        if (raised)
            for (int64_t i = 0; i < count; i += Vec::N) store(shrink_ + i, exponential(load(shrink_ + i)));
        else
            for (int64_t i = 0; i < count; i += Vec::N) store(shrink_ + i, set1(1.0f));
        for (int64_t i = 0; i < count; i++) {
            if (s_.picks[q + i]) expand(s_.p + i * PAGE, s_.most[q + i], shrink_[i], (q + i) * 16);
            else clear(s_.p + i * PAGE, PAGE);  // of other heads of its row: their sums do not change
        }
    }

    // Scales and masks the dot products of a query; returns whether they raise its largest score, and by how much it was lower.
    bool bound(float* p, uint32_t bits, float* most, float* below) const {
        *below = 0.0f;
        if (!bits) return false;
        Vec x[SLOTS];
        for (int64_t c = 0; c < SLOTS; c++) {
            x[c] = load(p + c * Vec::N) * set1(job_.scale);
            if (bits != ~0u) x[c] = keep_where(bits >> (c * Vec::N), x[c], set1(minus_infinity()));
            store(p + c * Vec::N, x[c]);
        }
        for (int64_t c = 1; c < SLOTS; c++) x[0] = maximum(x[0], x[c]);
        const float before = *most;
        if (!any_above(x[0], set1(before))) return false;
        *most = peak(x[0]);
        *below = before - *most;
        return true;
    }

    void expand(float* p, float most, float shrink, int64_t place) const {
        float* sums = s_.sums + place;
        Vec x[SLOTS];
        for (int64_t c = 0; c < SLOTS; c++) x[c] = exponential(load(p + c * Vec::N) - set1(most));
#ifdef DOT_BF16
        if (paired_ && partials_.ends) store(s_.exact + place, fma(load(s_.exact + place), set1(shrink), x[0] + x[1]));
        if (paired_) return store(sums, keep_weights(x, p, load(sums) * set1(shrink)));
#endif
        for (int64_t c = 0; c < SLOTS; c++) store(p + c * Vec::N, x[c]);
        for (int64_t n = SLOTS / 2; n; n /= 2)
            for (int64_t c = 0; c < n; c++) x[c] = x[c] + x[c + n];
        store(sums, fma(load(sums), set1(shrink), x[0]));
    }

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
            turn_keys(unit(seq, slot / PAGE));
            const int64_t q = row * shape_.share, count = (count_ - row) * shape_.share, at = q * shape_.tail + slot - tail_first_;
            score(s_.q + q * shape_.padded, count, nullptr, s_.tail + at, shape_.tail);
            if (turned) score(s_.far + q * shape_.padded, count, nullptr, s_.far_tail + at, shape_.tail);
        }
    }

    // A row with path indices first .. first + 31 among other nodes: scores and values are gathered in path order.
    void attend_scattered(int64_t row, int64_t first) {
        const Line& line = lines_[row];
        int32_t slots[PAGE];
        slots_of(line, first, slots);
        const int64_t count = at_most(line.seen - first, PAGE);
        uint32_t sinks = 0;
        for (int64_t i = 0; i < count; i++) {
            const Unit from = unit(*line.seq, slots[i] / PAGE);
            const int64_t slot = slots[i] % PAGE, bytes = row_bytes();
            if (line.turned && position_of(line, slots[i]) < line.seq->sinks) sinks |= 1u << i;
            if (paired_) __builtin_memcpy(reinterpret_cast<uint8_t*>(s_.values) + i * bytes, from.at + pool_.values + slot * bytes, size_t(bytes));
            else take_value(from, slot, i);
        }
        for (int64_t g = 0; g < shape_.share; g++) {
            uint32_t read = 0;
            for (int64_t i = 0; i < count; i++) read |= (picked(row, g, slots[i] / PAGE) >> slots[i] % PAGE & 1) << i;
            s_.picks[row * shape_.share + g] = read & bits_[row];
        }
        for (int64_t g = 0; g < shape_.share; g += BATCH) {
            const int64_t q = row * shape_.share + g, some = at_most(shape_.share - g, BATCH);
            for (int64_t k = 0; k < some; k++) {
                float* scores = s_.p + k * PAGE;
                for (int64_t i = 0; i < PAGE; i++) {
                    const float* tail = sinks >> i & 1 ? s_.far_tail : s_.tail;
                    scores[i] = i < count ? tail[(q + k) * shape_.tail + slots[i] - tail_first_] : 0.0f;
                }
            }
            weigh(q, some);
            for (int64_t k = 0, end; k < some; k = end) {
                for (end = k + 1; end < some && s_.picks[q + end] == s_.picks[q + k]; end++) {}
                mix(q, k, end, s_.picks[q + k], nullptr, 0);
            }
        }
    }

    const AttendJob& job_;
    const Pool& pool_;
    const AttendShape& shape_;
    const Partials& partials_;
    const AttendRow* rows_;
    const uint8_t* then_;
    int64_t count_, kv_head_, words_, most_seen_ = 0, tail_first_ = 0;
    bool paired_;  // queries and pages of bf16, with products added in pairs
    bool direct_, tail_scored_ = false;
    Scratch s_;
    Taken taken_{};
    alignas(64) float shrink_[BATCH] = {};
    uint32_t bits_[MOST_ROWS], sinks_[MOST_ROWS] = {};
    bool scattered_[MOST_ROWS];
    Line lines_[MOST_ROWS];
};

inline void attend_task(const AttendJob& job, const AttendShape& shape, const AttendRow* rows, const AttendTask& task, int64_t kv_head,
                        const uint8_t* then, const Partials& partials, float* scratch) {
    Task one(job, shape, rows, task.rows, kv_head, then, partials, scratch);
    if (task.group < 0) one.all_groups();
    else one.one_group(task.group);
}

inline void attend_merge(const AttendJob& job, const AttendShape& shape, const AttendRow& row, int64_t groups, int64_t head,
                         const Partials& partials, float* scratch) {
    Scratch s;
    carve(shape, scratch, &s);
    float most = minus_infinity();
    Sums total{};
    for (int64_t c = 0; c < shape.padded; c += Vec::N) store(s.whole_mix + c, zero());
    for (int64_t group = 0; group < groups; group++) {
        const int64_t at = (row.partial + group) * job.heads + head;
        merge_group(&most, &total, s.whole_mix, partials.most[at], partials.sum[at], partials.mix + at * shape.padded, shape.size);
    }
    write_result(job, job.seqs[row.seq].first + row.row, head, most, total, s.whole_mix, partials);
}

inline void attend_watch(const AttendJob& job, const AttendShape& shape, const Watched& watched, int64_t kv_head, int64_t group, const Partials& partials,
                         float* scratch) {
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
    alignas(64) float some[WIDE * PAGE];
    for (int64_t first = 0; first < count; first += PAGE) {
        const int64_t width = at_most(count - first, PAGE);
        for (int64_t c = 0; c < size * PAGE; c += Vec::N) store(scratch + c, zero());
        for (int64_t i = 0; i < width; i++)
            for (int64_t d = 0; d < size; d++) scratch[d * PAGE + i] = b[(first + i) * size + d];
        for (int64_t r = 0, take; r < rows; r += take) {
            take = at_most(rows - r, WIDE);
            dots<Singles>(a + r * size, size, take, scratch, size, Ahead{}, some, PAGE);
            for (int64_t i = 0; i < take; i++) __builtin_memcpy(out + (r + i) * count + first, some + i * PAGE, size_t(width) * 4);
        }
    }
}

constexpr AttendKernels ATTEND = {attend_scratch, attend_task, attend_merge, encode, attend_watch};
