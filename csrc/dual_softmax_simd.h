#pragma once
#include <cstdint>

#include "isa.h"
#include "lanes.h"

// Rows of width v, the tangent of each `half` elements behind it; scratch holds 2 (4 in the
// backward) rows of it for 16-bit types.
#define U2A_DECLARE_SOFTMAX(S)                                                                  \
  U2A_DECLARE_SIMD(void softmax_rows(const S* z, S* out, int64_t n, int64_t v, int64_t half,    \
                                     Compute<S>* scratch))                                      \
  U2A_DECLARE_SIMD(void softmax_rows_bwd(const S* g, const S* out, S* dz, int64_t n, int64_t v, \
                                         int64_t half, bool ggn, Compute<S>* scratch))

U2A_DECLARE_SOFTMAX(float)
U2A_DECLARE_SOFTMAX(double)
U2A_DECLARE_SOFTMAX(BFloat16)
U2A_DECLARE_SOFTMAX(Float16)
#undef U2A_DECLARE_SOFTMAX
