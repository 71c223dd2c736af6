// Operations on single rows: norms, layouts, codes, activations, positions. Included inside an anonymous namespace after
// linear_impl.h. Every function processes rows first..last.

// Walks a row of x and y register by register. After the columns of x, y is filled with zeros to its end (the padding of a tile).
template <class Value>
void row_of(const Rows& x, const Rows& y, int64_t r, Value value) {
    const int64_t per_line = LINE / bytes_of(y.kind), end = y.stride ? y.cols : y.lines() * per_line;
    for (int64_t c = 0; c < end; c += Vec::N) {
        const int64_t live = x.cols - c;
        Vec out = zero();
        if (live > 0) {
            out = value(read_some(x.at(r, c), x.kind, live), c, live);
            if (live < Vec::N) out = keep_where((1u << live) - 1, out, zero());
        }
        write_some(y.at(r, c), y.kind, out, end - c);
    }
}

void copy(const Rows& x, const Rows& y, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) row_of(x, y, r, [](Vec v, int64_t, int64_t) { return v; });
}

// Writes normed or plain numbers of a row, or adds them.
inline Vec result(const NormJob& j, int64_t r, int64_t c, int64_t live, Vec y) {
    y = rounded(y, j.rounded);
    if (j.factor != 1) y = rounded(y * set1(j.factor), j.rounded);
    return j.add ? rounded(read_some(j.y.at(r, c), j.y.kind, live) + y, j.rounded) : y;
}

void norm(const NormJob& j, int64_t first, int64_t last) {
    const int64_t size = bytes_of(j.x.kind), gain = bytes_of(j.gains);
    for (int64_t r = first; r < last; r++) {
        if (!j.weight) {
            row_of(j.x, j.y, r, [&](Vec v, int64_t c, int64_t live) { return result(j, r, c, live, v); });
            continue;
        }
        Vec total = zero(), squares = zero();
        for (int64_t c = 0; c < j.x.cols; c += Vec::N) {
            const Vec v = read_some(j.x.at(r, c), j.x.kind, j.x.cols - c);
            total = total + v;
            squares = fma(v, v, squares);
        }
        float mean = 0, variance = sum(squares) / float(j.x.cols);
        if (!j.rms) {  // in two passes, because the difference of large sums would lose digits
            mean = sum(total) / float(j.x.cols);
            squares = zero();
            for (int64_t c = 0; c < j.x.cols; c += Vec::N) {
                const int64_t live = j.x.cols - c;
                Vec v = read_some(j.x.at(r, c), j.x.kind, live) - set1(mean);
                if (live < Vec::N) v = keep_where((1u << live) - 1, v, zero());
                squares = fma(v, v, squares);
            }
            variance = sum(squares) / float(j.x.cols);
        }
        const Vec scale = set1(1.0f / __builtin_sqrtf(variance + j.eps)), middle = set1(mean);
        row_of(j.x, j.y, r, [&](Vec v, int64_t c, int64_t live) {
            Vec y = (v - middle) * scale * read_some(j.weight + c * gain, j.gains, live);
            if (j.bias) y = y + read_some(j.bias + c * size, j.x.kind, live);
            return result(j, r, c, live, y);
        });
    }
}

// Puts zeros into columns, given in ascending order, of a row that is processed register by register.
struct Blank {
    const int32_t *at, *end;

    Vec operator()(Vec v, int64_t c) {
        uint32_t bits = 0;
        for (; at < end && *at < c + Vec::N; at++) bits |= 1u << (*at - c);
        return bits ? keep_where(~bits, v, zero()) : v;
    }
};

// 1 / the largest of 1, 2, 4, 8, 16 whose product with `own` is not above `peak`.
inline float factor_of(float own, float peak) {
    constexpr float NO = __builtin_inff();
    alignas(64) static constexpr float POWERS[16] = {2, 4, 8, 16, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO, NO};
    return 1.0f / float(1 << count_at_most(set1(own) * load(POWERS), set1(peak)));
}

