// A segment of decoder layers in one job: the computation of redraft/models/layers.py with the same roundings.
#pragma once
#include "attend.h"
#include "kernels.h"

namespace redraft {

// How a layer attends, see AttendJob. rotary: the index of its rotary in the step, -1 none.
struct Heads {
    int32_t count, window, rotary;
    float scale, softcap;
    const float* sink_logits;
};

// A mixture of experts, see core/spec.py. up, down: [count + shared], the shared expert last, the others with one kind, group and number
// of outliers. router, gate: of the kind of the model; gate without panels: the shared expert has none.
struct Experts {
    const Linear *up, *down;
    Linear router, gate;
    int32_t count, top_k, renormalise, shared;
    Activation activation, shared_activation;
    float limit, shift;  // of the experts but the shared one, see LinearJob
};

struct Layer {
    Linear qkv, out, up, down;
    const Experts* experts;      // null: up and down are the mlp; otherwise these are unused
    const uint8_t *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *attn_post, *mlp_post, *q_norm, *k_norm;  // null: none
    Heads heads;
    float eps, qk_eps, post_eps, residual;  // residual: factor of what is added to the hidden states
    int32_t rms, qk_rms, post_rms;
    int32_t together, apart;     // q_norm and k_norm are of all heads as one vector; have gains for each head
    int32_t parallel;            // the mlp reads the layer's input
    Kind gains;                  // of the weights of norms
    Activation activation;
};

// The low-rank terms of the rows of a pass. of_row [rows]: the adapter of each, -1 for none. Those of a part of layer l of an adapter are
// terms[starts[4 l + part]] up to terms[starts[4 l + part + 1]].
enum AdaptedPart { QKV, OUT, UP, DOWN };
struct Adapter {
    const LowRank* terms;
    const int32_t* starts;
};
struct Adapters {
    const int32_t* of_row;
    const Adapter* every;
};

// Sequences of a forward pass whose pages have the same formats. rows: those of the pass, whose cos and then sin of every rotary are
// turns, [rows][half]. far: null, or the rotations of queries for keys before a window, in the same layout. plan: made by
// plan_attention.
struct Step {
    int64_t rows, count;
    const Seq* seqs;
    Pool pool, encoded;  // encoded: see AttendJob
    const float *turns, *far;
    int64_t half;
    const Watched* watched;
    int64_t watches;
    const AttendPlan* plan;
};

// Attention in layer `layer`.
AttendJob attend_job(const Step&, int layer, const Heads&, const Rows& q, const Rows& out);

// Angles in double; cos and sin times the scale of their pair.
struct Rotaries {
    const double *frequencies, *scales;  // [count][half]
    int64_t count, half;
};
void find_turns(const Rotaries&, const int32_t* positions, int64_t rows, float* turns);

// Buffers shared by all calls, one for each step of a pass; one job runs at a time.
Attention& attention(int64_t i = 0);

// steps: together they hold all sequences of the pass. adapters: null for none; then no layer is parallel.
void run_layers(const Kernels&, const Layer* layers, int64_t first, int64_t last, const Step* steps, int64_t count, const Adapters* adapters, Rows h);

// y = x W^T + bias, x and y rows of the model's kind; h: the target of a sum (`add`).
void run_linear(const Kernels&, const Linear&, const Rows& x, const Rows& y, Activation, bool add);

// y = the output of a mixture for rows x.
void run_experts(const Kernels&, const Experts&, const Rows& x, const Rows& y);

// The head: the indices of the `keep` largest outputs of the rows of norm.x that `wanted` lists, [count][keep].
void run_head(const Kernels&, NormJob norm, const Linear&, const int32_t* wanted, int64_t count, int32_t keep, int32_t* best, int32_t* argmax);

// A model, for run_step. rows: embeddings [vocab][hidden] of kind `kind`; null: the weights of the head, unquantized. pool: of plain pages.
struct Model {
    const Layer* layers;
    int64_t count, hidden;
    const uint8_t *rows, *norm, *norm_bias;
    Linear head;
    Rotaries rotaries;
    Pool pool;
    float eps, embed_scale;
    int32_t rms;
    Kind kind, gains;  // gains: of the weights of the final norm
};

// A whole pass whose sequences have plain pages in shared lanes, one Seq each. batch: T rows, S sequences, R wanted rows, N node rows, W
// words, 0; then visible u64 [N][W], tokens [T], positions [T], wanted rows [R]; then for each sequence its rows, chain_rows, tail, chain,
// number of pages, length, pages, tail_at, see Seq. best: the largest output of each wanted row, -1 where a row has NaN or infinity, then
// the `keep` largest, [R][keep]. logits: [R][outs], or null. adapters: as for run_layers. start: what the rows start from in place of their
// embeddings, or null; states: gets what the last layer returns, or null; both [T][hidden] of the model's kind.
struct Ends {
    const uint8_t* start;
    uint8_t* states;
};
void run_step(const Kernels&, const Model&, const int32_t* batch, const Adapters* adapters, int32_t keep, int32_t* best, float* logits, Ends);

void write_keys(const AttendKernels&, const Step&, int64_t layer, const Rows& k, const Rows& v, int worker, int workers);

}  // namespace redraft
