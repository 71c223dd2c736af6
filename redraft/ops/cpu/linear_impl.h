// Linear layers over packed panels. Included inside an anonymous namespace after vec_math.h. The including file first defines
// DOT_BF16 (vdpbf16ps) and DOT_INT8 (vpdpbusd) if it has them.
//
// An output element is one chain of multiply-adds over its inputs in order, in one lane of one register. Blocks of rows and outputs only
// decide which chains run side by side. Between chunks of inputs the sums are stored in memory, which changes no bit.

constexpr int64_t STEP = PANEL * 4;   // bytes of a step of a panel
constexpr int64_t STEPS = LINE / 4;   // steps of a line
constexpr int64_t CACHED = 32768;     // bytes of a panel that stay in the first caches while many rows pass
constexpr int64_t FEW_ROWS = 6;

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

inline void fetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

// Outputs first..last of a panel: all of it, or a half if workers share it.
struct Piece {
    int64_t panel, first, last;
    int64_t width() const { return last - first; }
};

// Weights that are read soon are fetched into the second cache. Few rows: with every step the weights `near` bytes after it. Many rows:
// near is 0, and at every quarter of a line `each` half steps of the next weights, `apart` bytes from one to the next, so memory is
// busy during all passes over these.
struct Soon {
    int64_t near;
    const uint8_t* next;
    int64_t each, apart;

    template <int64_t BYTES>
    void step(const uint8_t* w) const {
        if (near)
            for (int64_t i = 0; i < BYTES; i += 64) fetch(w + near + i);
    }
    void quarter() {
        for (int64_t i = 0; i < each; i++, next += apart) fetch(next), fetch(next + STEP / 4);
    }
};
static_assert(STEP / 2 == 128);  // two cache lines

// ---- integers: codes of x times codes of w, exact in 32 bits

#ifdef DOT_INT8
struct Int {
    static constexpr int N = 16;
    __m512i v;
};
inline Int spread(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Int bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void put(float* p, Int x) { _mm512_storeu_si512(p, x.v); }
inline Int low_half(Int b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Int high_half(Int b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
inline Int dot_unsigned(Int sum, Int natural, Int whole) {  // gcc 12 copies the sums of the intrinsic in some loops
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(natural.v), "v"(whole.v));
    return sum;
}
struct Floats {  // as many as Int has numbers
    __m512 v;
};
inline Floats halves_of(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Floats times(Floats x, const int8_t* p) {
    return {_mm512_mul_ps(x.v, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))))};
}
inline void add_scaled(Floats& sum, Int x, Floats scale) { sum.v = _mm512_fmadd_ps(_mm512_cvtepi32_ps(x.v), scale.v, sum.v); }
inline void add_scaled(Floats& sum, float x, Floats scale) { sum.v = _mm512_fmadd_ps(_mm512_set1_ps(x), scale.v, sum.v); }
inline Floats times(Floats x, float by) { return {_mm512_mul_ps(x.v, _mm512_set1_ps(by))}; }
inline void put(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline void get(const float* p, Floats& x) { x.v = _mm512_loadu_ps(p); }
inline void clear(Floats& x) { x.v = _mm512_setzero_ps(); }
// codes of x for int8 weights are stored with 128 added, for vpdpbusd; the epilogue subtracts 128 times the sum of w
constexpr int32_t SHIFT = 128;
inline Int dot_codes(Int sum, Int x, Int w) { return dot_unsigned(sum, x, w); }
// codes of w with groups get 128 added when they are read; sums start at WIDE_START times the sum of x
constexpr int32_t WIDE_START = -128;
inline Int natural(Int w) { return {_mm512_xor_si512(w.v, _mm512_set1_epi8(int8_t(0x80)))}; }
inline Int dot_wide(Int sum, Int w, Int x) { return dot_unsigned(sum, w, x); }
inline Int shift_of(const int32_t* sums) { return {_mm512_slli_epi32(_mm512_loadu_si512(sums), 7)}; }
inline Vec total(const float* sums, Int shift) { return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(sums), shift.v))}; }
#else
struct Int {
    static constexpr int N = 8;
    __m256i v;
};
inline Int spread(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Int bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
inline void put(float* p, Int x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
inline Int low_half(Int b) { return {_mm256_and_si256(b.v, _mm256_set1_epi8(15))}; }
inline Int high_half(Int b) { return {_mm256_and_si256(_mm256_srli_epi16(b.v, 4), _mm256_set1_epi8(15))}; }
inline Int dot_unsigned(Int sum, Int natural, Int whole) {  // pairs in 16 bits: natural <= 15 or |whole| <= 127 prevents saturation
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(natural.v, whole.v), _mm256_set1_epi16(1)))};
}
struct Floats {  // as many as Int has numbers
    __m256 v;
};
inline Floats halves_of(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Floats times(Floats x, const int8_t* p) {
    return {_mm256_mul_ps(x.v, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))))};
}
inline void add_scaled(Floats& sum, Int x, Floats scale) { sum.v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(x.v), scale.v, sum.v); }
inline void add_scaled(Floats& sum, float x, Floats scale) { sum.v = _mm256_fmadd_ps(_mm256_set1_ps(x), scale.v, sum.v); }
inline Floats times(Floats x, float by) { return {_mm256_mul_ps(x.v, _mm256_set1_ps(by))}; }
inline void put(float* p, Floats x) { _mm256_storeu_ps(p, x.v); }
inline void get(const float* p, Floats& x) { x.v = _mm256_loadu_ps(p); }
inline void clear(Floats& x) { x.v = _mm256_setzero_ps(); }
constexpr int32_t SHIFT = 0;
inline Int dot_codes(Int sum, Int x, Int w) {  // codes are -127..127, so two products fit in 16 bits
    return dot_unsigned(sum, {_mm256_abs_epi8(x.v)}, {_mm256_sign_epi8(w.v, x.v)});
}
constexpr int32_t WIDE_START = 0;
inline Int natural(Int w) { return w; }
inline Int dot_wide(Int sum, Int w, Int x) { return dot_codes(sum, x, w); }
inline Int shift_of(const int32_t*) { return spread(0); }
inline Vec total(const float* sums, Int) { return from_i32(reinterpret_cast<const int32_t*>(sums)); }
#endif

