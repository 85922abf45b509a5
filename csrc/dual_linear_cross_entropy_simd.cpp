#include "dual_linear_cross_entropy_simd.h"

#include "logits_simd.h"

namespace {

using u2a::DualCotangent;
using u2a::DualState;
constexpr int kBlock = 4 * kLanes;  // columns whose p stays in the first-level cache

// step(i, lane) for every column.
template <typename F>
inline void columns(int n, F step) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) step(i + j, j);
  for (int j = 0; i + j < n; ++j) step(i + j, j);
}

template <typename T>
void tangent_bias(T* z_t, int64_t cols, const T* bias_t) {
  if (bias_t)
    for (int64_t j = 0; j < cols; ++j) z_t[j] += bias_t[j];
}

// Merges the sums of a block (Chan, Golub and LeVeque 1979).
template <typename T>
void merge(DualState<T>& s, T sum, T mean, T square) {
  const T total = s.sum + sum, ratio = total == 0 ? 0 : sum / total, delta = mean - s.mean;
  s.square += square + delta * delta * s.sum * ratio;
  s.mean += delta * ratio;
  s.sum = total;
}

template <bool kKeep, bool kCap, bool kGgn, typename T>
void block(T* z, T* z_t, int n, T top, T inverse_cap, DualState<T>& s) {
  T p[kBlock], sums[kLanes] = {}, means[kLanes] = {}, squares[kLanes] = {};
  columns(n, [&](int i, int lane) {
    const T e = exp_of(z[i] - top);
    const T a_t = kCap ? slope_of(z[i], inverse_cap) * z_t[i] : z_t[i];
    p[i] = e;
    sums[lane] += e;
    means[lane] += e * a_t;
  });
  const T sum = sum_lanes(sums), mean = sum == 0 ? 0 : sum_lanes(means) / sum, shift = s.shift;
  columns(n, [&](int i, int lane) {
    const T slope = kCap ? slope_of(z[i], inverse_cap) : 1;
    const T a_t = kCap ? slope * z_t[i] : z_t[i];
    const T centred = a_t - mean;
    squares[lane] += p[i] * (centred * centred);
    if (!kKeep) return;
    T q = slope * (a_t - shift);
    if (kCap && !kGgn) q -= 2 * inverse_cap * inverse_cap * z[i] * a_t;
    z_t[i] = p[i] * q;
    z[i] = p[i] * slope;
  });
  merge(s, sum, mean, sum_lanes(squares));
}

template <bool kKeep, bool kCap, bool kGgn, typename T>
void row(T* z, T* z_t, int64_t cols, T inverse_cap, DualState<T>& s, T* rescale) {
  const T top = max_of(z, cols, s.max);
  const T shift = top == -infinity<T>() ? 0 : top;  // no -inf - -inf
  const T old = top == s.max ? 1 : exp_of(s.max - shift);
  if (kKeep) {
    rescale[0] = old;
    rescale[1] = 0;
    if (old != 1) {  // the products are touched anyway: centre them anew
      T centre = s.mean;
      if (s.sum == 0) {
        T lane[kLanes] = {};
        const int first = cols < kBlock ? static_cast<int>(cols) : kBlock;
        columns(first, [&](int i, int j) {
          lane[j] += kCap ? slope_of(z[i], inverse_cap) * z_t[i] : z_t[i];
        });
        centre = sum_lanes(lane) / first;
      } else {
        rescale[1] = s.shift - centre;
      }
      s.shift = centre;
    }
  }
  s.sum *= old;
  s.square *= old;
  s.max = top;
  for (int64_t i = 0; i < cols; i += kBlock)
    block<kKeep, kCap, kGgn>(z + i, z_t + i,
                             static_cast<int>(cols - i < kBlock ? cols - i : kBlock), shift,
                             inverse_cap, s);
}

template <typename T>
void forward(T* z, T* z_t, int64_t rows, int64_t cols, LogitMap<T> map, const T* bias_t,
             const int64_t* target, DualState<T>* state, T* rescale, bool ggn) {
  const bool cap = map.cap != 0;
  const T inverse_cap = cap ? 1 / map.cap : 0;
  for (int64_t r = 0; r < rows; ++r, z += cols, z_t += cols) {
    to_logits(z, cols, map);
    tangent_bias(z_t, cols, bias_t);
    DualState<T>& s = state[r];
    if (target[r] >= 0 && target[r] < cols) {
      const T y = z[target[r]];
      s.y = y;
      s.slope = slope_of(y, inverse_cap);
      s.y_t = s.slope * z_t[target[r]];
      s.bend = -2 * inverse_cap * inverse_cap * y * s.y_t;
    }
    T* scales = rescale ? rescale + 2 * r : nullptr;
    if (!rescale)
      cap ? row<false, true, false>(z, z_t, cols, inverse_cap, s, scales)
          : row<false, false, false>(z, z_t, cols, inverse_cap, s, scales);
    else if (!cap)
      row<true, false, false>(z, z_t, cols, inverse_cap, s, scales);
    else
      ggn ? row<true, true, true>(z, z_t, cols, inverse_cap, s, scales)
          : row<true, true, false>(z, z_t, cols, inverse_cap, s, scales);
  }
}

