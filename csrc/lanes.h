// Row code of the X_simd.cpp files: 64-byte vectors whatever the instruction set, so that sums do
// not depend on it, and rows of 16-bit floats. Anonymous namespace, see isa.h.
#pragma once
#include <cstdint>

namespace u2a {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename S>
using Compute = typename ComputeType<S>::type;

}  // namespace u2a

namespace {

// Rows of scratch lie so that no two of them start at the same place of a page.
constexpr int64_t scratch_row(int64_t d) { return d + 80; }

template <typename T>
struct Lanes {
  static constexpr int64_t kCount = 64 / sizeof(T);
  typedef T Vector __attribute__((vector_size(64)));
  typedef T Loose __attribute__((vector_size(64), aligned(sizeof(T)), may_alias));
};

// f(i, n) for every vector of a row of d: lanes [i, i + n), n below kCount at the end only.
template <typename T, typename F>
inline void sweep(int64_t d, F f) {
  int64_t i = 0;
  for (; i + Lanes<T>::kCount <= d; i += Lanes<T>::kCount) f(i, Lanes<T>::kCount);
  if (i < d) f(i, d - i);
}

// v = p[0, n) less `shift`; the other lanes are zero.
template <typename T>
inline void load(typename Lanes<T>::Vector& v, const T* p, int64_t n, T shift = 0) {
  if (n == Lanes<T>::kCount) {
    v = *reinterpret_cast<const typename Lanes<T>::Loose*>(p) - shift;
    return;
  }
  v = typename Lanes<T>::Vector{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i] - shift;
}

inline float sum_of(Lanes<float>::Vector& v) {
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  return v[0] + v[1];
}
inline double sum_of(Lanes<double>::Vector& v) {
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}

inline float widened(u2a::BFloat16 h) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(h.bits) << 16);
}
inline u2a::BFloat16 narrowed(float x, u2a::BFloat16) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t r = x != x ? 0x7fc00000u : u + 0x7fffu + (u >> 16 & 1u);
  return {static_cast<uint16_t>(r >> 16)};
}

// Exponents move by 112; a subnormal is a normal float less 2^-14.
inline float widened(u2a::Float16 h) {
  const uint32_t magnitude = h.bits & 0x7fffu, sign = (h.bits & 0x8000u) << 16;
  const uint32_t u = (magnitude << 13) + (112u << 23) + (magnitude >= 0x7c00u ? 112u << 23 : 0u);
  const float small =
      __builtin_bit_cast(float, u + (1u << 23)) - __builtin_bit_cast(float, 113u << 23);
  const uint32_t bits = magnitude < 0x400u ? __builtin_bit_cast(uint32_t, small) : u;
  return __builtin_bit_cast(float, bits | sign);
}
// Below 2^-14 the addition of 0.5 rounds to a multiple of 2^-24; from 65520 on all is infinite.
inline u2a::Float16 narrowed(float x, u2a::Float16) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x), a = u & 0x7fffffffu;
  const uint32_t small =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, a) + 0.5f) - (126u << 23);
  const uint32_t normal = (a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13;
  const uint32_t finite = a < (113u << 23) ? small : normal;
  const uint32_t large = a > (255u << 23) ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>((a < (143u << 23) ? finite : large) | (u >> 16 & 0x8000u))};
}

// A row in the type it is computed in: itself, or widened into scratch.
template <typename S>
inline const u2a::Compute<S>* wide_row(const S* row, int64_t d, u2a::Compute<S>* scratch) {
  if constexpr (sizeof(S) > 2) {
    return row;
  } else {
    for (int64_t i = 0; i < d; ++i) scratch[i] = widened(row[i]);
    return scratch;
  }
}

// Where a row's results go, and their rounding into the row where that was scratch.
template <typename S>
inline u2a::Compute<S>* result_row(S* row, u2a::Compute<S>* scratch) {
  if constexpr (sizeof(S) > 2)
    return row;
  else
    return scratch;
}
template <typename S>
inline void finish_row(S* row, const u2a::Compute<S>* scratch, int64_t d) {
  if constexpr (sizeof(S) == 2)
    for (int64_t i = 0; i < d; ++i) row[i] = narrowed(scratch[i], S{});
}

}  // namespace
