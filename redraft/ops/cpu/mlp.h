// The feed-forward part of a decoder layer: two linear layers, or a mixture of experts.
#pragma once
#include "worker.h"

namespace redraft {

// Memory for layers with so many rows, before workers run. cols: of the hidden states; adapted: with low-rank terms.
void prepare_mlp(const Kernels&, const Layer&, int64_t rows, int64_t cols, Kind, bool adapted);
void prepare_mixture(const Kernels&, const Experts&, int64_t rows, int64_t cols, Kind);

// The norm of h as the input.
void norm_for_mlp(const Worker&, const Layer&);

// Adds the output to h. If the layer is parallel its input exists before the last barrier; otherwise this function norms h first. Every
// worker then goes on with its own rows.
void mlp(const Worker&, const Layer&, int64_t layer);

// The output of a mixture for the rows of x. Every worker writes its own rows of `out` and has written those of x.
void mix(const Worker&, const Experts&, const Rows& x, const Rows& out);

}  // namespace redraft
