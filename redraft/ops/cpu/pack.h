#pragma once
#include "kernels.h"

namespace redraft {

// `w` gives the shape and kind; `to` has w.count() * w.panel_bytes() bytes.
void pack_plain(const Linear& w, const void* from, void* to);      // [outs, ins] of w.kind
// Unpacked and decoded, [count, ins] of this kind; w is not gated, and plain, then of this kind, or grouped.
void rows_of(const Linear& w, const int32_t* rows, int64_t count, Kind kind, void* to);
void pack_floats(const Linear& w, const float* from, float* to);   // [outs], in the order of the panels: a bias, scales
void pack_int8(const Linear& w, const int8_t* codes, void* to, int32_t* sums);
void pack_groups(const Linear& w, const int8_t* codes, void* to);
void arrange(const Linear& w, const void* from, int64_t size, int64_t count, void* to);  // elements [outs, count] -> [panels][count][64]

}  // namespace redraft
