#pragma once
#include <cstdint>

#include "isa.h"

// out[r] += <y[r, :], g[r, :]> for rows of d numbers, g's g_stride apart.
#define U2A_DECLARE_DOT(T) \
  U2A_DECLARE_SIMD(        \
      void row_dot(const T* y, const T* g, int64_t rows, int64_t d, int64_t g_stride, T* out))
U2A_DECLARE_DOT(float)
U2A_DECLARE_DOT(double)
#undef U2A_DECLARE_DOT
