#include "grad_dot_simd.h"

namespace {

// A fixed number of lanes makes the result the same on every instruction set.
template <typename T>
void dots(const T* y, const T* g, int64_t rows, int64_t d, T* out) {
  constexpr int kLanes = 64;
  for (int64_t r = 0; r < rows; ++r, y += d, g += d) {
    T lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += y[i + j] * g[i + j];
    for (int j = 0; i + j < d; ++j) lane[j] += y[i + j] * g[i + j];
    for (int w = kLanes / 2; w; w /= 2)
      for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
    out[r] = lane[0];
  }
}

}  // namespace

namespace u2a::U2A_ISA {
void row_dot(const float* y, const float* g, int64_t rows, int64_t d, float* out) {
  dots(y, g, rows, d, out);
}
void row_dot(const double* y, const double* g, int64_t rows, int64_t d, double* out) {
  dots(y, g, rows, d, out);
}
}  // namespace u2a::U2A_ISA