template <bool kGgn, bool kCap, typename T>
void grad_row(T* z, T* z_t, int64_t cols, T inverse_cap, const DualCotangent<T> c) {
  for (int64_t i = 0; i < cols; ++i) {
    const T p = c.scale * exp_of(z[i] - c.max);
    const T slope = kCap ? slope_of(z[i], inverse_cap) : 1;
    const T a_t = kCap ? slope * z_t[i] : z_t[i];
    T q = slope * (a_t - c.mean);
    if (kCap && !kGgn) q -= 2 * inverse_cap * inverse_cap * z[i] * a_t;
    z[i] = p * (kGgn ? c.b * q : c.a * slope + c.b * q);
    if (!kGgn) z_t[i] = c.b * (p * slope);
  }
}

template <typename T>
void backward(T* z, T* z_t, int64_t rows, int64_t cols, LogitMap<T> map, const T* bias_t,
              const int64_t* target, const DualCotangent<T>* row, bool ggn) {
  const bool cap = map.cap != 0;
  const T inverse_cap = cap ? 1 / map.cap : 0;
  for (int64_t r = 0; r < rows; ++r, z += cols, z_t += cols) {
    to_logits(z, cols, map);
    tangent_bias(z_t, cols, bias_t);
    const DualCotangent<T> c = row[r];
    const bool here = !ggn && target[r] >= 0 && target[r] < cols;
    const T y = here ? z[target[r]] : 0, slope = slope_of(y, inverse_cap);
    const T bend = here ? -2 * inverse_cap * inverse_cap * y * slope * z_t[target[r]] : 0;
    if (ggn)
      cap ? grad_row<true, true>(z, z_t, cols, inverse_cap, c)
          : grad_row<true, false>(z, z_t, cols, inverse_cap, c);
    else
      cap ? grad_row<false, true>(z, z_t, cols, inverse_cap, c)
          : grad_row<false, false>(z, z_t, cols, inverse_cap, c);
    if (!here) continue;
    z[target[r]] -= c.a * slope + c.b * bend;
    z_t[target[r]] -= c.b * slope;
  }
}

template <typename T>
void rescale_rows(T* first, T* second, int64_t rows, int64_t d, const T* rescale) {
  for (int64_t r = 0; r < rows; ++r, first += d, second += d) {
    const T scale = rescale[2 * r], by = rescale[2 * r + 1];
    if (scale == 1) continue;
    for (int64_t i = 0; i < d; ++i) {
      second[i] = scale * (second[i] + by * first[i]);
      first[i] *= scale;
    }
  }
}

}  // namespace

namespace u2a::U2A_ISA {
void dual_tile(float* z, float* z_t, int64_t rows, int64_t cols, LogitMap<float> map,
               const float* bias_t, const int64_t* target, DualState<float>* state, float* rescale,
               bool ggn) {
  forward(z, z_t, rows, cols, map, bias_t, target, state, rescale, ggn);
}
void dual_tile(double* z, double* z_t, int64_t rows, int64_t cols, LogitMap<double> map,
               const double* bias_t, const int64_t* target, DualState<double>* state,
               double* rescale, bool ggn) {
  forward(z, z_t, rows, cols, map, bias_t, target, state, rescale, ggn);
}
void dual_grad_tile(float* z, float* z_t, int64_t rows, int64_t cols, LogitMap<float> map,
                    const float* bias_t, const int64_t* target, const DualCotangent<float>* row,
                    bool ggn) {
  backward(z, z_t, rows, cols, map, bias_t, target, row, ggn);
}
void dual_grad_tile(double* z, double* z_t, int64_t rows, int64_t cols, LogitMap<double> map,
                    const double* bias_t, const int64_t* target, const DualCotangent<double>* row,
                    bool ggn) {
  backward(z, z_t, rows, cols, map, bias_t, target, row, ggn);
}
void dual_rescale(float* first, float* second, int64_t rows, int64_t d, const float* rescale) {
  rescale_rows(first, second, rows, d, rescale);
}
void dual_rescale(double* first, double* second, int64_t rows, int64_t d, const double* rescale) {
  rescale_rows(first, second, rows, d, rescale);
}
}  // namespace u2a::U2A_ISA
