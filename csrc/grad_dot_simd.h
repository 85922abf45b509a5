#pragma once
#include <cstdint>

#include "isa.h"

// out[r] = <y[r, :], g[r, :]>
U2A_DECLARE_SIMD(void row_dot(const float* y, const float* g, int64_t rows, int64_t d, float* out))
U2A_DECLARE_SIMD(void row_dot(const double* y, const double* g, int64_t rows, int64_t d,
                              double* out))
