#include "grad_dot_simd.h"

namespace {

// A fixed number of lanes makes the result the same on every instruction set.
template <int kLanes, typename T>
void dots(const T* y, const T* g, int64_t rows, int64_t d, int64_t g_stride, T* out) {
  for (int64_t r = 0; r < rows; ++r, y += d, g += g_stride) {
    T lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] += y[i + j] * g[i + j];
    for (int j = 0; i + j < d; ++j) lane[j] += y[i + j] * g[i + j];
    for (int w = kLanes / 2; w; w /= 2)
      for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
    out[r] += lane[0];
  }
}

template <typename T>
void any_dots(const T* y, const T* g, int64_t rows, int64_t d, int64_t g_stride, T* out) {
  if (d < 4)
    dots<1>(y, g, rows, d, g_stride, out);
  else if (d < 64)
    dots<4>(y, g, rows, d, g_stride, out);
  else
    dots<64>(y, g, rows, d, g_stride, out);
}

}  // namespace

namespace u2a::U2A_ISA {
void row_dot(const float* y, const float* g, int64_t rows, int64_t d, int64_t g_stride,
             float* out) {
  any_dots(y, g, rows, d, g_stride, out);
}
void row_dot(const double* y, const double* g, int64_t rows, int64_t d, int64_t g_stride,
             double* out) {
  any_dots(y, g, rows, d, g_stride, out);
}
}  // namespace u2a::U2A_ISA
