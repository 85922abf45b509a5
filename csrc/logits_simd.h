// Loops over logits that every loss head's X_simd.cpp includes: one copy an instruction set, so
// nothing here has external linkage.
#pragma once
#include "logits.h"
#include "scalar_math.h"

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
