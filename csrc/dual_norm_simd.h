#pragma once
#include <cstdint>

#include "isa.h"
#include "lanes.h"

namespace u2a {

// Rows of width d, the tangent of each `half` elements behind it. Directions and bias are zeros
// where absent; RMSNorm (not centred) reads no bias.
template <typename T>
struct Norm {
  const T *w, *w_t, *b, *b_t;
  int64_t d, half;
  T eps;
  bool centred;
};

constexpr int64_t kNormForwardScratch = 4, kNormBackwardScratch = 6;  // rows of d

}  // namespace u2a

// y <- norm of rows [0, n) of x; dx <- gradient, dw and db (or null) += gradients of weight, bias.
#define U2A_DECLARE_NORM(S)                                                                  \
  U2A_DECLARE_SIMD(void norm_rows(const S* x, S* y, int64_t n, const Norm<Compute<S>>& norm, \
                                  Compute<S>* scratch))                                      \
  U2A_DECLARE_SIMD(void norm_rows_bwd(const S* g, const S* x, S* dx, int64_t n,              \
                                      const Norm<Compute<S>>& norm, Compute<S>* dw,          \
                                      Compute<S>* db, Compute<S>* scratch))

U2A_DECLARE_NORM(float)
U2A_DECLARE_NORM(double)
U2A_DECLARE_NORM(BFloat16)
U2A_DECLARE_NORM(Float16)
#undef U2A_DECLARE_NORM
