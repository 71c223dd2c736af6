#include "layers.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <vector>

#include "mlp.h"
#include "pack.h"

namespace redraft {
namespace {

struct Scratch {  // of one worker: sums of a panel
    std::vector<Buffer> of_worker;

    void grow(int workers, int64_t rows) {
        if (int(of_worker.size()) < workers) of_worker = std::vector<Buffer>(workers);
        for (auto& one : of_worker) one.of<float>(rows * PANEL);
    }
    float* at(int worker, int64_t rows) { return of_worker[worker].of<float>(rows * PANEL); }
};

Scratch scratch;
Feeds feeds[2];
Buffer buffers[3];

// For each repeated job: a segment or head (by its address) and the number of rows, rounded up to a power of two.
constexpr int64_t FEW = 32;  // rows; jobs with more rows always use all workers
Pace& pace_of(const void* what, int64_t first, int64_t last, int64_t rows) {
    static auto* paces = new std::map<std::array<int64_t, 4>, Pace>();
    if (paces->size() > 1024) paces->clear();
    int64_t size = 1;
    while (size < rows) size *= 2;
    return (*paces)[{reinterpret_cast<int64_t>(what), first, last, size}];
}

template <class Job>
void run_paced(const void* what, int64_t first, int64_t last, int64_t rows, const Job& job) {
    if (rows > FEW) run(job);
    else run(job, pace_of(what, first, last, rows));
}

Rows columns(const Rows& x, int64_t first, int64_t count) { return {x.data + first * bytes_of(x.kind), x.rows, count, x.stride, x.kind}; }

}  // namespace

Attention& attention(int64_t i) {
    static auto* made = new std::deque<Attention>();  // never destroyed: see threads.cpp
    while (int64_t(made->size()) <= i) made->emplace_back();
    return (*made)[i];
}

namespace {
void turns_of(const Rotaries& rotaries, const int32_t* positions, int64_t rows, Share own, float* turns) {
    const int64_t half = rotaries.half;
    for (int64_t i = 0; i < rotaries.count; i++)
        for (int64_t r = own.first; r < own.last; r++)
            for (int64_t k = 0; k < half; k++) {
                const double angle = positions[r] * rotaries.frequencies[i * half + k], scale = rotaries.scales[i * half + k];
                float* cos = turns + (2 * i * rows + r) * half + k;
                cos[0] = float(std::cos(angle) * scale);
                cos[rows * half] = float(std::sin(angle) * scale);
            }
}
}  // namespace

void find_turns(const Rotaries& rotaries, const int32_t* positions, int64_t rows, float* turns) {
    const auto share = [&](int worker, int workers) { turns_of(rotaries, positions, rows, Share(rows, worker, workers), turns); };
    if (rows > FEW) run(share);
    else share(0, 1);
}

AttendJob attend_job(const Step& step, int layer, const Heads& heads, const Rows& q, const Rows& out) {
    AttendJob job{step.seqs, step.count, step.pool, step.encoded, layer, heads.count, heads.window, q, out, heads.scale, heads.softcap};
    job.watched = step.watched, job.watches = step.watches, job.half = step.half, job.sink_logits = heads.sink_logits;
    if (step.far && heads.rotary >= 0) job.far = step.far + 2 * heads.rotary * step.rows * step.half;
    return job;
}

void write_keys(const AttendKernels& kernels, const Step& step, int64_t layer, const Rows& k, const Rows& v, int worker, int workers) {
    const Pool& pool = step.pool;
    const int64_t bytes = pool.size * bytes_of(pool.kind);
    for (int64_t s = 0; s < step.count; s++) {
        const Seq& seq = step.seqs[s];
        const Share own(seq.rows, worker, workers);
        for (int64_t head = 0; head < pool.kv_heads; head++) {
            const int64_t start = length_of(seq, pool, layer, head) + seq.tail;
            for (int64_t r = own.first; r < own.last; r++) {
                const int64_t slot = seq.slots ? seq.slots[r] : start + r;
                uint8_t* unit = find_unit(seq, pool, step.encoded, layer, head, slot / PAGE).at;
                const auto put = [&](const Rows& x, int64_t offset, int64_t scales) {
                    const uint8_t* from = x.at(seq.first + r, head * pool.size);
                    uint8_t* to = unit + offset + slot % PAGE * bytes;
                    if (pool.kind != I8) std::memcpy(to, from, bytes);
                    else kernels.encode(from, x.kind, pool.size, reinterpret_cast<int8_t*>(to), reinterpret_cast<float*>(unit + scales) + slot % PAGE);
                };
                put(k, 0, pool.key_scales);
                put(v, pool.values, pool.value_scales);
            }
        }
    }
}

void run_experts(const Kernels& kernels, const Experts& experts, const Rows& x, const Rows& y) {
    scratch.grow(threads(), x.rows);
    prepare_mixture(kernels, experts, x.rows, x.cols, x.kind);
    run([&](int worker, int workers) {
        mix({kernels, worker, workers, x, Rows{}, scratch.at(worker, x.rows)}, experts, x, y);
    });
}

void run_linear(const Kernels& kernels, const Linear& w, const Rows& x, const Rows& y, Activation activation, bool add) {
    const Feed feed = feeds[0].of(kernels, w, x.rows);
    scratch.grow(threads(), x.rows);
    run([&](int worker, int workers) {
        fill(kernels, w, x, feed, Share(x.rows, worker, workers));
        barrier();
        LinearJob job = job_of(w, feed, y, y.kind, activation);
        job.add = add;
        const Share own(kernels.pieces(w), worker, workers);
        kernels.linear(job, own.first, own.last, scratch.at(worker, x.rows));
    });
}

namespace {
// The job of each worker: the norm of the wanted rows of norm.x, then the `keep` largest outputs to found, [workers][count][keep], and
// all of them to `logits` if it has data.
auto head_job(const Kernels& kernels, NormJob norm, const Linear& w, const int32_t* wanted, int64_t count, const Rows& logits, int32_t keep, Best* found) {
    const Rows h = norm.x;
    const Feed feed = feeds[0].of(kernels, w, count);
    const Rows norms = strided(buffers[0].of(count * h.cols * bytes_of(h.kind)), count, h.cols, h.kind);
    norm.y = feed.codes() ? norms : feed.tiles;
    scratch.grow(threads(), count);
    return [=, &kernels, &w](int worker, int workers) {
        const Share rows(count, worker, workers);
        for (int64_t r = rows.first; r < rows.last; r++) {
            NormJob one = norm;
            one.x.data += (wanted[r] - r) * h.stride;  // its row r is the wanted one
            kernels.norm(one, r, r + 1);
        }
        if (feed.codes()) fill(kernels, w, norms, feed, rows);
        barrier();
        LinearJob job = job_of(w, feed, logits, F32);  // unrounded sums, because rounding would create ties
        job.best = found + worker * count * keep;
        job.keep = keep;
        const Share own(kernels.pieces(w), worker, workers);
        kernels.linear(job, own.first, own.last, scratch.at(worker, count));
    };
}

std::vector<Best> none_found(int64_t count, int32_t keep) {
    return std::vector<Best>(threads() * count * keep, Best{-std::numeric_limits<float>::infinity(), -1});
}

// best: [count][keep]; argmax: [count], -1 where a row has NaN or infinity.
void merge(const std::vector<Best>& found, int64_t count, int32_t keep, int32_t* best, int32_t* argmax) {
    const auto above = [](const Best& a, const Best& b) {  // the entries of the first worker have the lower indices
        return a.value > b.value || (a.value != a.value && b.value == b.value);
    };
    std::vector<Best> merged;
    for (int64_t r = 0; r < count; r++) {
        merged.clear();
        for (int64_t from = r * keep; from < int64_t(found.size()); from += count * keep)
            for (int32_t i = 0; i < keep; i++)
                if (found[from + i].index >= 0) merged.push_back(found[from + i]);
        std::stable_sort(merged.begin(), merged.end(), above);
        for (int32_t i = 0; i < keep; i++) best[r * keep + i] = merged[i].index;  // keep is at most the number of outputs
        argmax[r] = merged[0].value < std::numeric_limits<float>::infinity() ? merged[0].index : -1;
    }
}
}  // namespace

void run_head(const Kernels& kernels, NormJob norm, const Linear& w, const int32_t* wanted, int64_t count, int32_t keep, int32_t* best, int32_t* argmax) {
    std::vector<Best> found = none_found(count, keep);
    run_paced(w.panels, 0, 0, count, head_job(kernels, norm, w, wanted, count, Rows{}, keep, found.data()));
    merge(found, count, keep, best, argmax);
}

namespace {
// The job of each worker. Buffers have their final sizes when all jobs of a call are made, so workers find their addresses.
auto segment_job(const Kernels& kernels, const Layer* layers, int64_t first, int64_t last, const Step* steps, int64_t count, const Adapters* adapters, Rows h) {
    const int64_t rows = h.rows;
    const Kind kind = h.kind;
    const Pool& pool = steps->pool;  // the same heads in all of them
    scratch.grow(threads(), rows);
    for (int64_t i = first; i < last; i++) {  // all buffers get their size before workers run
        const Layer& l = layers[i];
        feeds[0].of(kernels, l.qkv, rows), feeds[1].of(kernels, l.out, rows);
        const int64_t q_size = l.heads.count * pool.size, k_size = pool.kv_heads * pool.size;
        int64_t wanted[] = {h.cols, q_size + 2 * k_size, q_size};
        for (int b = 0; b < 3; b++) buffers[b].of(rows * wanted[b] * bytes_of(kind));
        prepare_mlp(kernels, l, rows, h.cols, kind, adapters);
    }
    for (int64_t s = 0; s < count; s++) attention(s).prepare(*kernels.attend, *steps[s].plan, layers[first].heads.count, threads());
    return [=, &kernels, &pool](int worker, int workers) {
        const Worker w{kernels, worker, workers, h, strided(buffers[0].of(0), rows, h.cols, kind), scratch.at(worker, rows), adapters};
        const Share own = w.own;
        for (int64_t i = first; i < last; i++) {
            const Layer& l = layers[i];
            const int64_t q_size = l.heads.count * pool.size, k_size = pool.kv_heads * pool.size;
            const Feed for_qkv = feeds[0].of(kernels, l.qkv, rows), for_out = feeds[1].of(kernels, l.out, rows);
            const Rows qkv = strided(buffers[1].of(0), rows, q_size + 2 * k_size, kind);
            const Rows seen = strided(buffers[2].of(0), rows, q_size, kind);

            w.normed(l, l.attn_norm, l.attn_norm_bias, l.qkv, for_qkv);
            if (l.parallel) norm_for_mlp(w, l);
            barrier();
            w.panels(job_of(l.qkv, for_qkv, qkv, kind));
            barrier();
            w.adapt(i, QKV, for_qkv.codes() ? w.norms : for_qkv.tiles, qkv);

            const Rows q = columns(qkv, 0, q_size), k = columns(qkv, q_size, k_size), v = columns(qkv, q_size + k_size, k_size);
            const auto norm_head = [&](const Rows& one, const uint8_t* weight) {
                kernels.norm({one, one, weight, nullptr, l.qk_eps, l.qk_rms, kind, l.gains}, own.first, own.last);
            };
            if (l.q_norm && l.together) norm_head(q, l.q_norm), norm_head(k, l.k_norm);
            for (int64_t head = 0; l.q_norm && !l.together && head < l.heads.count + pool.kv_heads; head++) {
                const int64_t other = head - l.heads.count, gains = l.apart * pool.size * bytes_of(l.gains);  // bytes from head to head
                norm_head(columns(qkv, head * pool.size, pool.size), other < 0 ? l.q_norm + head * gains : l.k_norm + other * gains);
            }
            if (l.heads.rotary >= 0) {
                const int64_t each = rows * steps->half;
                const float* cos = steps->turns + 2 * l.heads.rotary * each;
                kernels.rope(qkv, l.heads.count + pool.kv_heads, pool.size, cos, cos + each, own.first, own.last);
            }
            barrier();
            for (int64_t s = 0; s < count; s++) write_keys(*kernels.attend, steps[s], i, k, v, worker, workers);
            barrier();
            for (int64_t s = 0; s < count; s++) {
                const AttendJob job = attend_job(steps[s], int(i), l.heads, q, seen);
                attend(*kernels.attend, job, *steps[s].plan, attention(s), worker, workers);
            }
            barrier();
            fill(kernels, l.out, seen, for_out, own);
            barrier();
            w.added(l, l.out, for_out, l.attn_post, i, OUT, seen);
            mlp(w, l, i);
        }
        barrier();
    };
}
}  // namespace

void run_layers(const Kernels& kernels, const Layer* layers, int64_t first, int64_t last, const Step* steps, int64_t count, const Adapters* adapters, Rows h) {
    run_paced(layers, first, last, h.rows, segment_job(kernels, layers, first, last, steps, count, adapters, h));
}

void run_step(const Kernels& kernels, const Model& model, const int32_t* batch, const Adapters* adapters, int32_t keep, int32_t* best, float* logits, Ends ends) {
    static auto* seqs = new std::vector<Seq>();
    static auto* plan = new AttendPlan();
    static auto *states = new Buffer(), *angles = new Buffer();
    const int32_t rows = batch[0], count = batch[1], wanted = batch[2], nodes = batch[3], words = batch[4];
    const auto* visible = reinterpret_cast<const uint64_t*>(batch + 6);
    const int32_t *tokens = batch + 6 + 2 * nodes * words, *positions = tokens + rows, *logit_rows = positions + rows, *next = logit_rows + wanted;
    seqs->assign(size_t(count), Seq{});
    int32_t first = 0;
    for (Seq& seq : *seqs) {
        seq.first = first, seq.rows = next[0], seq.chain_rows = next[1], seq.tail = next[2], seq.chain = next[3], seq.pages_per_lane = next[4];
        seq.words = words, seq.visible = visible, seq.at = positions + first;
        seq.lengths = next + 5, seq.pages = seq.encoded = next + 6, seq.tail_at = seq.pages + seq.pages_per_lane;
        next = seq.tail_at + seq.tail + seq.rows;
        visible += int64_t(seq.rows - seq.chain_rows) * words;
        first += seq.rows;
    }
    AttendChoices choices;
    choices.workers = threads();
    *plan = plan_attention(seqs->data(), count, model.pool, model.layers->heads.count, choices);
    const Kind kind = model.kind;
    const Rotaries& rotaries = model.rotaries;
    const Rows h = strided(states->of(rows * model.hidden * bytes_of(kind)), rows, model.hidden, kind);
    float* turns = angles->of<float>(2 * rotaries.count * rows * rotaries.half);
    const Step step{rows, count, seqs->data(), model.pool, Pool{}, turns, nullptr, rotaries.half, nullptr, 0, plan};
    std::vector<Best> found = none_found(wanted, keep);
    const auto layers = segment_job(kernels, model.layers, 0, model.count, &step, 1, adapters, h);
    const NormJob norm{h, Rows{}, model.norm, model.norm_bias, model.eps, model.rms, kind, model.gains};
    const Rows all{reinterpret_cast<uint8_t*>(logits), wanted, model.head.outs, int64_t(sizeof(float)) * model.head.outs, F32};
    const auto head = head_job(kernels, norm, model.head, logit_rows, wanted, all, keep, found.data());
    run_paced(model.layers, 0, model.count + 1, rows, [&](int worker, int workers) {
        const Share own(rows, worker, workers);  // the rows that this worker norms and rotates
        if (ends.start)
            std::memcpy(h.at(own.first, 0), ends.start + own.first * h.stride, size_t((own.last - own.first) * h.stride));
        else if (model.rows)
            for (int64_t r = own.first; r < own.last; r++) std::memcpy(h.at(r, 0), model.rows + tokens[r] * h.stride, size_t(h.stride));
        else
            rows_of(model.head, tokens + own.first, own.last - own.first, kind, h.at(own.first, 0));
        if (model.embed_scale != 1 && !ends.start) kernels.norm({h, h, nullptr, nullptr, 0, 1, kind, kind, model.embed_scale}, own.first, own.last);
        turns_of(rotaries, positions, rows, own, turns);
        layers(worker, workers);
        if (wanted) head(worker, workers);
    });
    if (ends.states) std::memcpy(ends.states, h.at(0, 0), size_t(rows * h.stride));
    merge(found, wanted, keep, best + wanted, best);
}

}  // namespace redraft
