#include "grad_sketch_simd.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace {

using u2a::kLanes;
using u2a::SketchFactor;
using u2a::SketchGroup;
using u2a::SketchTotal;

typedef float Floats __attribute__((vector_size(64), may_alias));
typedef double Doubles __attribute__((vector_size(64), may_alias));
inline Floats* lanes(float* row) { return reinterpret_cast<Floats*>(row); }
inline Doubles* lanes(double* row) { return reinterpret_cast<Doubles*>(row); }
inline const Floats* lanes(const float* row) { return reinterpret_cast<const Floats*>(row); }
inline const Doubles* lanes(const double* row) { return reinterpret_cast<const Doubles*>(row); }

// Rows taken into registers at a time: the stages between them cost no memory traffic.
#ifdef __AVX512F__
constexpr int kRadix = 16;
#else
constexpr int kRadix = 4;
#endif

// sum + value * pattern of +-1: exact products, so that a fused multiply-add changes no bit.
template <typename V, typename T>
__attribute__((always_inline)) inline V add_signed(V sum, T value, V pattern) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_fmadd_ps(_mm512_set1_ps(value), pattern, sum);
#endif
  return sum + value * pattern;
}

// TOKENS tokens, d apart, share the entries' decoding: row r of token t goes to z[r * TOKENS + t].
// COUNT entries a row, or `count` of them where it is 0.
template <int TOKENS, int COUNT, typename V, typename T>
__attribute__((always_inline)) inline const uint32_t* fill(V* z, const int32_t* row, int64_t rows,
                                                           const uint32_t* entry, int64_t count,
                                                           const T* token, int64_t d,
                                                           const V* pattern) {
  for (int64_t r = 0; r < rows; ++r) {
    V sum[TOKENS] = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < (COUNT ? COUNT : count); ++i) {
      const T* value = token + *entry / (2 * kLanes<T>);
      const V signs = pattern[*entry++ % (2 * kLanes<T>)];
      for (int t = 0; t < TOKENS; ++t) sum[t] = add_signed(sum[t], value[t * d], signs);
    }
    for (int t = 0; t < TOKENS; ++t) z[row[r] * TOKENS + t] = sum[t];
  }
  return entry;
}

template <int TOKENS, typename T>
void scatter(const SketchFactor<T>& f, const T* token, const T* patterns) {
  const auto* pattern = lanes(patterns);
  auto* z = lanes(f.work);
  const int32_t* row = f.row;
  const uint32_t* e = f.entry;
  const int64_t d = f.d;
  for (const SketchGroup *group = f.group, *end = group + f.groups; group < end; ++group) {
    const int64_t rows = group->rows, n = group->count;
    switch (n) {
      case 1:
        e = fill<TOKENS, 1>(z, row, rows, e, n, token, d, pattern);
        break;
      case 2:
        e = fill<TOKENS, 2>(z, row, rows, e, n, token, d, pattern);
        break;
      case 3:
        e = fill<TOKENS, 3>(z, row, rows, e, n, token, d, pattern);
        break;
      case 4:
        e = fill<TOKENS, 4>(z, row, rows, e, n, token, d, pattern);
        break;
      default:
        e = fill<TOKENS, 0>(z, row, rows, e, n, token, d, pattern);
    }
    row += rows;
  }
}

// The stages of RADIX rows `stride` apart; put(i, row) takes the results.
template <int RADIX, typename V, typename Put>
__attribute__((always_inline)) inline void butterflies(const V* z, int64_t stride, Put put) {
  V v[RADIX];
#pragma GCC unroll 16
  for (int i = 0; i < RADIX; ++i) v[i] = z[i * stride];
#pragma GCC unroll 4
  for (int h = 1; h < RADIX; h *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < RADIX; ++i) {
      if (i & h) continue;
      const V a = v[i], b = v[i | h];
      v[i] = a + b;
      v[i | h] = a - b;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < RADIX; ++i) put(i, v[i]);
}

