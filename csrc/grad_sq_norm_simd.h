#pragma once
#include <cstdint>

#include "isa.h"

// Each *out is summed in double, in an order that no instruction set changes.
#define U2A_DECLARE_SQ_NORM(T)                                                                     \
  /* sum of (x_t . x_s)(g_t . g_s) over all pairs of the rows of x [n, d_in], g [n, d_out] */      \
  U2A_DECLARE_SIMD(                                                                                \
      void pair_norm(const T* x, const T* g, int64_t n, int64_t d_in, int64_t d_out, double* out)) \
  /* sum of p * q over [rows, cols] with a row stride */                                           \
  U2A_DECLARE_SIMD(void block_dot(const T* p, const T* q, int64_t rows, int64_t cols,              \
                                  int64_t row_stride, double* out))                                \
  U2A_DECLARE_SIMD(void square_sum(const T* p, int64_t n, double* out))

U2A_DECLARE_SQ_NORM(float)
U2A_DECLARE_SQ_NORM(double)
#undef U2A_DECLARE_SQ_NORM
