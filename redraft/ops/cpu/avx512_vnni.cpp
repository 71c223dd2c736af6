// Kernels for AVX-512 with VNNI, as in Cascade Lake and Ice Lake.
#include <immintrin.h>

#include "attend.h"
#include "kernels.h"

#define DOT_INT8

namespace redraft {
namespace {
#include "vec_avx512.h"
#include "vec_math.h"
#include "linear_impl.h"
#include "rows_impl.h"
#include "attend_impl.h"
const Kernels kernels{"avx512_vnni", takes, pieces, linear, norm, copy, quantize, activate, cap, low_rank, route, rope, contenders, products, &ATTEND};
}  // namespace
const Kernels* avx512_vnni_kernels() { return &kernels; }
}  // namespace redraft
