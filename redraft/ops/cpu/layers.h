// A segment of decoder layers in one job: what redraft/models/layers.py says, with the same roundings.
#pragma once
#include "attend.h"
#include "kernels.h"

namespace redraft {

struct Layer {
    Linear qkv, out, up, down;
    const uint8_t *attn_norm, *attn_norm_bias, *mlp_norm, *mlp_norm_bias, *q_norm, *k_norm;  // biases and q_norm, k_norm may be null
    float eps, qk_eps;
    int32_t rms, heads, window, rotary;  // window: 0 none; rotary: which of the step's turns, -1 none
    Activation activation;
};

// One forward pass: its sequences, and cos and sin [rows][size / 2] of every rotary.
struct Step {
    int64_t rows, count;
    const Seq* seqs;
    Pool pool;
    const float* const* cos;
    const float* const* sin;
    const Watched* watched;
    int64_t watches;
};

// What all calls work in; one job runs at a time.
Attention& attention();

void run_layers(const Kernels&, const Layer* layers, int64_t first, int64_t last, const Step&, const AttendPlan&, Rows h);

// y = x W^T + bias, x and y rows of the model's kind; h: where a sum goes to (`add`).
void run_linear(const Kernels&, const Linear&, const Rows& x, const Rows& y, Activation, bool add);

// The `keep` largest outputs of every row, [rows][keep].
void run_best(const Kernels&, const Linear&, const Rows& x, Kind rounded, int32_t keep, Best* best);

void write_keys(const AttendKernels&, const Step&, int64_t layer, const Rows& k, const Rows& v, int worker, int workers);

}  // namespace redraft
