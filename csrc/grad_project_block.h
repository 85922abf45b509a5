// A skinny GEMM block for grad_project_simd.cpp: k in vector lanes, rows in registers. Every sum
// runs over one index in one order with one fused multiply-add a step (float), so that results do
// not depend on the instruction set's vector length. Included once per instruction set.
#pragma once
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kRows = 4, kVectors = 3;
#else
constexpr int kBytes = 16, kRows = 4, kVectors = 2;
#endif

template <typename T>
struct Simd {
  typedef T V __attribute__((vector_size(kBytes)));
  typedef T U __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kBytes / sizeof(T);
};
using Floats = Simd<float>::V;
using Doubles = Simd<double>::V;

#if defined(__AVX512F__)
inline Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
inline Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__ARM_FEATURE_FMA)
inline Floats mul_add(Floats a, Floats b, Floats c) {
  for (int i = 0; i < Simd<float>::lanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
// The product is exact in double; the sum is rounded to odd, so that the second rounding is right.
inline float fused(float a, float b, float c) {
  const double p = static_cast<double>(a) * b, d = c, s = p + d, t = s - p;
  const double rest = (p - (s - t)) + (d - t);
  int64_t bits = __builtin_bit_cast(int64_t, s);
  if (rest != 0 && rest == rest && (bits & 1) == 0) bits += (rest > 0) == (s > 0) ? 1 : -1;
  return static_cast<float>(__builtin_bit_cast(double, bits));
}
inline Floats mul_add(Floats a, Floats b, Floats c) {
  for (int i = 0; i < Simd<float>::lanes; ++i) c[i] = fused(a[i], b[i], c[i]);
  return c;
}
#endif
inline Doubles mul_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }

// sum[m][v] = sum_s a[m am + s an] b[s ldb + lanes of v], M rows and V vectors in registers.
template <int M, int V, typename T>
inline void block(const T* a, int64_t am, int64_t an, const T* b, int64_t ldb, int64_t n, T* sum) {
  using S = Simd<T>;
  typename S::V acc[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) acc[m][v] = typename S::V{};
#pragma GCC unroll 4
  for (int64_t s = 0; s < n; ++s, a += an, b += ldb) {
    typename S::V p[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) p[v] = *reinterpret_cast<const typename S::U*>(b + v * S::lanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const typename S::V x = a[m * am] - typename S::V{};  // a broadcast
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] = mul_add(x, p[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      *reinterpret_cast<typename S::U*>(sum + (m * V + v) * S::lanes) = acc[m][v];
}

// out[m][i] (+)= scale sum[m][i]
template <typename T>
inline void put(const T* sum, int64_t width, int64_t rows, int64_t cols, T scale, bool add, T* out,
                int64_t ldo) {
  for (int64_t m = 0; m < rows; ++m, sum += width, out += ldo) {
    if (add)
      for (int64_t i = 0; i < cols; ++i) out[i] += scale * sum[i];
    else
      for (int64_t i = 0; i < cols; ++i) out[i] = scale * sum[i];
  }
}

template <int V, typename T>
inline void strip(const T* a, int64_t am, int64_t an, const T* b, int64_t ldb, int64_t n,
                  int64_t rows, int64_t cols, T scale, bool add, T* out, int64_t ldo) {
  constexpr int64_t width = V * Simd<T>::lanes;
  T sum[kRows * width];
  block<kRows, V>(a, am, an, b, ldb, n, sum);
  if (rows == kRows && cols >= width)
    put(sum, width, kRows, width, scale, add, out, ldo);
  else
    put(sum, width, rows, cols < width ? cols : width, scale, add, out, ldo);
}

// kRows rows against all columns: the widest blocks of which none is left alone at the end.
template <typename T>
void panel(const T* a, int64_t am, int64_t an, const T* b, int64_t ldb, int64_t n, int64_t rows,
           int64_t cols, T scale, bool add, T* out, int64_t ldo) {
  constexpr int64_t lanes = Simd<T>::lanes;
  for (int64_t i = 0; i < cols;) {
    const int64_t left = (cols - i + lanes - 1) / lanes;
    const int v = left == 4 || left == 2 ? 2 : left < kVectors ? 1 : kVectors;
    if (v == 1)
      strip<1>(a, am, an, b + i, ldb, n, rows, cols - i, scale, add, out + i, ldo);
    else if (v == 2)
      strip<2>(a, am, an, b + i, ldb, n, rows, cols - i, scale, add, out + i, ldo);
    else
      strip<kVectors>(a, am, an, b + i, ldb, n, rows, cols - i, scale, add, out + i, ldo);
    i += v * lanes;
  }
}

}  // namespace