inline void put(float* p, Vec x) { store(p, x); }
inline void get(const float* p, Vec& x) { x = load(p); }
inline void get(const float* p, Int& x) { x = bytes(p); }
inline void clear(Vec& x) { x = zero(); }
inline void clear(Int& x) { x = spread(0); }

// ---- one step of V registers of outputs for R rows. x: the bytes of the step of the first row, rows LINE apart.

struct FloatStep {
    using Sum = Vec;
    static constexpr int64_t LINES = 1;  // lines of x for one line of weights
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t, int64_t s, Vec (&sums)[R][V]) {
        Vec weight[V];
        for (int v = 0; v < V; v++) weight[v] = load(reinterpret_cast<const float*>(w) + v * Vec::N);
        for (int r = 0; r < R; r++) {
            const Vec one = set1(number(x + r * LINE + s * 4));
            for (int v = 0; v < V; v++) sums[r][v] = fma(one, weight[v], sums[r][v]);
        }
    }
};
#ifdef DOT_BF16
struct HalfStep {
    using Sum = Vec;
    static constexpr int64_t LINES = 1;
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t, int64_t s, Vec (&sums)[R][V]) {
        __m512bh weight[V];
        for (int v = 0; v < V; v++) weight[v] = (__m512bh)_mm512_loadu_si512(w + v * 64);
        for (int r = 0; r < R; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(word(x + r * LINE + s * 4));
            for (int v = 0; v < V; v++) sums[r][v].v = _mm512_dpbf16_ps(sums[r][v].v, pair, weight[v]);
        }
    }
};
#else
struct HalfStep {  // x in float32: two lines of x for one line of weights
    using Sum = Vec;
    static constexpr int64_t LINES = 2;
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t far, int64_t s, Vec (&sums)[R][V]) {
        const uint8_t* own = x + s / 8 * far + s % 8 * 8;
        Vec even[V], odd[V];
        for (int v = 0; v < V; v++) halves(w + v * Vec::N * 4, even[v], odd[v]);
        for (int r = 0; r < R; r++) {
            const Vec one = set1(number(own + r * LINE));
            for (int v = 0; v < V; v++) sums[r][v] = fma(one, even[v], sums[r][v]);
        }
        for (int r = 0; r < R; r++) {
            const Vec one = set1(number(own + r * LINE + 4));
            for (int v = 0; v < V; v++) sums[r][v] = fma(one, odd[v], sums[r][v]);
        }
    }
};
#endif
struct CodeStep {
    using Sum = Int;
    static constexpr int64_t LINES = 1;
    template <int R, int V>
    static void run(const uint8_t* w, const uint8_t* x, int64_t, int64_t s, Int (&sums)[R][V]) {
        Int weight[V];
        for (int v = 0; v < V; v++) weight[v] = bytes(w + v * Int::N * 4);
        for (int r = 0; r < R; r++) {
            const Int four = spread(word(x + r * LINE + s * 4));
            for (int v = 0; v < V; v++) sums[r][v] = dot_codes(sums[r][v], four, weight[v]);
        }
    }
};