void quantize(const Rows& x, const Linear& w, const Rows& tiles, const Coded& codes, int64_t first, int64_t last) {
    const int64_t groups = w.groups(), end = tiles.lines() * LINE, group = groups ? w.group : end;  // a group is a multiple of 16
    for (int64_t r = first; r < last; r++) {
        const Coded own = codes.from(w, r);
        for (int64_t i = 0; i < w.outliers; i++) {
            alignas(64) float t[Vec::N];
            store(t, read_some(x.at(r, w.columns[i]), x.kind, 1));
            own.outliers[i] = t[0];
        }
        Blank blank{w.columns, w.columns + w.outliers}, again = blank;
        Vec most = zero(), odd = zero();  // odd: 0, or NaN if an x is infinite or NaN; then all outputs are NaN
        for (int64_t begin = 0; begin < x.cols; begin += group) {
            Vec here = zero();
            for (int64_t c = begin; c < begin + group && c < x.cols; c += Vec::N) {
                const Vec v = blank(read_some(x.at(r, c), x.kind, x.cols - c), c);
                here = maximum(absolute(v), here);
                odd = odd + (v - v);
            }
            most = maximum(here, most);
            if (groups) own.factors[begin / group] = largest(here);
        }
        const float peak = largest(most), ratio = 127.0f / peak, inverse = ratio < __builtin_inff() ? ratio : 0;
        *own.scale = peak / 127.0f + sum(odd);
        const Vec by = set1(inverse), top = set1(127.0f), shift = set1(w.kind == I8 ? float(SHIFT) : 0);
        for (int64_t begin = 0, g = 0; begin < end; begin += group, g++) {
            const float factor = groups && begin < x.cols ? factor_of(own.factors[g], peak) : 1;
            const Vec power = set1(1 / factor);
            int32_t sum = 0;
            for (int64_t c = begin; c < begin + group && c < end; c += Vec::N) {
                Vec v = c < x.cols ? again(read_some(x.at(r, c), x.kind, x.cols - c), c) * power * by : zero();
                v = maximum(minimum(round_even(v), top), zero() - top);
                auto* to = reinterpret_cast<int8_t*>(tiles.at(r, c));
                to_i8(to, v + shift);
                for (int i = 0; groups && i < Vec::N; i++) sum += to[i];
            }
            if (!groups || begin >= x.cols) continue;
            own.factors[g] = factor;
            const float real = float(sum) * factor;
            if (w.lows) __builtin_memcpy(own.sums + g, &real, sizeof real);
            else own.sums[g] = sum;
        }
    }
}

void activate(const Rows& x, const Rows& y, Activation activation, int32_t gated, int64_t first, int64_t last) {
    Rows gate = x;
    if (gated) gate.cols = x.cols / 2;
    const int64_t up = gate.cols * bytes_of(x.kind);
    for (int64_t r = first; r < last; r++)
        row_of(gate, y, r, [&](Vec v, int64_t c, int64_t live) {
            v = activated(v, activation);
            return gated ? v * read_some(x.at(r, c) + up, x.kind, live) : v;
        });
}

// Numbers c..c + N - 1 of a row of float32, -infinity after its end.
inline Vec logits_at(const Rows& x, int64_t r, int64_t c) {
    const int64_t live = x.cols - c;
    const Vec v = read_some(x.at(r, c), F32, live);
    return live < Vec::N ? keep_where((1u << live) - 1, v, set1(-__builtin_inff())) : v;
}

void route(const RouteJob& j, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
        Vec most = set1(-__builtin_inff()), total = zero();
        for (int64_t c = 0; c < j.x.cols; c += Vec::N) most = maximum(logits_at(j.x, r, c), most);  // without NaN
        const Vec peak = set1(largest(most));
        const auto power = [&](int64_t c) {
            const Vec below = logits_at(j.x, r, c) - peak;
            return exponential(below) + maximum(zero(), below);  // the last: NaN stays NaN
        };
        for (int64_t c = 0; c < j.x.cols; c += Vec::N) total = total + power(c);
        const Vec all = set1(sum(total));
        Best* best = j.chosen + r * j.keep;
        for (int32_t i = 0; i < j.keep; i++) best[i] = {-__builtin_inff(), -1};
        for (int64_t c = 0; c < j.x.cols; c += Vec::N) {
            alignas(64) float chances[Vec::N];
            store(chances, power(c) / all);
            for (int64_t i = 0; i < Vec::N && c + i < j.x.cols; i++) insert(best, j.keep, {chances[i], int32_t(c + i)});
        }
        float kept = 0;
        for (int32_t i = 0; i < j.keep; i++) kept += best[i].value;
        for (int32_t i = 0; i < j.keep; i++) {
            alignas(64) float share[Vec::N];
            store(share, rounded(set1(j.renormalise ? best[i].value / kept : best[i].value), j.rounded));
            const Best one{share[0], best[i].index};
            int32_t at = i;
            for (; at > 0 && best[at - 1].index > one.index; at--) best[at] = best[at - 1];
            best[at] = one;
        }
    }
}

void cap(const Rows& x, const Rows& y, float limit, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) row_of(x, y, r, [&](Vec v, int64_t, int64_t) { return capped(v, limit); });
}

// A sum over inputs is one chain for each lane of a register, added in the order of `sum`; a sum over ranks is one chain.
template <Kind K, int N>
INLINE void ranks_of(const Rows& x, const LowRank& w, int64_t row, int64_t first, float* to) {  // N of them
    Vec sums[N];
    for (Vec& one : sums) one = zero();
    for (int64_t c = 0; c < w.ins; c += Vec::N) {
        const int64_t live = w.ins - c;
        const Vec v = read_some(x.at(row, c), x.kind, live);
        for (int i = 0; i < N; i++) sums[i] = fma(v, read_some(w.a + ((first + i) * w.ins + c) * bytes_of(K), K, live), sums[i]);
    }
    for (int i = 0; i < N; i++) to[first + i] = sum(sums[i]);
}

