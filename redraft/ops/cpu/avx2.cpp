// Kernels for AVX2, FMA and F16C.
#include <immintrin.h>

#include "attend.h"
#include "kernels.h"

namespace redraft {
namespace {
#include "vec_avx2.h"
#include "vec_math.h"
#include "linear_impl.h"
#include "rows_impl.h"
#include "attend_impl.h"
const Kernels kernels{"avx2", takes, pieces, linear, norm, copy, quantize, activate, cap, low_rank, route, rope, contenders, products, &ATTEND};
}  // namespace
const Kernels* avx2_kernels() { return &kernels; }
}  // namespace redraft