// ---- tiles: R rows from r on, lines or groups first..last of a piece. sums: [R][64], continued unless first is 0.

constexpr int registers(int many, int few) { return Vec::N == 16 ? many : few; }

template <class Step>
struct Lines {
    using Sum = typename Step::Sum;
    static constexpr int SUMS = registers(24, 12), HIGH = SUMS / 2;  // registers of sums; rows at most
    static constexpr int64_t QUARTER = 4 * STEP;  // bytes of weights of a panel for a quarter of a line of x
    static int64_t count(const Linear& w) { return w.steps() / STEPS; }
    static int64_t size(const Linear&) { return STEPS * STEP; }
    static constexpr int registers_for(int rows) {  // of outputs
        int v = PANEL / Sum::N;
        while (v * rows > SUMS) v /= 2;
        return v;
    }

    template <int R, int V>
    static void run(const LinearJob& j, Piece piece, int64_t r, int64_t first, int64_t last, float* sums, Soon& soon) {
        const int64_t tall = j.x.tall(r) * LINE;
        const uint8_t *w = j.w.panels + piece.panel * j.w.panel_bytes() + first * STEPS * STEP, *x = j.x.at(r, 0) + first * Step::LINES * tall;
        for (int64_t part = piece.first; part < piece.last; part += V * Sum::N) {
            Sum held[R][V];
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++) first ? get(sums + i * PANEL + part + v * Sum::N, held[i][v]) : clear(held[i][v]);
            const uint8_t *from = w + part * 4, *row = x;
            for (int64_t line = first; line < last; line++, row += Step::LINES * tall) {
                for (int64_t s = 0; s < STEPS; s += 4, from += 4 * STEP) {
                    soon.quarter();
#pragma GCC unroll 4
                    for (int64_t i = 0; i < 4; i++) {
                        soon.step<V * Sum::N * 4>(from + i * STEP);
                        Step::template run<R, V>(from + i * STEP, row, tall, s + i, held);
                    }
                }
            }
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++) put(sums + i * PANEL + part + v * Sum::N, held[i][v]);
        }
    }
};

// The scale or low of outputs from `part` on in group g of panel p.
inline Floats of_group(const Linear& w, const uint16_t* halves, const int8_t* factors, int64_t p, int64_t g, int64_t part) {
    if (!factors) return halves_of(halves + (p * w.groups() + g) * PANEL + part);
    return times(halves_of(halves + (p * w.tops() + g / w.per) * PANEL + part), factors + (p * w.groups() + g) * PANEL + part);
}

// The sum of the codes of group g of a row times its factor, if there are lows.
inline float real_sum(const Coded& row, int64_t g) { return number(reinterpret_cast<const uint8_t*>(row.sums + g)); }

// The integer that the sums of group g of a row start with, `each` times the sum of its codes.
inline Int start_of(const Linear& w, int32_t each, const Coded& row, int64_t g) {
    return spread(each * (w.lows ? int32_t(real_sum(row, g) / row.factors[g]) : row.sums[g]));
}

