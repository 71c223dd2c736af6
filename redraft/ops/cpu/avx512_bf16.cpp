// Kernels for AVX-512 with BF16 and VNNI.
#include <immintrin.h>

#include "attend.h"
#include "kernels.h"

#define DOT_BF16
#define DOT_INT8

namespace redraft {
namespace {
#include "vec_avx512.h"
#include "vec_math.h"
#include "linear_impl.h"
#include "rows_impl.h"
#include "attend_impl.h"
const Kernels kernels{"avx512_bf16", takes, pieces, linear, norm, copy, quantize, activate, cap, low_rank, route, rope, contenders, products, &ATTEND};
}  // namespace
const Kernels* avx512_bf16_kernels() { return &kernels; }
}  // namespace redraft
