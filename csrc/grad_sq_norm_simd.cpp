#include "grad_sq_norm_simd.h"

#include "lanes.h"

namespace {

// The register tile only says which sums are made together.
#if defined(__AVX512F__)
constexpr int kRows = 4, kCols = 4;
#elif defined(__AVX2__)
constexpr int kRows = 2, kCols = 2;
#else
constexpr int kRows = 1, kCols = 2;
#endif

// out[r][c] = <a_r, b_c> for R rows of a and C rows of b.
template <int R, int C, typename T>
void products(const T* a, const T* b, int64_t d, T out[kRows][kCols]) {
  using L = Lanes<T>;
  typename L::Vector acc[R][C] = {};
  sweep<T>(d, [&](int64_t i, int64_t n) {
    typename L::Vector u[R], v[C];
    for (int r = 0; r < R; ++r) load(u[r], a + r * d + i, n);
    for (int c = 0; c < C; ++c) load(v[c], b + c * d + i, n);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) acc[r][c] += u[r] * v[c];
  });
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_of(acc[r][c]);
}

template <int R, typename T>
void products_of_rows(int cols, const T* a, const T* b, int64_t d, T out[kRows][kCols]) {
  if (cols == 1) return products<R, 1>(a, b, d, out);
  if (kCols == 2 || cols == 2) return products<R, 2>(a, b, d, out);
  if constexpr (kCols > 2) cols == 3 ? products<R, 3>(a, b, d, out) : products<R, 4>(a, b, d, out);
}

template <typename T>
void tile(int rows, int cols, const T* a, const T* b, int64_t d, T out[kRows][kCols]) {
  if (rows == 1) return products_of_rows<1>(cols, a, b, d, out);
  if constexpr (kRows > 1)
    if (kRows == 2 || rows == 2) return products_of_rows<2>(cols, a, b, d, out);
  if constexpr (kRows > 2)
    rows == 3 ? products_of_rows<3>(cols, a, b, d, out) : products_of_rows<4>(cols, a, b, d, out);
}

// Row t holds 2 sum_{s < t} + its own pair, in the order of s; rows are added in order.
template <typename T>
double pairs(const T* x, const T* g, int64_t n, int64_t d_in, int64_t d_out) {
  double total = 0;
  T px[kRows][kCols], pg[kRows][kCols];
  for (int64_t t = 0; t < n; t += kRows) {
    const int rows = n - t < kRows ? static_cast<int>(n - t) : kRows;
    double row[kRows] = {};
    for (int64_t s = 0; s < t + rows; s += kCols) {
      const int cols = t + rows - s < kCols ? static_cast<int>(t + rows - s) : kCols;
      tile(rows, cols, x + t * d_in, x + s * d_in, d_in, px);
      tile(rows, cols, g + t * d_out, g + s * d_out, d_out, pg);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols && s + c <= t + r; ++c) {
          const double weight = s + c < t + r ? 2 : 1;
          row[r] += weight * (static_cast<double>(px[r][c]) * static_cast<double>(pg[r][c]));
        }
    }
    for (int r = 0; r < rows; ++r) total += row[r];
  }
  return total;
}

// A few thousand products in T, then double.
template <typename T>
double dot(const T* p, const T* q, int64_t n) {
  constexpr int kWide = 4 * Lanes<T>::kCount;
  constexpr int64_t kRun = 4096;
  double total = 0;
  for (int64_t start = 0; start < n; start += kRun) {
    const int64_t end = n - start < kRun ? n : start + kRun;
    T lane[kWide] = {};
    int64_t i = start;
    for (; i + kWide <= end; i += kWide)
      for (int j = 0; j < kWide; ++j) lane[j] += p[i + j] * q[i + j];
    for (int j = 0; i + j < end; ++j) lane[j] += p[i + j] * q[i + j];
    for (int w = kWide / 2; w; w /= 2)
      for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
    total += lane[0];
  }
  return total;
}

template <typename T>
double rows_dot(const T* p, const T* q, int64_t rows, int64_t cols, int64_t row_stride) {
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) total += dot(p + r * row_stride, q + r * row_stride, cols);
  return total;
}

}  // namespace

#define U2A_DEFINE_SQ_NORM(T)                                                                   \
  void pair_norm(const T* x, const T* g, int64_t n, int64_t d_in, int64_t d_out, double* out) { \
    *out = pairs(x, g, n, d_in, d_out);                                                         \
  }                                                                                             \
  void block_dot(const T* p, const T* q, int64_t rows, int64_t cols, int64_t row_stride,        \
                 double* out) {                                                                 \
    *out = rows_dot(p, q, rows, cols, row_stride);                                              \
  }                                                                                             \
  void square_sum(const T* p, int64_t n, double* out) { *out = dot(p, p, n); }

namespace u2a::U2A_ISA {
U2A_DEFINE_SQ_NORM(float)
U2A_DEFINE_SQ_NORM(double)
}  // namespace u2a::U2A_ISA
