#include "linear_logp_simd.h"

#include "logits_simd.h"

namespace {

using u2a::RowState;
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
  return sum_lanes(lane);
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