// Codes with a scale for each group: its integer sum becomes a float and is added with the scale times the factor of the row, in order of
// groups. Both kinds of sums and the weights of two steps are held in registers, as far as there are enough of them.
template <bool WIDE>
struct Groups {
    using Sum = Int;
#ifdef DOT_BF16  // processors with it unpack beside the products, so unpacking again costs less than more broadcasts of x
    static constexpr int HIGH = 6;
#else
    static constexpr int HIGH = registers(12, 4);
#endif
    static constexpr int HELD = registers(28, 20);
    static constexpr int64_t EACH = WIDE ? STEP : STEP / 2;  // bytes of a step of a panel
    static constexpr int64_t QUARTER = 4 * EACH;
    static int64_t count(const Linear& w) { return w.groups(); }
    static int64_t size(const Linear& w) { return w.group / 4 * EACH; }
    static constexpr int registers_for(int rows) {
        int v = 4;
        while (v > 1 && 2 * v * (rows + 1) > HELD) v /= 2;
        return v;
    }

    // Two steps of V registers of outputs. 4 bits: the weights' low halves belong to the first, the high halves to the second.
    template <int R, int V>
    INLINE static void pair(const uint8_t* w, const uint8_t* x, Int (&sums)[R][V]) {
        Int low[V], high[V];
        for (int v = 0; v < V; v++) {
            const Int both = bytes(w + v * Int::N * 4);
            if (WIDE) low[v] = natural(both), high[v] = natural(bytes(w + STEP + v * Int::N * 4));
            else low[v] = low_half(both), high[v] = high_half(both);
        }
        for (int i = 0; i < R; i++) {
            const Int one = spread(word(x + i * LINE)), other = spread(word(x + i * LINE + 4));
            for (int v = 0; v < V; v++)
                sums[i][v] = WIDE ? dot_wide(dot_wide(sums[i][v], low[v], one), high[v], other) : dot_unsigned(dot_unsigned(sums[i][v], low[v], one), high[v], other);
        }
    }

    template <int R, int V>
    static void run(const LinearJob& j, Piece piece, int64_t r, int64_t first, int64_t last, float* sums, Soon& soon) {
        const int64_t p = piece.panel, groups = j.w.groups(), steps = j.w.steps(), group = j.w.group / 4, tall = j.x.tall(r) * LINE;
        const uint8_t *w = j.w.panels + p * j.w.panel_bytes(), *x = j.x.at(r, 0);
        const int32_t each = WIDE ? WIDE_START : -int32_t(j.w.offset());
        Coded row[R];
        for (int i = 0; i < R; i++) row[i] = j.codes.from(j.w, r + i);
        for (int64_t part = piece.first; part < piece.last; part += V * Int::N) {
            Floats whole[R][V];
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++) first ? get(sums + i * PANEL + part + v * Int::N, whole[i][v]) : clear(whole[i][v]);
            for (int64_t g = first; g < last; g++) {
                const int64_t begin = g * group, end = g + 1 == groups ? steps : begin + group;
                Int held[R][V];
                for (int i = 0; i < R; i++) {
                    const Int start = each ? start_of(j.w, each, row[i], g) : spread(0);
                    for (int v = 0; v < V; v++) held[i][v] = start;
                }
                const uint8_t *from = w + begin * EACH + part * 4, *own = x + begin / STEPS * tall + begin % STEPS * 4;
                for (int64_t s = begin; s < end; s += 4, from += 4 * EACH, own += 16) {
                    soon.quarter();
                    for (int64_t half = 0; half < 2; half++) {
                        const uint8_t* now = from + half * 2 * EACH;
                        soon.step<V * Int::N * 4>(now);
                        if (WIDE) soon.step<V * Int::N * 4>(now + STEP);
                        pair<R, V>(now, own + half * 8, held);
                    }
                    if ((s + 4) % STEPS == 0) own += tall - LINE;
                }
                for (int v = 0; v < V; v++) {
                    const Floats scale = of_group(j.w, j.w.scales, j.w.factors, p, g, part + v * Int::N);
                    for (int i = 0; i < R; i++) add_scaled(whole[i][v], held[i][v], times(scale, row[i].factors[g]));
                    if (!j.w.lows) continue;
                    const Floats low = of_group(j.w, j.w.lows, j.w.offsets, p, g, part + v * Int::N);
                    for (int i = 0; i < R; i++) add_scaled(whole[i][v], real_sum(row[i], g), low);
                }
            }
            for (int i = 0; i < R; i++)
                for (int v = 0; v < V; v++) put(sums + i * PANEL + part + v * Int::N, whole[i][v]);
        }
    }
};

