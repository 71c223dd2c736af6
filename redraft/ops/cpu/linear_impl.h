// Linear layers over packed panels. Included inside an anonymous namespace after vec_math.h. The including file first defines
// DOT_BF16 (vdpbf16ps) and DOT_INT8 (vpdpbusd) if it has them.
//
// An output element is one chain of multiply-adds over its inputs in order, in one lane of one register. Blocks of rows and outputs only
// decide which chains run side by side. Between chunks of inputs the sums are stored in memory, which changes no bit.

constexpr int64_t STEP = PANEL * 4;   // bytes of a step of a panel
constexpr int64_t STEPS = LINE / 4;   // steps of a line

inline const uint8_t* ahead(const uint8_t* p, int64_t by) {
    for (int64_t i = 0; i < STEP; i += 64) _mm_prefetch(reinterpret_cast<const char*>(p + by + i), _MM_HINT_T1);
    return p;
}

// Lines of weights that stay in cache while rows pass: the first cache for one tile, the second for more (docs/log.md).
inline int64_t chunk_of(int64_t rows) { return rows <= TALL || Vec::N == 8 ? 2 : 16; }

inline float number(const uint8_t* p) {
    float x;
    __builtin_memcpy(&x, p, 4);
    return x;
}
inline int32_t word(const uint8_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return x;
}

// One step of V registers of outputs for R rows. x: the bytes of the step of the first row, rows LINE apart.
struct FloatStep {
    static constexpr int64_t LINES = 1;  // lines of x for one line of weights
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t, int64_t s, Vec (&sums)[R][V]) {
        for (int v = 0; v < V; v++) {
            const Vec weight = load(reinterpret_cast<const float*>(w) + v * Vec::N);
            for (int r = 0; r < R; r++) sums[r][v] = fma(set1(number(x + r * LINE + s * 4)), weight, sums[r][v]);
        }
    }
};
#ifdef DOT_BF16
struct HalfStep {
    static constexpr int64_t LINES = 1;
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t, int64_t s, Vec (&sums)[R][V]) {
        for (int v = 0; v < V; v++) {
            const __m512bh weight = (__m512bh)_mm512_loadu_si512(w + v * 64);
            for (int r = 0; r < R; r++)
                sums[r][v].v = _mm512_dpbf16_ps(sums[r][v].v, (__m512bh)_mm512_set1_epi32(word(x + r * LINE + s * 4)), weight);
        }
    }
};
#else
struct HalfStep {  // x in float32: two lines of x for one line of weights
    static constexpr int64_t LINES = 2;
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t far, int64_t s, Vec (&sums)[R][V]) {
        const uint8_t* own = x + s / 8 * far + s % 8 * 8;
        for (int v = 0; v < V; v++) {
            Vec even, odd;
            halves(w + v * Vec::N * 4, even, odd);
            for (int r = 0; r < R; r++) sums[r][v] = fma(set1(number(own + r * LINE)), even, sums[r][v]);
            for (int r = 0; r < R; r++) sums[r][v] = fma(set1(number(own + r * LINE + 4)), odd, sums[r][v]);
        }
    }
};
#endif

