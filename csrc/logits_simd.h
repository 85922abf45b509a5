// Loops over logits that every loss head's X_simd.cpp includes: one copy an instruction set, so
// nothing here has external linkage.
#pragma once
#include "logits.h"

namespace {

using u2a::LogitMap;
constexpr int kLanes = 64;  // fixed, so that sums do not depend on the instruction set

template <typename T>
T infinity();
template <>
float infinity<float>() {
  return __builtin_inff();
}
template <>
double infinity<double>() {
  return __builtin_inf();
}

// e^x for x <= 88, NaN for NaN; about 1 ulp. x = n ln2 + r; e^r is a polynomial fitted on
// |r| <= ln2 / 2 to 3e-9; n = -127 has the exponent bits of 0, so e^x is 0 from -87.7 down.
inline float exp_of(float x) {
  const float c = -88.f > x ? -88.f : x;
  const float t = c * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = t - 12582912.f;
  const float r = (c - n * 0.693359375f) - n * -2.12194440e-4f;
  const float q =
      (((1.38144672e-3f * r + 8.36878084e-3f) * r + 4.16683927e-2f) * r + 1.66665196e-1f) * r +
      4.9999994e-1f;
  const uint32_t bits = (__builtin_bit_cast(uint32_t, t) + 127u) << 23;
  return ((q * r) * r + r + 1.f) * __builtin_bit_cast(float, bits);
}
inline double exp_of(double x) { return __builtin_exp(x); }

// Odd polynomial fitted to 4e-9 for |x| < 0.625, else (1 - e^-2|x|) / (1 + e^-2|x|).
inline float tanh_of(float x) {
  const float a = __builtin_fabsf(x), u = x * x, e = exp_of(-2.f * a);
  const float q =
      (((-5.71703445e-3f * u + 2.06505787e-2f) * u - 5.37434965e-2f) * u + 1.33314908e-1f) * u -
      3.33332837e-1f;
  const float large = __builtin_copysignf((1.f - e) / (1.f + e), x);
  return a < 0.625f ? x + x * (u * q) : large;
}
inline double tanh_of(double x) { return __builtin_tanh(x); }

// The softcap's derivative 1 - tanh^2 at a logit; 1 without a softcap, whose inverse_cap is 0.
template <typename T>
T slope_of(T z, T inverse_cap) {
  const T t = z * inverse_cap;
  return inverse_cap == 0 ? 1 : 1 - t * t;
}

template <typename T>
void to_logits(T* z, int64_t cols, LogitMap<T> map) {
  if (map.bias)
    for (int64_t j = 0; j < cols; ++j) z[j] += map.bias[j];
  if (map.cap != 0)
    for (int64_t j = 0; j < cols; ++j) z[j] = map.cap * tanh_of(z[j] / map.cap);
  if (map.temperature != 1)
    for (int64_t j = 0; j < cols; ++j) z[j] /= map.temperature;
}

template <typename T>
T max_of(const T* z, int64_t cols, T start) {
  T lane[kLanes];
  for (int j = 0; j < kLanes; ++j) lane[j] = start;
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] = z[i + j] > lane[j] ? z[i + j] : lane[j];
  for (; i < cols; ++i) lane[0] = z[i] > lane[0] ? z[i] : lane[0];
  for (int j = 1; j < kLanes; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return lane[0];
}

// Halves onto halves: the order of a sum is the same everywhere.
template <typename T>
T sum_lanes(T* lane) {
  for (int w = kLanes / 2; w; w /= 2)
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  return lane[0];
}

}  // namespace