template <Kind K>
void low_rank_of(const Rows& x, const Rows& y, const LowRank& w, int64_t row) {
    constexpr int64_t SIZE = bytes_of(K);
    alignas(64) float ranks[MOST_RANKS];
    int64_t some = 0;
    for (; some + 8 <= w.rank; some += 8) ranks_of<K, 8>(x, w, row, some, ranks);
    for (; some < w.rank; some++) ranks_of<K, 1>(x, w, row, some, ranks);
    const auto add = [&](Vec added, int64_t o) {
        const int64_t live = w.outs - o;
        uint8_t* to = y.at(row, w.first + o);
        write_some(to, y.kind, read_some(to, y.kind, live) + added, live);
    };
    int64_t o = 0;
    for (; o + 4 * Vec::N <= w.outs; o += 4 * Vec::N) {
        Vec added[4] = {zero(), zero(), zero(), zero()};
        const uint8_t* from = w.b + o * SIZE;
        for (int64_t j = 0; j < w.rank; j++, from += w.outs * SIZE)
            for (int v = 0; v < 4; v++) added[v] = fma(set1(ranks[j]), read(from + v * Vec::N * SIZE, K), added[v]);
        for (int v = 0; v < 4; v++) add(added[v], o + v * Vec::N);
    }
    for (; o < w.outs; o += Vec::N) {
        Vec added = zero();
        for (int64_t j = 0; j < w.rank; j++) added = fma(set1(ranks[j]), read_some(w.b + (j * w.outs + o) * SIZE, K, w.outs - o), added);
        add(added, o);
    }
}

void low_rank(const Rows& x, const Rows& y, const LowRank& w, int64_t row) {
    w.kind == BF16 ? low_rank_of<BF16>(x, y, w, row) : low_rank_of<F32>(x, y, w, row);
}

void rope(const Rows& x, int64_t heads, int64_t size, const float* cos, const float* sin, int64_t first, int64_t last) {
    const int64_t half = size / 2;
    for (int64_t r = first; r < last; r++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < half; i += Vec::N) {
                const int64_t live = half - i;
                uint8_t *low = x.at(r, h * size + i), *high = x.at(r, h * size + half + i);
                const Vec a = read_some(low, x.kind, live), b = read_some(high, x.kind, live);
                const uint8_t *turn = reinterpret_cast<const uint8_t*>(cos + r * half + i), *by = reinterpret_cast<const uint8_t*>(sin + r * half + i);
                const Vec c = read_some(turn, F32, live), s = read_some(by, F32, live);
                write_some(low, x.kind, fma(zero() - b, s, a * c), live);
                write_some(high, x.kind, fma(a, s, b * c), live);
            }
}

// Only integers, and steps that are exact in double.
void uniform(uint64_t key, const int64_t* ids, int64_t count, double* to) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t x = key + uint64_t(ids[i]) * 0x9E3779B97F4A7C15u;
        for (int twice = 0; twice < 2; twice++) {
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
            x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
            x ^= x >> 31;
        }
        x = x >> 12 | 0x3FF0000000000000u;  // 1 and 52 bits after the point
        double one_and;
        __builtin_memcpy(&one_and, &x, sizeof x);
        to[i] = (one_and - 1.0) + 0x1p-53;
    }
}

// Places of values that may be the largest once the Gumbel noise -log(-log(u)) is added, ascending: all whose sum comes so near to the
// largest that rounding or another logarithm may decide. Returns how many, 0 if there are more than CONTENDERS. No value is NaN.
//
// As -log(u) >= 1 - u >= 2^e, where e is the exponent of 1 - u, the noise is at most -e log(2): few values need a logarithm.
int64_t contenders(uint64_t key, const int64_t* ids, const double* values, int64_t count, int64_t* places) {
    constexpr int64_t BLOCK = 512;
    constexpr double LOG_2 = 0.6931471805599454;  // rounded up
    double numbers[BLOCK], limits[BLOCK], best = -__builtin_inf(), sums[CONTENDERS];
    int64_t found = 0;
    const auto slack = [](double sum) { return 1e-9 + 1e-9 * __builtin_fabs(sum); };
    const auto near = [&](double sum) { return sum >= best - slack(best); };
    const auto drop = [&] {
        int64_t kept = 0;
        for (int64_t i = 0; i < found; i++)
            if (near(sums[i])) sums[kept] = sums[i], places[kept++] = places[i];
        found = kept;
    };
    for (int64_t block = 0; block < count; block += BLOCK) {
        const int64_t live = count - block < BLOCK ? count - block : BLOCK;
        uniform(key, ids + block, live, numbers);
        const double least = best - slack(best);
        int64_t some = 0;
        for (int64_t i = 0; i < live; i++) {
            const double rest = 1.0 - numbers[i];
            int64_t bits;
            __builtin_memcpy(&bits, &rest, sizeof bits);
            limits[i] = values[block + i] + double(int32_t(1023 - (bits >> 52))) * LOG_2;
            some += limits[i] >= least;
        }
        for (int64_t i = 0; some && i < live; i++) {
            if (!near(limits[i])) continue;
            const double sum = values[block + i] - __builtin_log(-__builtin_log(numbers[i]));
            if (!near(sum)) continue;
            if (sum > best) best = sum, drop();
            if (found == CONTENDERS) return 0;
            sums[found] = sum, places[found++] = block + i;
        }
    }
    drop();
    return found;
}
