#include "linear_logp_simd.h"

namespace {

using u2a::LogitMap;
using u2a::RowState;
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

// Sum of exp(z - shift); with kGrad z becomes exp(z - shift) times the softcap's derivative.
template <bool kGrad, bool kCap, typename T>
T exp_sum(T* z, int64_t cols, T shift, T inverse_cap) {
  T lane[kLanes] = {};
  auto step = [=](T* p, T* sum) {
    const T e = exp_of(*p - shift);
    *sum += e;
    if (kGrad) *p = kCap ? e * slope_of(*p, inverse_cap) : e;
  };
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes)
    for (int j = 0; j < kLanes; ++j) step(z + i + j, lane + j);
  for (int j = 0; i + j < cols; ++j) step(z + i + j, lane + j);
  for (int w = kLanes / 2; w; w /= 2)
    for (int j = 0; j < w; ++j) lane[j] += lane[j + w];
  return lane[0];
}

template <typename T>
void forward(T* z, int64_t rows, int64_t cols, LogitMap<T> map, const int64_t* target,
             RowState<T>* state, T* rescale) {
  const T inverse_cap = map.cap == 0 ? 0 : map.temperature / map.cap;
  for (int64_t r = 0; r < rows; ++r, z += cols) {
    RowState<T>& s = state[r];
    to_logits(z, cols, map);
    if (target[r] >= 0 && target[r] < cols) {
      s.y = z[target[r]];
      s.slope = slope_of(s.y, inverse_cap);
    }
    const T top = max_of(z, cols, s.max);
    const T shift = top == -infinity<T>() ? 0 : top;  // no -inf - -inf
    const T old = top == s.max ? 1 : exp_of(s.max - shift);
    T sum;
    if (!rescale)
      sum = exp_sum<false, false>(z, cols, shift, inverse_cap);
    else if (map.cap == 0)
      sum = exp_sum<true, false>(z, cols, shift, inverse_cap);
    else
      sum = exp_sum<true, true>(z, cols, shift, inverse_cap);
    if (rescale) rescale[r] = old;
    s.sum = s.sum * old + sum;
    s.max = top;
  }
}

template <bool kCap, typename T>
void grad_row(T* z, int64_t cols, T lse, T scale, T inverse_cap) {
  for (int64_t j = 0; j < cols; ++j) {
    const T e = scale * exp_of(z[j] - lse);
    z[j] = kCap ? e * slope_of(z[j], inverse_cap) : e;
  }
}

template <typename T>
void backward(T* z, int64_t rows, int64_t cols, LogitMap<T> map, const int64_t* target,
              const T* lse, const T* grad) {
  const T inverse_cap = map.cap == 0 ? 0 : map.temperature / map.cap;
  for (int64_t r = 0; r < rows; ++r, z += cols) {
    to_logits(z, cols, map);
    const bool here = target[r] >= 0 && target[r] < cols;
    const T slope = here ? slope_of(z[target[r]], inverse_cap) : 0;
    const T scale = -grad[r] / map.temperature;
    if (map.cap == 0)
      grad_row<false>(z, cols, lse[r], scale, inverse_cap);
    else
      grad_row<true>(z, cols, lse[r], scale, inverse_cap);
    if (here) z[target[r]] -= scale * slope;
  }
}

template <typename T>
void scale_all(T* acc, int64_t rows, int64_t d, const T* scale) {
  for (int64_t r = 0; r < rows; ++r, acc += d)
    if (scale[r] != 1)
      for (int64_t i = 0; i < d; ++i) acc[i] *= scale[r];
}

}  // namespace

namespace u2a::U2A_ISA {
void logp_tile(float* z, int64_t rows, int64_t cols, LogitMap<float> map, const int64_t* target,
               RowState<float>* state, float* rescale) {
  forward(z, rows, cols, map, target, state, rescale);
}
void logp_tile(double* z, int64_t rows, int64_t cols, LogitMap<double> map, const int64_t* target,
               RowState<double>* state, double* rescale) {
  forward(z, rows, cols, map, target, state, rescale);
}
void grad_tile(float* z, int64_t rows, int64_t cols, LogitMap<float> map, const int64_t* target,
               const float* lse, const float* grad) {
  backward(z, rows, cols, map, target, lse, grad);
}
void grad_tile(double* z, int64_t rows, int64_t cols, LogitMap<double> map, const int64_t* target,
               const double* lse, const double* grad) {
  backward(z, rows, cols, map, target, lse, grad);
}
void scale_rows(float* acc, int64_t rows, int64_t d, const float* scale) {
  scale_all(acc, rows, d, scale);
}
void scale_rows(double* acc, int64_t rows, int64_t d, const double* scale) {
  scale_all(acc, rows, d, scale);
}
}  // namespace u2a::U2A_ISA