template <class Tile, int R = Tile::HIGH>
void some_rows(int64_t rows, const LinearJob& j, Piece piece, int64_t r, int64_t first, int64_t last, float* sums, Soon& soon) {
    constexpr int V = Tile::registers_for(R), HALF = PANEL / 2 / Tile::Sum::N, FEWER = V < HALF ? V : HALF;
    if (rows == R && piece.width() == PANEL) return Tile::template run<R, V>(j, piece, r, first, last, sums, soon);
    if (rows == R) return Tile::template run<R, FEWER>(j, piece, r, first, last, sums, soon);
    if constexpr (R > 1) some_rows<Tile, R - 1>(rows, j, piece, r, first, last, sums, soon);
}

// One piece for all rows, in chunks that many rows pass over while they are cached.
template <class Tile>
void run_piece(const LinearJob& j, Piece piece, float* sums) {
    const auto parts_of = [](int64_t rows) { return (rows + Tile::HIGH - 1) / Tile::HIGH; };
    const Rows& x = j.x;
    const int64_t all = Tile::count(j.w), size = Tile::size(j.w), most = CACHED / size;
    const int64_t chunk = x.rows <= Tile::HIGH ? all : most < 1 ? 1 : most;
    const int64_t passes = x.rows / TALL * parts_of(TALL) + parts_of(x.rows % TALL);
    for (int64_t first = 0; first < all; first += chunk) {
        const int64_t last = first + chunk < all ? first + chunk : all;
        Soon soon{(x.rows + 1) * 4 * STEP, nullptr, 0, 0};  // a time ahead: steps of more rows take longer
        if (x.rows > FEW_ROWS) {
            const int64_t tall = x.tall(0), parts = parts_of(tall), halves = piece.width() / (PANEL / 2);
            const int64_t turns = passes * (piece.width() / Tile::Sum::N / Tile::registers_for(int((tall + parts - 1) / parts)));
            const uint8_t* next = j.w.panels + piece.panel * j.w.panel_bytes() + last * size + piece.first * 4;
            soon = {0, next, (Tile::QUARTER / STEP * halves + turns - 1) / turns, STEP / halves};
        }
        for (int64_t block = 0; block < x.rows; block += TALL) {
            const int64_t tall = x.tall(block), parts = parts_of(tall);
            for (int64_t part = 0; part < parts; part++) {
                const int64_t r = tall * part / parts, end = tall * (part + 1) / parts;
                some_rows<Tile>(end - r, j, piece, block + r, first, last, sums + (block + r) * PANEL, soon);
            }
        }
    }
}

// ---- epilogue of the sums

// N outputs of a panel from `at` on: scaled if they are sums of codes, with their bias. What all rows share is loaded once.
struct Outputs {
    const LinearJob& j;
    const int64_t p, at;
    Vec scale = zero(), bias = zero();
    Int shift = spread(0);

    INLINE Outputs(const LinearJob& job, int64_t panel, int64_t first) : j(job), p(panel), at(first) {
        const int64_t out = p * PANEL + at;
        if (j.w.kind == I8) scale = load(j.w.scale + out), shift = shift_of(j.w.sums + out);
        if (j.w.bias) bias = load(j.w.bias + out);
    }
    // Of weights of kind W without outliers, before the bias.
    template <Kind W>
    INLINE Vec plain(int64_t r, const float* sums) const {
        const float* from = sums + r * PANEL + at;
        if (W == I8) return total(from, shift) * (set1(j.codes.scale[r]) * scale);
        return W == I4 ? load(from) * set1(j.codes.scale[r]) : load(from);
    }
    INLINE Vec of(int64_t r, const float* sums) const {
        Vec y = j.w.kind == I8 ? plain<I8>(r, sums) : j.w.grouped() ? plain<I4>(r, sums) : plain<F32>(r, sums);
        const int64_t beside = j.w.outliers;
        for (int64_t i = 0; i < beside; i++)  // not fused: the product and then the sum are rounded
            y = y + set1(j.codes.outliers[r * beside + i]) * load(j.w.side + (p * beside + i) * PANEL + at);
        return j.w.bias ? y + bias : y;
    }
};

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
        case SIGMOID: return set1(1.0f) / (set1(1.0f) + exponential(zero() - x));
        case QUICK_GELU: return x / (set1(1.0f) + exponential(set1(-1.702f) * x));
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