template <int RADIX, typename V>
void pass(V* z, int64_t size, int64_t stride) {
  for (int64_t block = 0; block < size; block += RADIX * stride)
    for (V* a = z + block; a < z + block + stride; ++a)
      butterflies<RADIX>(a, stride, [=](int i, V row) { a[i * stride] = row; });
}

// The last stages of both factors, multiplied and added to the rows of the total.
template <int TOKENS, int RADIX, typename V>
void finish(V* x, V* g, int64_t stride, V* total) {
  pass<RADIX>(g, RADIX * stride * TOKENS, stride * TOKENS);
  for (int64_t r = 0; r < stride; ++r)
    for (int t = 0; t < TOKENS; ++t) {
      const int64_t at = r * TOKENS + t;
      butterflies<RADIX>(x + at, stride * TOKENS, [=](int i, V row) {
        total[r + i * stride] += row * g[at + i * stride * TOKENS];
      });
    }
}

template <int TOKENS, int RADIX, typename V>
void finish_any(int64_t radix, V* x, V* g, int64_t stride, V* total) {
  if (radix == RADIX) return finish<TOKENS, RADIX>(x, g, stride, total);
  if constexpr (RADIX > 1) finish_any<TOKENS, RADIX / 2>(radix, x, g, stride, total);
}

template <int TOKENS, typename T>
void some_tokens(const SketchFactor<T>& x, const SketchFactor<T>& g, int64_t t,
                 const SketchTotal<T>& total) {
  auto *zx = lanes(x.work), *zg = lanes(g.work), *sum = lanes(total.sum);
  scatter<TOKENS>(x, x.tokens + t * x.d, total.pattern);
  scatter<TOKENS>(g, g.tokens + t * g.d, total.pattern);
  int64_t stride = 1;
  for (; stride * kRadix < total.rows; stride *= kRadix) {
    pass<kRadix>(zx, total.rows * TOKENS, stride * TOKENS);
    pass<kRadix>(zg, total.rows * TOKENS, stride * TOKENS);
  }
  finish_any<TOKENS, kRadix>(total.rows / stride, zx, zg, stride, sum);
}

template <typename T>
void tokens_of(const SketchFactor<T>& x, const SketchFactor<T>& g, int64_t tokens,
               const SketchTotal<T>& total) {
  auto* sum = lanes(total.sum);
  for (int64_t r = 0; r < total.rows; ++r) sum[r] = *lanes(total.pattern) - *lanes(total.pattern);
  int64_t t = 0;
  if (total.rows <= u2a::kTokenRows)
    for (; t + u2a::kTokens <= tokens; t += u2a::kTokens) some_tokens<u2a::kTokens>(x, g, t, total);
  for (; t < tokens; ++t) some_tokens<1>(x, g, t, total);
}

// The lanes of a row first: their transform is the patterns' sum.
template <typename T>
void transform(T* values, int64_t rows, const T* patterns) {
  auto* z = lanes(values);
  const auto* pattern = lanes(patterns);
  for (int64_t r = 0; r < rows; ++r) {
    auto sum = pattern[0] - pattern[0];
    for (int i = 0; i < kLanes<T>; ++i)
      sum = add_signed(sum, values[r * kLanes<T> + i], pattern[i]);
    z[r] = sum;
  }
  for (int64_t stride = 1; stride < rows; stride *= 2) pass<2>(z, rows, stride);
}

}  // namespace

namespace u2a::U2A_ISA {
void sketch_transform(float* z, int64_t rows, const float* pattern) { transform(z, rows, pattern); }
void sketch_transform(double* z, int64_t rows, const double* pattern) {
  transform(z, rows, pattern);
}
void sketch_tokens(const SketchFactor<float>& x, const SketchFactor<float>& g, int64_t tokens,
                   const SketchTotal<float>& total) {
  tokens_of(x, g, tokens, total);
}
void sketch_tokens(const SketchFactor<double>& x, const SketchFactor<double>& g, int64_t tokens,
                   const SketchTotal<double>& total) {
  tokens_of(x, g, tokens, total);
}
}  // namespace u2a::U2A_ISA
