#pragma once
#include <cstdint>

#include "isa.h"

// line[j] = sum over rows of p[r, j] * q[r, j]; then sums[c] += the sum of line[seg[c] - at ..
// seg[c + 1] - at) for the segments first..last, cut to [0, cols).
#define U2A_DECLARE_GRAM(T)                                                                  \
  U2A_DECLARE_SIMD(void segment_products(const T* p, const T* q, int64_t rows, int64_t cols, \
                                         double* line, const int64_t* seg, int64_t at,       \
                                         int64_t first, int64_t last, T* sums))

U2A_DECLARE_GRAM(float)
U2A_DECLARE_GRAM(double)
#undef U2A_DECLARE_GRAM
