// Linear layers on tiles. Included inside an anonymous namespace after linear_impl.h.
//
// An output element is one chain of tile products over whole lines of its inputs (32 bf16 or 64 codes) in order. The rows of a tile are
// independent, so neither the number of rows nor the block of a row changes a bit. Between chunks of lines the sums are stored in
// memory, which changes no bit either. A single row uses tiles too.

// ---- instructions

// The size of each tile, in the layout of the processor.
struct alignas(64) Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t line[16];
    uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64);

#ifndef REDRAFT_EMULATE_TILES
// In assembly: the intrinsics of compilers do not declare that these read memory, so stores before them may be dropped or delayed.
inline void load_shapes(const Shapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
struct HalfProduct {  // of bf16
    template <int C, int A, int B>
    static void run() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
struct CodeProduct {  // of bytes with SHIFT added and signed bytes
    template <int C, int A, int B>
    static void run() {
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
struct SignedProduct {  // of signed bytes
    template <int C, int A, int B>
    static void run() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
#else
inline void load_shapes(const Shapes& shapes) { emulated::configure(&shapes); }
inline void release_tiles() { emulated::release(); }
template <int T>
inline void tile_load(const void* from, int64_t stride) {
    emulated::load(T, from, stride);
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
    emulated::store(T, to, stride);
}
template <int T>
inline void tile_zero() {
    emulated::zero(T);
}
struct HalfProduct {
    template <int C, int A, int B>
    static void run() {
        emulated::dot_bf16(C, A, B);
    }
};
struct CodeProduct {
    template <int C, int A, int B>
    static void run() {
        emulated::dot_bytes(C, A, B, false, true);
    }
};
struct SignedProduct {
    template <int C, int A, int B>
    static void run() {
        emulated::dot_bytes(C, A, B, true, true);
    }
};
#endif

// Tiles 0 to 3 hold sums, 4 and 5 lines of rows, 6 and 7 weights. With two blocks of rows, 0, 1 and 4 belong to the first block and 2, 3
// and 5 to the second; with one block all belong to it. Shapes are loaded only when they change.
class Tiles {
public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() { release_tiles(); }  // the system saves tiles in use at every thread switch

    void hold(int64_t first, int64_t second) {
        if (first == first_ && second == second_) return;
        first_ = first, second_ = second;
        Shapes shapes{};
        shapes.palette = 1;
        for (int t : {0, 1, 4}) shape(shapes, t, first);
        for (int t : {2, 3, 5}) shape(shapes, t, second);
        for (int t : {6, 7}) shape(shapes, t, STEPS);
        load_shapes(shapes);
    }

private:
    static void shape(Shapes& shapes, int t, int64_t rows) {
        shapes.rows[t] = uint8_t(rows);
        shapes.line[t] = LINE;
    }
    int64_t first_ = 0, second_ = 0;
};

// ---- prefetching weights

// Cache lines fetched a few at a time during other computations.
struct Fetch {
    const uint8_t *at, *end;
    int64_t each;

    void some() {
        const uint8_t* to = end - at < each * 64 ? end : at + each * 64;
        for (; at < to; at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    }
};
constexpr int64_t AHEAD = 4 * LINE * PANEL;  // for weights that are read once: four lines, some microseconds at the speed of memory
constexpr int64_t CHUNK = 8;                 // lines of weights that stay in the first cache while rows pass: 32 KiB

// ---- bf16 and int8

// Where the sums of a block of rows start: rows of PANEL numbers of 4 bytes, or one row for all.
struct Start {
    const uint8_t* row;
    int64_t stride;
};

// Lines of a panel for one block of rows and all outputs.
template <class Product>
void one_block(const uint8_t* w, const uint8_t* x, int64_t tall, int64_t lines, Start start, uint8_t* sums, Fetch& fetch) {
    tile_load<0>(start.row, start.stride);
    tile_load<1>(start.row + 64, start.stride);
    tile_load<2>(start.row + 128, start.stride);
    tile_load<3>(start.row + 192, start.stride);
    for (int64_t line = 0; line < lines; line++, w += STEPS * STEP, x += tall * LINE) {
        tile_load<4>(x, LINE);
        tile_load<6>(w, STEP);
        Product::template run<0, 4, 6>();
        fetch.some();
        tile_load<7>(w + 64, STEP);
        Product::template run<1, 4, 7>();
        fetch.some();
        tile_load<6>(w + 128, STEP);
        Product::template run<2, 4, 6>();
        fetch.some();
        tile_load<7>(w + 192, STEP);
        Product::template run<3, 4, 7>();
        fetch.some();
    }
    tile_store<0>(sums, STEP);
    tile_store<1>(sums + 64, STEP);
    tile_store<2>(sums + 128, STEP);
    tile_store<3>(sums + 192, STEP);
}

// Lines of a panel for two blocks of rows, the first of TALL, and half of the outputs. Half as many loads for each product as above.
template <class Product>
void two_blocks(const uint8_t* w, const uint8_t* x, const uint8_t* x2, int64_t tall2, int64_t lines, Start start, uint8_t* sums,
                Fetch& fetch) {
    tile_load<0>(start.row, start.stride);
    tile_load<1>(start.row + 64, start.stride);
    tile_load<2>(start.row + TALL * start.stride, start.stride);
    tile_load<3>(start.row + TALL * start.stride + 64, start.stride);
    for (int64_t line = 0; line < lines; line++, w += STEPS * STEP, x += TALL * LINE, x2 += tall2 * LINE) {
        tile_load<6>(w, STEP);
        tile_load<4>(x, LINE);
        Product::template run<0, 4, 6>();
        fetch.some();
        tile_load<7>(w + 64, STEP);
        Product::template run<1, 4, 7>();
        fetch.some();
        tile_load<5>(x2, LINE);
        Product::template run<2, 5, 6>();
        fetch.some();
        Product::template run<3, 5, 7>();
        fetch.some();
    }
    tile_store<0>(sums, STEP);
    tile_store<1>(sums + 64, STEP);
    tile_store<2>(sums + TALL * STEP, STEP);
    tile_store<3>(sums + TALL * STEP + 64, STEP);
}

// Lines first..last of a panel for all rows of x; sums [rows][PANEL] continue, or start from `fresh` if not null. back: the last rows
// first, because their tiles still have the shapes of the chunk before.
template <class Product>
void tile_chunk(Tiles& tiles, const uint8_t* w, const Rows& x, int64_t first, int64_t last, const uint8_t* fresh, uint8_t* sums, bool back,
                Fetch& fetch) {
    const auto block_at = [&](int64_t r) { return x.data + (r * x.lines() + first * x.tall(r)) * LINE; };
    const uint8_t* from = w + first * STEPS * STEP;
    const int64_t pairs = (x.rows + 2 * TALL - 1) / (2 * TALL);
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t r = (back ? pairs - 1 - i : i) * 2 * TALL, second = r + TALL;
        uint8_t* own = sums + r * STEP;
        if (second >= x.rows) {
            tiles.hold(x.tall(r), x.tall(r));
            one_block<Product>(from, block_at(r), x.tall(r), last - first, fresh ? Start{fresh, 0} : Start{own, STEP}, own, fetch);
            continue;
        }
        tiles.hold(TALL, x.tall(second));
        for (int64_t part = 0; part < STEP; part += STEP / 2) {
            const Start start = fresh ? Start{fresh + part, 0} : Start{own + part, STEP};
            two_blocks<Product>(from + part, block_at(r), block_at(second), x.tall(second), last - first, start, own + part, fetch);
        }
    }
}

// `count` rows of the job, from `first` on, a multiple of TALL.
inline Rows some_of(const Rows& x, int64_t first, int64_t count) {
    Rows some = x;
    some.data = x.data ? x.at(first, 0) : nullptr;
    some.rows = count;
    return some;
}
inline LinearJob some_of(const LinearJob& j, int64_t first, int64_t count) {
    LinearJob some = j;
    some.x = some_of(j.x, first, count);
    some.y = some_of(j.y, first, count);
    if (some.x.kind == I8) some.codes = j.codes.from(j.w, first);
    if (j.best) some.best += first * j.keep;
    return some;
}

// Several panels for some rows at a time, so both weights and rows stay in the second cache; fewer reads of one mean more reads of the
// other. The sums of all panels of a group are held, as many as scratch has room for.
struct Blocking {
    static constexpr int64_t ROWS = 8 * TALL, PANELS = 4;
    int64_t panels, rows, chunks;

    Blocking(int64_t all_rows, int64_t lines)
        : panels(all_rows / ROWS < 1 ? 1 : all_rows / ROWS < PANELS ? all_rows / ROWS : PANELS),
          rows(panels > 1 ? ROWS : all_rows),
          chunks(all_rows <= TALL ? 1 : (lines + CHUNK - 1) / CHUNK) {}
};

// Panels p..end for all rows of j; scratch holds their sums one after another. after: the weights read next, or null.
template <class Product>
void tile_panels(Tiles& tiles, const LinearJob& j, int64_t p, int64_t end, int64_t chunks, const uint8_t* after, float* scratch) {
    const int64_t lines = j.w.steps() / STEPS, size = j.w.panel_bytes(), blocks = (j.x.rows + TALL - 1) / TALL, each = j.x.rows * PANEL;
    const int64_t bytes = (lines + chunks - 1) / chunks * STEPS * STEP, apart = (LINE / 4 + blocks - 1) / blocks;
    int64_t turn = p * chunks;
    alignas(64) static constexpr uint8_t zeros[STEP] = {};
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t first = lines * c / chunks, last = lines * (c + 1) / chunks;
        for (int64_t i = p; i < end; i++, turn++) {
            const uint8_t* w = j.w.panels + i * size;
            Fetch fetch{w + first * STEPS * STEP + AHEAD, w + size + AHEAD, LINE / 4};
            if (blocks > 1) {  // the next weights, spread evenly over the time of this chunk
                const uint8_t* next = c + 1 < chunks ? w - (i - p) * size + last * STEPS * STEP : after;
                if (i + 1 < end) next = w + size + first * STEPS * STEP;
                fetch = {next, next ? next + bytes : next, apart};
            }
            uint8_t* sums = reinterpret_cast<uint8_t*>(scratch + (i - p) * each);
            tile_chunk<Product>(tiles, w, j.x, first, last, c ? nullptr : zeros, sums, turn % 2, fetch);
        }
    }
    for (int64_t i = p; i < end; i++) settle(j, {i, 0, PANEL}, scratch + (i - p) * each);
}

template <class Product>
void tile_layer(const LinearJob& j, int64_t first, int64_t last, float* scratch) {
    const Blocking by(j.x.rows, j.w.steps() / STEPS);
    const uint8_t* const panels = j.w.panels;
    const int64_t size = j.w.panel_bytes();
    Tiles tiles;
    for (int64_t p = first; p < last; p += by.panels) {
        const int64_t end = p + by.panels < last ? p + by.panels : last;
        for (int64_t r = 0; r < j.x.rows; r += by.rows) {
            const int64_t count = j.x.rows - r < by.rows ? j.x.rows - r : by.rows;
            const uint8_t* after = r + count < j.x.rows ? panels + p * size : end < last ? panels + end * size : nullptr;
            tile_panels<Product>(tiles, some_of(j, r, count), p, end, by.chunks, after, scratch);
        }
    }
}

// ---- groups

constexpr int64_t FEWEST_GROUPED = 8;   // rows for which tiles pay: fewer are as fast as one without them, and sums of codes are exact in both
constexpr int64_t UNPACKED = 4;      // lines of codes that are unpacked at a time for all rows: 16 KiB

// Lines first..last of a panel as signed codes, in the layout of int8.
inline void unpack(const uint8_t* w, int64_t first, int64_t last, int64_t offset, uint8_t* codes) {
    const __m512i low = _mm512_set1_epi8(15), bias = _mm512_set1_epi8(int8_t(offset));
    for (int64_t s = first * STEPS; s < last * STEPS; s += 2, codes += 2 * STEP) {
        const uint8_t* from = w + s / 2 * STEP;
        for (int64_t i = 0; i < STEP; i += 64) {
            const __m512i both = _mm512_loadu_si512(from + i), high = _mm512_srli_epi16(both, 4);
            _mm512_store_si512(codes + i, _mm512_sub_epi8(_mm512_and_si512(both, low), bias));
            _mm512_store_si512(codes + STEP + i, _mm512_sub_epi8(_mm512_and_si512(high, low), bias));
        }
    }
}

// The integer sums of group g of a block of rows from r on become floats and are added with their scales: the same numbers as in Groups.
template <bool LOWS>
void add_group(const LinearJob& j, int64_t p, int64_t g, const int32_t* whole, int64_t r, int64_t rows, float* sums) {
    constexpr int64_t COUNT = PANEL / Int::N;
    Floats scale[COUNT], low[COUNT];
    for (int64_t v = 0; v < COUNT; v++) {
        scale[v] = of_group(j.w, j.w.scales, j.w.factors, p, g, v * Int::N);
        if (LOWS) low[v] = of_group(j.w, j.w.lows, j.w.offsets, p, g, v * Int::N);
    }
    const Coded codes = j.codes.from(j.w, r);
    const int64_t groups = j.w.groups();  // copies: no store can change them
    sums += r * PANEL;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = i * groups + g;
        for (int64_t v = 0; v < COUNT; v++) {
            float* to = sums + i * PANEL + v * Int::N;
            Floats sum;
            if (g) get(to, sum);
            else clear(sum);
            add_scaled(sum, bytes(whole + i * PANEL + v * Int::N), times(scale[v], codes.factors[at]));
            if (LOWS) add_scaled(sum, real_sum(codes, at), low[v]);
            put(to, sum);
        }
    }
}

// One group of one block of rows: `count` lines of x.
inline void group_sums(const uint8_t* w, const uint8_t* x, int64_t tall, int64_t count, int32_t* whole, Fetch& fetch) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t line = 0; line < count; line++, w += STEPS * STEP, x += tall * LINE) {
        tile_load<4>(x, LINE);
        tile_load<6>(w, STEP);
        SignedProduct::run<0, 4, 6>();
        tile_load<7>(w + 64, STEP);
        SignedProduct::run<1, 4, 7>();
        fetch.some();
        tile_load<6>(w + 128, STEP);
        SignedProduct::run<2, 4, 6>();
        tile_load<7>(w + 192, STEP);
        SignedProduct::run<3, 4, 7>();
        fetch.some();
    }
    tile_store<0>(whole, STEP);
    tile_store<1>(whole + 16, STEP);
    tile_store<2>(whole + 32, STEP);
    tile_store<3>(whole + 48, STEP);
}

// Whether groups end where tiles end, with not too many codes to unpack. Smaller groups are as fast without tiles.
inline bool fits_tiles(const Linear& w) { return w.grouped() && w.group % LINE == 0 && w.group <= UNPACKED * LINE; }

void tile_grouped_panel(Tiles& tiles, const LinearJob& j, int64_t p, uint8_t* codes, int32_t* whole, float* sums) {
    const int64_t groups = j.w.groups(), lines = j.w.steps() / STEPS, each = j.w.group / LINE;
    const int64_t per_chunk = UNPACKED * LINE / j.w.group, chunks = (groups + per_chunk - 1) / per_chunk, blocks = (j.x.rows + TALL - 1) / TALL;
    const uint8_t* w = j.w.panels + p * j.w.panel_bytes();
    const int64_t bytes = j.w.kind == G8 ? STEP : STEP / 2;  // of a step of a panel
    for (int64_t g0 = 0; g0 < groups; g0 += per_chunk) {
        const int64_t g1 = g0 + per_chunk < groups ? g0 + per_chunk : groups;
        const int64_t begin = g0 * each, end = g1 == groups ? lines : g1 * each;
        if (j.w.kind == I4) unpack(w, begin, end, j.w.offset(), codes);
        const uint8_t* const signed_codes = j.w.kind == I4 ? codes : w + begin * STEPS * STEP;
        const uint8_t* next = w + end * STEPS * bytes;
        Fetch fetch{next, next + UNPACKED * STEPS * bytes, (LINE / 4 + blocks - 1) / blocks};
        const bool back = (p * chunks + g0 / per_chunk) % 2;  // back and forth, so shapes change at most once per chunk
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t r = (back ? blocks - 1 - b : b) * TALL, tall = j.x.tall(r);
            tiles.hold(tall, tall);
            for (int64_t g = g0; g < g1; g++) {
                const int64_t first = g * each, last = g + 1 == groups ? lines : first + each;
                const uint8_t* x = j.x.data + r * j.x.lines() * LINE + first * tall * LINE;
                group_sums(signed_codes + (first - begin) * STEPS * STEP, x, tall, last - first, whole, fetch);
                if (j.w.lows) add_group<true>(j, p, g, whole, r, tall, sums);
                else add_group<false>(j, p, g, whole, r, tall, sums);
            }
        }
    }
}

void tile_grouped(const LinearJob& j, int64_t first, int64_t last, float* scratch) {
    alignas(64) uint8_t codes[UNPACKED * STEPS * STEP];
    alignas(64) int32_t whole[TALL * PANEL];
    Tiles tiles;
    for (int64_t p = first; p < last; p++) {
        tile_grouped_panel(tiles, j, p, codes, whole, scratch);
        settle(j, {p, 0, PANEL}, scratch);
    }
}

int64_t tile_pieces(const Linear& w) { return w.count(); }

void tile_linear(const LinearJob& j, int64_t first, int64_t last, float* scratch) {
    if (j.x.rows < 1 || first >= last) return;
    if (j.w.kind == BF16) tile_layer<HalfProduct>(j, first, last, scratch);
    else if (j.w.kind == I8) tile_layer<CodeProduct>(j, first, last, scratch);
    else if (j.x.rows >= FEWEST_GROUPED && fits_tiles(j.w)) tile_grouped(j, first, last, scratch);
    else linear(j, first * pieces(j.w) / j.w.count(), last * pieces(j.w) / j.w.count(), scratch);
}
