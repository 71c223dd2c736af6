// Functions on registers, the same for every width. Included inside an anonymous namespace after vec_*.h.

// e^x to within 2 units in the last place for x in -87..88; 0 far below and for -infinity.
inline Vec exponential(Vec x) {
    const Vec low = set1(-87.0f);
    const Vec bounded = minimum(maximum(x, low), set1(88.0f));
    const Vec n = round_even(bounded * set1(1.44269504088896341f));
    Vec r = fma(n, set1(-0.693145751953125f), bounded);      // ln 2 in two parts
    r = fma(n, set1(-1.42860682030941723212e-6f), r);
    Vec p = set1(1.9875691500e-4f);                           // minimax polynomial of e^r on |r| <= ln 2 / 2
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return where_less(x, low, zero(), p * power_of_two(n));
}

// limit * tanh(x / limit), to within 2e-7 of the limit.
inline Vec capped(Vec x, float limit) {
    const Vec t = x * set1(2.0f / limit);
    return set1(limit) * (set1(1.0f) - set1(2.0f) / (exponential(t) + set1(1.0f))) + (x - x);  // the last: NaN stays NaN
}

// One register of numbers of either kind.
inline Vec read(const uint8_t* p, Kind kind) {
    return kind == F32 ? load(reinterpret_cast<const float*>(p)) : from_bf16(reinterpret_cast<const uint16_t*>(p));
}
inline void write(uint8_t* p, Kind kind, Vec x) {
    if (kind == F32) store(reinterpret_cast<float*>(p), x);
    else to_bf16(reinterpret_cast<uint16_t*>(p), x);
}
// x as it reads after being stored as `kind`.
inline Vec rounded(Vec x, Kind kind) { return kind == F32 ? x : as_bf16(x); }
// The first `count` numbers of a register from memory that may end after them; the rest are zeros.
inline Vec read_some(const uint8_t* p, Kind kind, int64_t count) {
    if (count >= Vec::N) return read(p, kind);
    alignas(64) uint8_t t[4 * Vec::N] = {};
    for (int64_t i = 0; i < count * bytes_of(kind); i++) t[i] = p[i];
    return read(t, kind);
}
inline void write_some(uint8_t* p, Kind kind, Vec x, int64_t count) {
    if (count >= Vec::N) return write(p, kind, x);
    alignas(64) uint8_t t[4 * Vec::N];
    write(t, kind, x);
    for (int64_t i = 0; i < count * bytes_of(kind); i++) p[i] = t[i];
}
