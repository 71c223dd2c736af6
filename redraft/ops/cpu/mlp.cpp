#include "mlp.h"

#include <algorithm>
#include <cstring>

namespace redraft {
namespace {

Feeds for_router, for_ups[2], for_downs[2];  // of a plain mlp or all experts, and of the shared expert
Buffer inners[2], ups, inputs, outputs, products, logits, gates, bests, lists;

constexpr int64_t FEW = 8;   // rows that every worker routes alone, because a barrier would take longer
constexpr int64_t READ = 8;  // rows whose products take as long as the reads of their weights

void run_dense(const Worker& w, const Layer& l, int64_t layer) {
    const Feed up = for_ups[0].of(w.kernels, l.up, w.h.rows), down = for_downs[0].of(w.kernels, l.down, w.h.rows);
    const Rows inner = strided(inners[0].of(0), w.h.rows, l.down.ins, w.h.kind);
    const Rows input = up.codes() ? w.norms : up.tiles, activated = down.codes() ? inner : down.tiles;
    const Rows both = w.adapters ? strided(ups.of(0), w.h.rows, l.up.outs, w.h.kind) : activated;
    if (!l.parallel) barrier();
    w.panels(job_of(l.up, up, both, w.h.kind, w.adapters ? NONE : l.activation));
    barrier();
    if (w.adapters) {
        w.adapt(layer, UP, input, both);
        w.kernels.activate(both, activated, l.activation, l.up.gated, w.own.first, w.own.last);
    }
    if (down.codes()) fill(w.kernels, l.down, inner, down, w.own);
    if (w.adapters || down.codes()) barrier();
    w.added(l, l.down, down, l.mlp_post, layer, DOWN, activated);
}

// The places of the work of a mixture: the chosen rows in ascending order of experts, those of an expert in order of rows; then all rows,
// if there is a shared expert. Every worker finds them alone. Every product is computed in the form of rows of one expert, so it has the
// bits that the row has alone.
class Mixture {
public:
    Mixture(const Kernels& kernels, const Experts& experts, int64_t rows, int64_t cols, Kind kind, int worker, int workers)
        : m(experts), k(kernels), rows_(rows), chosen_(rows * m.top_k), places_(chosen_ + (m.shared ? rows : 0)), parts_(m.count + m.shared), kind_(kind), at_(worker), workers_(workers) {
        router_ = for_router.of(k, m.router, rows);
        logits_ = strided(logits.of(rows * m.count * 4), rows, m.count, F32);
        gates_ = strided(gates.of(rows * 4), rows, 1, F32);
        made_ = strided(products.of(places_ * cols * bytes_of(kind)), places_, cols, kind);
        for (int64_t i = 0; i <= m.shared; i++) {
            const Linear &up = m.up[i * m.count], &down = m.down[i * m.count];
            const int64_t count = i ? rows : chosen_;
            ups_[i] = for_ups[i].of(k, up, count), downs_[i] = for_downs[i].of(k, down, count);
            inners_[i] = strided(inners[i].of(count * down.ins * bytes_of(kind)), count, down.ins, kind);
        }
        best_ = bests.of<Best>(each_routes() ? workers * chosen_ : chosen_) + (each_routes() ? worker * chosen_ : 0);
        const int64_t size = parts_ + 1 + chosen_ + places_;
        starts_ = lists.of<int32_t>(workers * size) + worker * size;
        place_ = starts_ + parts_ + 1, from_ = place_ + chosen_;
    }

    void run(const Worker& w, const Rows& x, const Rows& out) {
        fill(k, m.router, x, router_, w.own);
        barrier();
        w.panels(job_of(m.router, router_, logits_, kind_));
        if (m.gate.panels) w.panels(job_of(m.gate, router_, gates_, kind_, SIGMOID));
        barrier();
        const Share routed = each_routes() ? Share(rows_, 0, 1) : w.own;
        k.route({logits_, best_, m.top_k, m.renormalise, kind_}, routed.first, routed.last);
        if (!each_routes()) barrier();
        find_places();
        each_place([&](const Part& part, int64_t r, int64_t row) {
            Rows one = x;
            one.data += (row - r) * x.stride;  // its row r is the wanted one
            fill(k, part.up, one, part.for_up, Share(r, r + 1));
        });
        barrier();
        panels(m.up, w.sums, [&](const Part& part) {
            LinearJob job = job_of(part.up, part.for_up, part.for_down.codes() ? part.inner : part.for_down.tiles, kind_, part.activation);
            if (&part.up < m.up + m.count) job.limit = m.limit, job.shift = m.shift;
            return job;
        });
        barrier();
        if (downs_[0].codes() || downs_[m.shared].codes()) {
            each_place([&](const Part& part, int64_t r, int64_t) {
                if (part.for_down.codes()) fill(k, part.down, part.inner, part.for_down, Share(r, r + 1));
            });
            barrier();
        }
        panels(m.down, w.sums, [&](const Part& part) { return job_of(part.down, part.for_down, part.made, kind_); });
        barrier();
        for (int64_t r = w.own.first; r < w.own.last; r++) sum(r, out);
    }

private:
    struct Part {  // an expert with its rows; for_up to made: one row for each of them
        const Linear &up, &down;
        Feed for_up, for_down;
        Rows inner, made;
        Activation activation;
    };

    bool each_routes() const { return rows_ <= FEW; }
    int64_t count(int64_t part) const { return starts_[part + 1] - starts_[part]; }

    Part part(int64_t i) const {
        const int64_t shared = i == m.count, first = starts_[i], own = shared ? 0 : first;
        const auto some = [&](Rows x, int64_t from) {
            x.data += from * x.stride, x.rows = count(i);
            return x;
        };
        const Linear &up = m.up[i], &down = m.down[i];
        return {up, down, ups_[shared].part(up, own, count(i)), downs_[shared].part(down, own, count(i)), some(inners_[shared], own), some(made_, first), shared ? m.shared_activation : m.activation};
    }

