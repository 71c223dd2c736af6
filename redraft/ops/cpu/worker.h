// What jobs over layers share: the inputs of linear layers, and one worker of such a job.
#pragma once
#include "arena.h"
#include "layers.h"
#include "threads.h"

namespace redraft {

// Tiles of the input rows of a linear layer, in the form that it needs.
struct Feed {
    Rows tiles{};
    Coded coded{};

    bool codes() const { return tiles.kind == I8; }
    Feed part(const Linear& w, int64_t first, int64_t count) const {  // some of the rows as tiles of their own
        Feed own = *this;
        own.tiles.data += first * tiles.lines() * LINE;
        own.tiles.rows = count;
        if (codes()) own.coded = coded.from(w, first);
        return own;
    }
};

class Feeds {  // a buffer for each linear layer of a decoder layer that may be filled while another is read
public:
    Feed of(const Kernels& kernels, const Linear& w, int64_t rows) {
        const Kind kind = kernels.takes(w.kind);
        const int64_t per_step = w.kind == F32 ? 1 : w.kind == BF16 ? 2 : 4;
        Feed feed;
        feed.tiles = {nullptr, rows, w.steps() * per_step, 0, kind};
        feed.tiles.data = tiles_.of(feed.tiles.size());
        if (kind == I8) {
            const int64_t groups = rows * w.groups();
            feed.coded = {scale_.of<float>(rows), factors_.of<float>(groups), sums_.of<int32_t>(groups), outliers_.of<float>(rows * w.outliers)};
        }
        return feed;
    }

private:
    Buffer tiles_, scale_, factors_, sums_, outliers_;
};

inline void fill(const Kernels& kernels, const Linear& w, const Rows& x, const Feed& feed, Share rows) {
    if (feed.codes()) kernels.quantize(x, w, feed.tiles, feed.coded, rows.first, rows.last);
    else kernels.copy(x, feed.tiles, rows.first, rows.last);
}

inline LinearJob job_of(const Linear& w, const Feed& feed, const Rows& y, Kind rounded, Activation activation = NONE) {
    return {w, feed.tiles, feed.coded, y, rounded, activation, 0, nullptr, 0};
}

inline Rows strided(uint8_t* data, int64_t rows, int64_t cols, Kind kind) { return {data, rows, cols, cols * bytes_of(kind), kind}; }

// One worker of a job over decoder layers. own: the rows that only this worker norms, copies and adds.
struct Worker {
    const Kernels& kernels;
    int at, count;
    Rows h;       // hidden states
    Rows norms;   // room for as many rows
    float* sums;  // [rows][64]
    const Adapters* adapters = nullptr;
    Share own = Share(h.rows, at, count);

    // The norm of h as the input of w: written as tiles directly, or as rows first if codes are made of them.
    void normed(const Layer& l, const uint8_t* weight, const uint8_t* bias, const Linear& w, const Feed& feed) const {
        norm(l, weight, bias, feed.codes() ? norms : feed.tiles);
        if (feed.codes()) fill(kernels, w, norms, feed, own);
    }
    void norm(const Layer& l, const uint8_t* weight, const uint8_t* bias, const Rows& to) const {
        kernels.norm({h, to, weight, bias, l.eps, l.rms, h.kind, l.gains}, own.first, own.last);
    }
    void panels(const LinearJob& job) const {
        const Share mine(kernels.pieces(job.w), at, count);
        kernels.linear(job, mine.first, mine.last, sums);
    }
    // Adds the terms of this worker's rows to y, the product of x.
    void adapt(int64_t layer, AdaptedPart part, const Rows& x, const Rows& y) const {
        for (int64_t r = own.first; adapters && r < own.last; r++) {
            if (adapters->of_row[r] < 0) continue;
            const Adapter& one = adapters->every[adapters->of_row[r]];
            for (int64_t t = one.starts[4 * layer + part]; t < one.starts[4 * layer + part + 1]; t++) kernels.low_rank(x, y, one.terms[t], r);
        }
    }
    // Adds w x to h, at once or by way of `norms`. Every worker then goes on with its own rows.
    void added(const Layer& l, const Linear& w, const Feed& feed, const uint8_t* post, int64_t layer, AdaptedPart part, const Rows& x) const {
        const bool direct = !post && l.residual == 1 && !adapters;
        LinearJob job = job_of(w, feed, direct ? h : norms, h.kind);
        job.add = direct;
        panels(job);
        barrier();
        if (direct) return;
        adapt(layer, part, x, norms);
        add(l, norms, post);
    }
    void add(const Layer& l, const Rows& made, const uint8_t* post) const {
        kernels.norm({made, h, post, nullptr, l.post_eps, l.post_rms, h.kind, l.gains, l.residual, 1}, own.first, own.last);
    }
};

}  // namespace redraft
