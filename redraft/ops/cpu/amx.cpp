// Kernels for AMX (TILE, BF16, INT8), and those of AVX-512 with BF16 and VNNI that are as good or better.
// REDRAFT_EMULATE_TILES (test/amx_test.cpp only): tile instructions in plain C++, for machines without them.
#include <immintrin.h>

#include "attend.h"
#include "kernels.h"

#ifdef REDRAFT_EMULATE_TILES
#include "test/tiles_emulated.h"
#endif

#define DOT_BF16
#define DOT_INT8

namespace redraft {
namespace {
#include "vec_avx512.h"
#include "vec_math.h"
#include "linear_impl.h"
#include "amx_impl.h"
#include "rows_impl.h"
#undef DOT_BF16  // processors with AMX multiply float32 twice as fast as pairs of bf16
#include "attend_impl.h"
const Kernels kernels{"amx", takes, tile_pieces, tile_linear, norm, copy, quantize, activate, cap, low_rank, route, rope, contenders, products, &ATTEND};
}  // namespace
const Kernels* amx_kernels() { return &kernels; }
}  // namespace redraft