    void find_places() {
        std::fill(starts_, starts_ + parts_ + 1, 0);
        for (int64_t i = 0; i < chosen_; i++) starts_[best_[i].index + 1]++;
        if (m.shared) starts_[parts_] = int32_t(rows_);
        for (int64_t e = 0; e < parts_; e++) starts_[e + 1] += starts_[e];
        for (int64_t i = 0; i < chosen_; i++) {
            place_[i] = starts_[best_[i].index]++;
            from_[place_[i]] = int32_t(i / m.top_k);
        }
        for (int64_t e = m.count; e > 0; e--) starts_[e] = starts_[e - 1];
        starts_[0] = 0;
        for (int64_t i = chosen_; i < places_; i++) from_[i] = int32_t(i - chosen_);
    }

    // work(part, r, row) for this worker's places: row r of the part is row `row` of the batch.
    template <class Work>
    void each_place(const Work& work) const {
        const Share mine(places_, at_, workers_);
        for (int64_t e = 0; e < parts_; e++) {
            const int64_t first = std::max(mine.first, int64_t(starts_[e])), last = std::min(mine.last, int64_t(starts_[e + 1]));
            if (first >= last) continue;
            const Part own = part(e);
            for (int64_t i = first; i < last; i++) work(own, i - starts_[e], from_[i]);
        }
    }

    // This worker's share of the products of all parts with weights w: pieces are one sequence, cut where the estimated time says.
    template <class Job>
    void panels(const Linear* w, float* sums, const Job& job) const {
        const auto cost = [&](int64_t e) { return count(e) ? count(e) + READ : 0; };
        int64_t total = 0, before = 0;
        for (int64_t e = 0; e < parts_; e++) total += k.pieces(w[e]) * cost(e);
        const Share mine(total, at_, workers_);
        for (int64_t e = 0; e < parts_ && before < mine.last; e++) {
            if (!cost(e)) continue;
            const auto upto = [&](int64_t end) { return std::clamp((end - before + cost(e) - 1) / cost(e), int64_t(0), k.pieces(w[e])); };
            const int64_t first = mine.first > before ? upto(mine.first) : 0, last = upto(mine.last);
            if (first < last) k.linear(job(part(e)), first, last, sums);
            before += k.pieces(w[e]) * cost(e);
        }
    }

    // The outputs of row r times their shares, rounded and then added in ascending order of experts, the shared expert last.
    void sum(int64_t r, const Rows& out) const {
        std::memset(out.at(r, 0), 0, size_t(out.cols * bytes_of(kind_)));
        const auto add = [&](int64_t place, float share) {
            Rows one = made_;
            one.data += (place - r) * made_.stride;
            k.norm({one, out, nullptr, nullptr, 0, 1, kind_, kind_, share, 1}, r, r + 1);
        };
        for (int64_t i = r * m.top_k; i < (r + 1) * m.top_k; i++) add(place_[i], best_[i].value);
        if (m.shared) add(chosen_ + r, m.gate.panels ? reinterpret_cast<const float*>(gates_.data)[r] : 1);
    }

    const Experts& m;
    const Kernels& k;
    const int64_t rows_, chosen_, places_, parts_;
    const Kind kind_;
    const int at_, workers_;
    Feed router_, ups_[2], downs_[2];
    Rows logits_, gates_, made_, inners_[2];
    Best* best_;        // [rows][top_k]
    int32_t* starts_;   // [parts + 1], the first place of each part
    int32_t* place_;    // [rows][top_k]
    int32_t* from_;     // [places], their rows
};

}  // namespace

void prepare_mixture(const Kernels& kernels, const Experts& experts, int64_t rows, int64_t cols, Kind kind) {
    Mixture(kernels, experts, rows, cols, kind, 0, threads());
}

void prepare_mlp(const Kernels& kernels, const Layer& l, int64_t rows, int64_t cols, Kind kind, bool adapted) {
    if (l.experts) {
        inputs.of(rows * cols * bytes_of(kind)), outputs.of(rows * cols * bytes_of(kind));
        return prepare_mixture(kernels, *l.experts, rows, cols, kind);
    }
    for_ups[0].of(kernels, l.up, rows), for_downs[0].of(kernels, l.down, rows);
    inners[0].of(rows * l.down.ins * bytes_of(kind));
    if (adapted) ups.of(rows * l.up.outs * bytes_of(kind));
}

void mix(const Worker& w, const Experts& experts, const Rows& x, const Rows& out) {
    Mixture(w.kernels, experts, x.rows, x.cols, x.kind, w.at, w.count).run(w, x, out);
}

void norm_for_mlp(const Worker& w, const Layer& l) {
    if (l.experts) w.norm(l, l.mlp_norm, l.mlp_norm_bias, strided(inputs.of(0), w.h.rows, w.h.cols, w.h.kind));
    else w.normed(l, l.mlp_norm, l.mlp_norm_bias, l.up, for_ups[0].of(w.kernels, l.up, w.h.rows));
}

void mlp(const Worker& w, const Layer& l, int64_t layer) {
    if (!l.parallel) norm_for_mlp(w, l);
    if (!l.experts) return run_dense(w, l, layer);
    const Rows out = strided(outputs.of(0), w.h.rows, w.h.cols, w.h.kind);
    mix(w, *l.experts, strided(inputs.of(0), w.h.rows, w.h.cols, w.h.kind), out);
    w.add(l, out, l.mlp_post);
}

}  // namespace redraft