// The frequent cases of an epilogue, each with a loop of its own: whole registers of outputs without outliers.
enum Case { WRITE, ADD, SWIGLU };
using Settle = void (*)(const Outputs& own, const Outputs& other, int64_t c, const float* sums);

template <Kind W, Kind Y, Kind ROUNDED, Case CASE>
void settle_rows(const Outputs& own, const Outputs& other, int64_t c, const float* sums) {
    const LinearJob& j = own.j;
    const bool biased = j.w.bias;
    const int64_t by = j.y.stride ? j.y.stride : LINE;
    for (int64_t block = 0; block < j.x.rows; block += TALL) {
        const int64_t end = block + j.y.tall(block);
        uint8_t* to = j.y.at(block, c);
        for (int64_t r = block; r < end; r++, to += by) {
            Vec y = own.plain<W>(r, sums);
            if (biased) y = y + own.bias;
            if (CASE == SWIGLU) {
                Vec up = other.plain<W>(r, sums);
                if (biased) up = up + other.bias;
                y = activated(rounded(y, ROUNDED), SILU) * rounded(up, ROUNDED);
            }
            if (CASE == ADD) y = read(to, Y) + rounded(y, ROUNDED);
            write(to, Y, Y == BF16 ? y : rounded(y, ROUNDED));  // writing bf16 rounds
        }
    }
}

template <Kind W, Kind Y, Kind ROUNDED>
Settle settle_of(Case which) {
    return which == WRITE ? settle_rows<W, Y, ROUNDED, WRITE> : which == ADD ? settle_rows<W, Y, ROUNDED, ADD> : settle_rows<W, Y, ROUNDED, SWIGLU>;
}
template <Kind W>
Settle settle_of(Case which, Kind y, Kind rounded) {
    return y == BF16 ? settle_of<W, BF16, BF16>(which) : rounded == BF16 ? settle_of<W, F32, BF16>(which) : settle_of<W, F32, F32>(which);
}
Settle settle_of(const LinearJob& j) {  // null: none of the frequent cases
    if (j.w.outliers || j.bounded() || (j.w.gated ? j.activation != SILU || j.add : j.activation != NONE)) return nullptr;
    const Case which = j.w.gated ? SWIGLU : j.add ? ADD : WRITE;
    if (j.w.kind == I8) return settle_of<I8>(which, j.y.kind, j.rounded);
    return j.w.grouped() ? settle_of<I4>(which, j.y.kind, j.rounded) : settle_of<F32>(which, j.y.kind, j.rounded);
}

// The outputs of all rows replace their sums, and are written if y has data; then the largest are found.
void settle_best(const LinearJob& j, Piece piece, float* sums) {
    const int64_t from = piece.panel * PANEL, live = j.w.outs - from < piece.last ? j.w.outs - from : piece.last;
    LinearJob own = j;
    own.y = {reinterpret_cast<uint8_t*>(sums), j.x.rows, PANEL, PANEL * int64_t(sizeof(float)), F32};
    const Settle frequent = settle_of(own);
    for (int64_t at = piece.first; at < piece.last; at += Vec::N) {
        const Outputs outputs(own, piece.panel, at);
        if (frequent) frequent(outputs, outputs, at, sums);
        else
            for (int64_t r = 0; r < j.x.rows; r++) store(sums + r * PANEL + at, rounded(outputs.of(r, sums), j.rounded));
    }
    for (int64_t r = 0; r < j.x.rows; r++) {
        const float* y = sums + r * PANEL;
        if (j.y.data && live > piece.first) __builtin_memcpy(j.y.at(r, from + piece.first), y + piece.first, size_t(live - piece.first) * sizeof(float));
        Best* best = j.best + r * j.keep;
        const Vec least = set1(best[j.keep - 1].value);
        bool some = best[j.keep - 1].index < 0;  // not full yet
        for (int64_t at = piece.first; at < piece.last; at += Vec::N) some |= any_above(load(y + at), least);
        for (int64_t i = piece.first; some && i < live; i++) insert(best, j.keep, {y[i], int32_t(from + i)});
    }
}