// Lines of one panel for R rows; sums [R][64] continue from their values or from zero.
template <class Step, int R, int V>
void chains(const uint8_t* w, const uint8_t* x, int64_t tall, int64_t lines, float* sums, bool fresh, int64_t fetch) {
    for (int64_t part = 0; part < PANEL; part += V * Vec::N) {
        Vec held[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) held[r][v] = fresh ? zero() : load(sums + r * PANEL + part + v * Vec::N);
        const uint8_t *from = w + part * 4, *row = x;
        for (int64_t line = 0; line < lines; line++, row += Step::LINES * tall * LINE) {
            for (int64_t s = 0; s < STEPS; s++, from += STEP) {
                if (fetch) ahead(from, fetch);
                Step::template run<R, V>(from, row, tall * LINE, s, held);
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) store(sums + r * PANEL + part + v * Vec::N, held[r][v]);
    }
}

// Rows of one tile that fit in the registers.
template <class Step>
void some_rows(int64_t rows, const uint8_t* w, const uint8_t* x, int64_t tall, int64_t lines, float* sums, bool fresh, int64_t fetch) {
    constexpr int WIDE = PANEL / Vec::N, HALF = Vec::N == 16 ? WIDE : WIDE / 2, NARROW = Vec::N == 16 ? WIDE : WIDE / 4;
    switch (rows) {
        case 1: return chains<Step, 1, WIDE>(w, x, tall, lines, sums, fresh, fetch);
        case 2: return chains<Step, 2, HALF>(w, x, tall, lines, sums, fresh, fetch);
        case 3: return chains<Step, 3, HALF>(w, x, tall, lines, sums, fresh, fetch);
        case 4: return chains<Step, 4, NARROW>(w, x, tall, lines, sums, fresh, fetch);
        case 5: return chains<Step, 5, NARROW>(w, x, tall, lines, sums, fresh, fetch);
        default: return chains<Step, 6, NARROW>(w, x, tall, lines, sums, fresh, fetch);
    }
}

// One panel for all rows of x.
template <class Step>
void panel(const uint8_t* w, int64_t lines, const Rows& x, float* sums) {
    const int64_t chunk = x.rows <= 6 ? lines : chunk_of(x.rows);
    for (int64_t line = 0; line < lines; line += chunk) {
        const int64_t count = lines - line < chunk ? lines - line : chunk;
        for (int64_t block = 0; block < x.rows; block += TALL) {
            const int64_t tall = x.tall(block), parts = (tall + 5) / 6;
            const uint8_t* tile = x.data + block * x.lines() * LINE + line * Step::LINES * tall * LINE;
            for (int64_t part = 0; part < parts; part++) {
                const int64_t r = tall * part / parts, end = tall * (part + 1) / parts;
                const int64_t fetch = block || part ? 0 : x.rows <= 6 ? 8 * STEP : count * STEPS * STEP;
                some_rows<Step>(end - r, w + line * STEPS * STEP, tile + r * LINE, tall, count, sums + (block + r) * PANEL, line == 0, fetch);
            }
        }
    }
}

// ---- integers: codes of x times codes of w, exact in 32 bits

#ifdef DOT_INT8
constexpr int64_t INTS = 16;
struct Int {
    __m512i v;
};
inline Int no_int() { return {_mm512_setzero_si512()}; }
inline Int bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Int spread(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Int low_half(Int b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Int high_half(Int b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
inline Int dot_unsigned(Int sum, Int natural, Int whole) { return {_mm512_dpbusd_epi32(sum.v, natural.v, whole.v)}; }
inline void put(int32_t* p, Int x) { _mm512_storeu_si512(p, x.v); }
inline Int get(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// x shifted by 128 for vpdpbusd; the epilogue subtracts 128 times the sum of w
constexpr int32_t SHIFT = 128;
inline Int dot_signed(Int sum, Int x, Int w) { return {_mm512_dpbusd_epi32(sum.v, _mm512_xor_si512(x.v, _mm512_set1_epi8(-128)), w.v)}; }
#else
constexpr int64_t INTS = 8;
struct Int {
    __m256i v;
};
inline Int no_int() { return {_mm256_setzero_si256()}; }
inline Int bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Int spread(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Int low_half(Int b) { return {_mm256_and_si256(b.v, _mm256_set1_epi8(15))}; }
inline Int high_half(Int b) { return {_mm256_and_si256(_mm256_srli_epi16(b.v, 4), _mm256_set1_epi8(15))}; }
inline Int dot_unsigned(Int sum, Int natural, Int whole) {  // pairs in 16 bits: natural <= 15 or |whole| <= 127 prevents saturation
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(natural.v, whole.v), _mm256_set1_epi16(1)))};
}
inline void put(int32_t* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
inline Int get(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
constexpr int32_t SHIFT = 0;
inline Int dot_signed(Int sum, Int x, Int w) {  // codes are -127..127, so two products fit in 16 bits
    return dot_unsigned(sum, {_mm256_abs_epi8(x.v)}, {_mm256_sign_epi8(w.v, x.v)});
}
#endif

template <int R, int V>
void int8_chains(const uint8_t* w, const uint8_t* x, int64_t tall, int64_t lines, int32_t* sums, bool fresh, int64_t fetch) {
    for (int64_t part = 0; part < PANEL; part += V * INTS) {
        Int held[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) held[r][v] = fresh ? no_int() : get(sums + r * PANEL + part + v * INTS);
        const uint8_t *from = w + part * 4, *row = x;
        for (int64_t line = 0; line < lines; line++, row += tall * LINE) {
            for (int64_t s = 0; s < STEPS; s++, from += STEP) {
                if (fetch) ahead(from, fetch);
                for (int v = 0; v < V; v++) {
                    const Int weight = bytes(from + v * INTS * 4);
                    for (int r = 0; r < R; r++) held[r][v] = dot_signed(held[r][v], spread(word(row + r * LINE + s * 4)), weight);
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) put(sums + r * PANEL + part + v * INTS, held[r][v]);
    }
}

// Groups first..last of a panel of int4: the integer sum of each group becomes a float and is added with its scale, in order of groups.
template <int R, int V>
void int4_chains(const Linear& l, const uint8_t* w, const uint16_t* scales, const Rows& x, const int32_t* x_sums, int64_t r0, float* sums,
                 int64_t fetch) {
    const int64_t groups = l.groups(), steps = l.steps(), tall = x.tall(r0);
    const uint8_t* row = x.at(r0, 0);
    for (int64_t part = 0; part < PANEL; part += V * INTS) {
        for (int r = 0; r < R; r++)
            for (int64_t i = 0; i < V * INTS; i++) sums[r * PANEL + part + i] = 0;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * l.group / 4, last = g + 1 == groups ? steps : first + l.group / 4;
            Int held[R][V];
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) held[r][v] = no_int();
            for (int64_t s = first; s < last; s += 2) {
                const uint8_t *from = w + s / 2 * STEP + part * 4, *own = row + s / STEPS * tall * LINE + s % STEPS * 4;
                if (fetch) ahead(from, fetch);
                for (int v = 0; v < V; v++) {
                    const Int both = bytes(from + v * INTS * 4), low = low_half(both), high = high_half(both);
                    for (int r = 0; r < R; r++) {
                        held[r][v] = dot_unsigned(held[r][v], low, spread(word(own + r * LINE)));
                        held[r][v] = dot_unsigned(held[r][v], high, spread(word(own + r * LINE + 4)));
                    }
                }
            }
            alignas(64) int32_t whole[V * INTS];
            for (int r = 0; r < R; r++) {
                for (int v = 0; v < V; v++) put(whole + v * INTS, held[r][v]);
                const int32_t bias = 8 * x_sums[r * groups + g];  // codes are stored as code + 8
                for (int64_t i = 0; i < V * INTS; i++) whole[i] -= bias;
                for (int64_t i = 0; i < V * INTS; i += Vec::N) {
                    float* sum = sums + r * PANEL + part + i;
                    store(sum, fma(from_i32(whole + i), from_f16(scales + g * PANEL + part + i), load(sum)));
                }
            }
        }
    }
}

template <class Row>
void each_part(const Rows& x, Row row) {  // parts of a tile of up to 4 rows
    for (int64_t block = 0; block < x.rows; block += TALL) {
        const int64_t tall = x.tall(block), parts = (tall + 3) / 4;
        for (int64_t part = 0; part < parts; part++) row(block + tall * part / parts, tall * (part + 1) / parts - tall * part / parts);
    }
}

void int8_panel(const uint8_t* w, int64_t lines, const Rows& x, int32_t* sums) {
    constexpr int WIDE = PANEL / INTS, NARROW = INTS == 16 ? WIDE : WIDE / 4;
    const int64_t chunk = x.rows <= 4 ? lines : chunk_of(x.rows);
    for (int64_t line = 0; line < lines; line += chunk) {
        const int64_t count = lines - line < chunk ? lines - line : chunk;
        each_part(x, [&](int64_t r, int64_t rows) {
            const int64_t tall = x.tall(r), fetch = r ? 0 : x.rows <= 4 ? 8 * STEP : count * STEPS * STEP;
            const uint8_t *from = w + line * STEPS * STEP, *own = x.at(r, 0) + line * tall * LINE;
            int32_t* to = sums + r * PANEL;
            switch (rows) {
                case 1: return int8_chains<1, WIDE>(from, own, tall, count, to, line == 0, fetch);
                case 2: return int8_chains<2, NARROW>(from, own, tall, count, to, line == 0, fetch);
                case 3: return int8_chains<3, NARROW>(from, own, tall, count, to, line == 0, fetch);
                default: return int8_chains<4, NARROW>(from, own, tall, count, to, line == 0, fetch);
            }
        });
    }
}

void int4_panel(const LinearJob& j, const uint8_t* w, const uint16_t* scales, float* sums) {
    constexpr int WIDE = PANEL / INTS, NARROW = INTS == 16 ? WIDE : WIDE / 4;
    each_part(j.x, [&](int64_t r, int64_t rows) {
        const int32_t* x_sums = j.x_sums + r * j.w.groups();
        const int64_t fetch = r ? 0 : 8 * STEP;
        float* to = sums + r * PANEL;
        switch (rows) {
            case 1: return int4_chains<1, WIDE>(j.w, w, scales, j.x, x_sums, r, to, fetch);
            case 2: return int4_chains<2, NARROW>(j.w, w, scales, j.x, x_sums, r, to, fetch);
            case 3: return int4_chains<3, NARROW>(j.w, w, scales, j.x, x_sums, r, to, fetch);
            default: return int4_chains<4, NARROW>(j.w, w, scales, j.x, x_sums, r, to, fetch);
        }
    });
}

// ---- epilogue of the sums

// The numbers of N outputs from `at` on: scaled if they are sums of codes, with their bias.
inline Vec finished(const LinearJob& j, int64_t p, int64_t r, int64_t at, const float* sums) {
    const int64_t out = p * PANEL + at;
    Vec y;
    if (j.w.kind == I8) {
        alignas(64) int32_t whole[Vec::N];
        const int32_t* codes = reinterpret_cast<const int32_t*>(sums) + r * PANEL + at;
        for (int i = 0; i < Vec::N; i++) whole[i] = codes[i] - SHIFT * j.w.sums[out + i];
        y = from_i32(whole) * (set1(j.x_scale[r]) * load(j.w.scale + out));
    } else {
        y = load(sums + r * PANEL + at);
        if (j.w.kind == I4) y = y * set1(j.x_scale[r]);
    }
    const int64_t beside = j.w.outliers;
    for (int64_t i = 0; i < beside; i++)  // not fused: the product and then the sum are rounded
        y = y + set1(j.x_outliers[r * beside + i]) * load(j.w.side + (p * beside + i) * PANEL + at);
    return j.w.bias ? y + load(j.w.bias + out) : y;
}

inline Vec activated(Vec x, Activation activation) {
    switch (activation) {
        case SILU: return x / (set1(1.0f) + exponential(zero() - x));
        case GELU_TANH: {
            const Vec inner = set1(0.7978845608028654f) * fma(set1(0.044715f) * x, x * x, x);
            const Vec t = set1(1.0f) - set1(2.0f) / (exponential(inner + inner) + set1(1.0f));
            return set1(0.5f) * x * (set1(1.0f) + t);
        }
        case GELU: {
            alignas(64) float t[Vec::N];
            store(t, x);
            for (int i = 0; i < Vec::N; i++) t[i] = 0.5f * t[i] * (1.0f + __builtin_erff(t[i] * 0.70710678118654752f));
            return load(t);
        }
        case RELU: return maximum(x, zero());
        default: return x;
    }
}

// Inserts into the largest so far, best first; of equal ones the earlier stays first. NaN is above all numbers, as in PyTorch.
inline bool above(float a, float b) { return a > b || (a != a && b == b); }
inline bool goes_before(Best one, Best other) { return other.index < 0 || above(one.value, other.value); }
inline void insert(Best* best, int64_t keep, Best one) {
    if (!goes_before(one, best[keep - 1])) return;
    int64_t at = keep - 1;
    for (; at > 0 && goes_before(one, best[at - 1]); at--) best[at] = best[at - 1];
    best[at] = one;
}

void settle(const LinearJob& j, int64_t p, const float* sums) {
    if (j.best) {
        const int64_t live = j.w.outs - p * PANEL < PANEL ? j.w.outs - p * PANEL : PANEL;
        for (int64_t r = 0; r < j.x.rows; r++) {
            alignas(64) float y[PANEL];
            Best* best = j.best + r * j.keep;
            const Vec least = set1(best[j.keep - 1].value);
            bool some = best[j.keep - 1].index < 0;  // not full yet
            for (int64_t at = 0; at < PANEL; at += Vec::N) {
                const Vec found = rounded(finished(j, p, r, at, sums), j.rounded);
                store(y + at, found);
                some |= any_above(found, least);
            }
            for (int64_t i = 0; some && i < live; i++) insert(best, j.keep, {y[i], int32_t(p * PANEL + i)});
        }
        return;
    }
    const Kind kind = j.y.kind;
    const bool fused = j.w.gated && j.activation != NONE, halves = j.w.gated && !fused;
    const int64_t wide = j.w.gated ? PANEL / 2 : PANEL, per_line = LINE / bytes_of(kind), up = j.w.outs / 2;
    // the padding of a tile is written too: those sums are zero
    const int64_t end = halves ? up : j.y.stride ? j.y.cols : j.y.lines() * per_line;
    for (int64_t r = 0; r < j.x.rows; r++) {
        for (int64_t at = 0; at < wide && p * wide + at < end; at += Vec::N) {
            const int64_t c = p * wide + at, count = end - c;
            Vec y = finished(j, p, r, at, sums);
            if (j.activation != NONE) y = activated(rounded(y, j.rounded), j.activation);
            if (fused) y = y * rounded(finished(j, p, r, at + wide, sums), j.rounded);
            if (halves) write_some(j.y.at(r, up + c), kind, finished(j, p, r, at + wide, sums), count);
            uint8_t* to = j.y.at(r, c);
            if (j.add) y = read_some(to, kind, count) + rounded(y, j.rounded);
            write_some(to, kind, rounded(y, j.rounded), count);
        }
    }
}

void linear(const LinearJob& j, int64_t first, int64_t last, float* scratch) {
    const int64_t lines = j.w.steps() / STEPS, size = j.w.panel_bytes();
    for (int64_t p = first; p < last; p++) {
        const uint8_t* w = j.w.panels + p * size;
        switch (j.w.kind) {
            case F32: panel<FloatStep>(w, lines, j.x, scratch); break;
            case BF16: panel<HalfStep>(w, lines, j.x, scratch); break;
            case I8: int8_panel(w, lines, j.x, reinterpret_cast<int32_t*>(scratch)); break;
            case I4: int4_panel(j, w, j.w.scales + p * j.w.groups() * PANEL, scratch); break;
        }
        settle(j, p, scratch);
    }
}

Kind takes(Kind weights) {
#ifdef DOT_BF16
    return weights == I4 ? I8 : weights;
#else
    return weights == I4 ? I8 : weights == BF16 ? F32 : weights;
#endif
}
