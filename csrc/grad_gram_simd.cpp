#include "grad_gram_simd.h"

namespace {

double sum_of(const double* v, int64_t n) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += v[i + j];
  for (int j = 0; i + j < n; ++j) lane[j] += v[i + j];
  for (int w = kLanes / 2; w; w /= 2)
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  return lane[0];
}

template <typename T>
void products(const T* p, const T* q, int64_t rows, int64_t cols, double* line, const int64_t* seg,
              int64_t at, int64_t first, int64_t last, T* sums) {
  for (int64_t j = 0; j < cols; ++j) line[j] = static_cast<double>(p[j]) * q[j];
  for (int64_t r = 1; r < rows; ++r)
    for (int64_t j = 0; j < cols; ++j)
      line[j] += static_cast<double>(p[r * cols + j]) * q[r * cols + j];
  for (int64_t c = first; c < last; ++c) {
    const int64_t lo = seg[c] > at ? seg[c] - at : 0;
    const int64_t hi = seg[c + 1] - at < cols ? seg[c + 1] - at : cols;
    if (hi > lo) sums[c] += static_cast<T>(sum_of(line + lo, hi - lo));
  }
}

}  // namespace

#define U2A_DEFINE_GRAM(T)                                                                      \
  void segment_products(const T* p, const T* q, int64_t rows, int64_t cols, double* line,       \
                        const int64_t* seg, int64_t at, int64_t first, int64_t last, T* sums) { \
    products(p, q, rows, cols, line, seg, at, first, last, sums);                               \
  }

namespace u2a::U2A_ISA {
U2A_DEFINE_GRAM(float)
U2A_DEFINE_GRAM(double)
}  // namespace u2a::U2A_ISA