void settle(const LinearJob& job, Piece piece, float* sums) {
    const LinearJob j = job;  // a copy: no store can change it, so its fields stay in registers
    if (j.best) return settle_best(j, piece, sums);
    const int64_t p = piece.panel;
    const Kind kind = j.y.kind;
    const bool fused = j.w.gated && j.activation != NONE, halves = j.w.gated && !fused;
    const int64_t wide = j.w.gated ? PANEL / 2 : PANEL, per_line = LINE / bytes_of(kind), up = j.w.outs / 2;
    const int64_t stop = j.w.gated ? wide : piece.last;
    // the padding of a tile is written too: those sums are zero
    const int64_t end = halves ? up : j.y.stride ? j.y.cols : j.y.lines() * per_line;
    const Settle frequent = settle_of(j);
    const Vec limit = set1(j.limit);
    for (int64_t at = piece.first; at < stop && p * wide + at < end; at += Vec::N) {
        const int64_t c = p * wide + at, count = end - c;
        const Outputs own(j, p, at), other(j, p, j.w.gated ? at + wide : at);
        if (frequent && count >= Vec::N) {
            frequent(own, other, c, sums);
            continue;
        }
        for (int64_t r = 0; r < j.x.rows; r++) {
            Vec y = own.of(r, sums);
            if (j.bounded()) y = minimum(limit, rounded(y, j.rounded));  // NaN stays
            if (j.activation != NONE) y = activated(rounded(y, j.rounded), j.activation);
            if (fused) {
                Vec beside = rounded(other.of(r, sums), j.rounded);
                if (j.bounded()) beside = rounded(maximum(zero() - limit, minimum(limit, beside)) + set1(j.shift), j.rounded);
                y = y * beside;
            }
            if (halves) write_some(j.y.at(r, up + c), kind, other.of(r, sums), count);
            uint8_t* to = j.y.at(r, c);
            if (j.add) y = read_some(to, kind, count) + rounded(y, j.rounded);
            write_some(to, kind, kind == BF16 ? y : rounded(y, j.rounded), count);  // writing bf16 rounds
        }
    }
}

// What workers share: panels, or halves of them where an output needs nothing of the other half. A layer may have few panels.
int64_t pieces(const Linear& w) { return w.gated ? w.count() : 2 * w.count(); }

void linear(const LinearJob& j, int64_t first, int64_t last, float* scratch) {
    const int64_t per = j.w.gated ? 1 : 2;
    for (int64_t i = first, end; i < last; i = end) {
        end = i / per * per + per < last ? i / per * per + per : last;
        const Piece piece{i / per, i % per * PANEL / per, (end - 1) % per * PANEL / per + PANEL / per};
        if (j.w.kind == I8)  // for the epilogue, which would wait for them
            for (int64_t at = piece.first; at < piece.last; at += LINE / 4) {
                _mm_prefetch(reinterpret_cast<const char*>(j.w.scale + piece.panel * PANEL + at), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(j.w.sums + piece.panel * PANEL + at), _MM_HINT_T0);
            }
        switch (j.w.kind) {
            case F32: run_piece<Lines<FloatStep>>(j, piece, scratch); break;
            case BF16: run_piece<Lines<HalfStep>>(j, piece, scratch); break;
            case I8: run_piece<Lines<CodeStep>>(j, piece, scratch); break;
            case I4: run_piece<Groups<false>>(j, piece, scratch); break;
            case G8: run_piece<Groups<true>>(j, piece, scratch); break;
            case I2: case THIN: break;  // of pages only
        }
        settle(j, piece, scratch);
    }
}

Kind takes(Kind weights) {
#ifdef DOT_BF16
    return weights == I4 || weights == G8 ? I8 : weights;
#else
    return weights == I4 || weights == G8 ? I8 : weights == BF16 ? F32 : weights;
#endif
}
