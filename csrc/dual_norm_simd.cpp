#include "dual_norm_simd.h"

namespace {

using u2a::Compute;
using u2a::Norm;

// Means of x and its tangent (0 unless centred), the inverse deviation s and its tangent.
template <typename T>
struct Stats {
  T mean, mean_t, s, s_t;
  void set(T square, T product, T eps) {
    s = 1 / (sizeof(T) == 4 ? __builtin_sqrtf(square + eps) : __builtin_sqrt(square + eps));
    s_t = -(s * s * s) * product;
  }
};

template <bool kCentred, typename T>
void forward(const T* x, const T* x_t, T* __restrict__ y, T* __restrict__ y_t, const Norm<T>& p) {
  using Vector = typename Lanes<T>::Vector;
  Stats<T> r{};
  Vector sum{}, sum_t{};
  if (kCentred) {
    sweep<T>(p.d, [&](int64_t i, int64_t n) {
      Vector v, v_t;
      load(v, x + i, n);
      load(v_t, x_t + i, n);
      sum += v;
      sum_t += v_t;
    });
    r.mean = sum_of(sum) / p.d;
    r.mean_t = sum_of(sum_t) / p.d;
    sum = sum_t = Vector{};
  }
  sweep<T>(p.d, [&](int64_t i, int64_t n) {
    Vector v, v_t;
    load(v, x + i, n, r.mean);
    load(v_t, x_t + i, n, r.mean_t);
    sum += v * v;
    sum_t += v * v_t;
  });
  r.set(sum_of(sum) / p.d, sum_of(sum_t) / p.d, p.eps);
  for (int64_t i = 0; i < p.d; ++i) {
    const T c = x[i] - r.mean, n = c * r.s, n_t = (x_t[i] - r.mean_t) * r.s + c * r.s_t;
    const T out = n * p.w[i], out_t = n_t * p.w[i] + n * p.w_t[i];
    y[i] = kCentred ? out + p.b[i] : out;
    y_t[i] = kCentred ? out_t + p.b_t[i] : out_t;
  }
}

// a = g w and a_t = g_t w + g w_t are the cotangents of the normalised halves.
template <typename T>
struct Cotangents {
  const T *g, *g_t;
  const Norm<T>& p;
  void at(int64_t i, int64_t n, typename Lanes<T>::Vector& a,
          typename Lanes<T>::Vector& a_t) const {
    typename Lanes<T>::Vector w, w_t, v, v_t;
    load(w, p.w + i, n);
    load(w_t, p.w_t + i, n);
    load(v, g + i, n);
    load(v_t, g_t + i, n);
    a = v * w;
    a_t = v_t * w + v * w_t;
  }
};

template <bool kCentred, bool kWeight, typename T>
void backward(const T* g_t, const T* g, const T* x, const T* x_t, T* __restrict__ dx,
              T* __restrict__ dx_t, const Norm<T>& p, T* __restrict__ dw) {
  using Vector = typename Lanes<T>::Vector;
  const Cotangents<T> cotangents{g, g_t, p};
  Stats<T> r{};
  T c1 = 0, c1_t = 0;
  Vector sum{}, sum_t{}, sum_a{}, sum_a_t{};
  if (kCentred) {
    sweep<T>(p.d, [&](int64_t i, int64_t n) {
      Vector v, v_t, a, a_t;
      load(v, x + i, n);
      load(v_t, x_t + i, n);
      cotangents.at(i, n, a, a_t);
      sum += v;
      sum_t += v_t;
      sum_a += a;
      sum_a_t += a_t;
    });
    r.mean = sum_of(sum) / p.d;
    r.mean_t = sum_of(sum_t) / p.d;
    c1 = sum_of(sum_a) / p.d;
    c1_t = sum_of(sum_a_t) / p.d;
    sum = sum_t = sum_a = sum_a_t = Vector{};
  }
  sweep<T>(p.d, [&](int64_t i, int64_t n) {
    Vector v, v_t, a, a_t;
    load(v, x + i, n, r.mean);
    load(v_t, x_t + i, n, r.mean_t);
    cotangents.at(i, n, a, a_t);
    sum += v * v;
    sum_t += v * v_t;
    sum_a += v * a;
    sum_a_t += v_t * a + v * a_t;
  });
  r.set(sum_of(sum) / p.d, sum_of(sum_t) / p.d, p.eps);
  const T product = sum_of(sum_a) / p.d, c2 = r.s * product;
  const T c2_t = r.s * (sum_of(sum_a_t) / p.d) + r.s_t * product;
  for (int64_t i = 0; i < p.d; ++i) {
    const T c = x[i] - r.mean, n = c * r.s, n_t = (x_t[i] - r.mean_t) * r.s + c * r.s_t;
    const T a = g[i] * p.w[i], a_t = g_t[i] * p.w[i] + g[i] * p.w_t[i];
    const T u = a - c1 - n * c2, u_t = a_t - c1_t - n_t * c2 - n * c2_t;
    dx[i] = r.s_t * u + r.s * u_t;
    dx_t[i] = r.s * u;
    if (kWeight) dw[i] += g_t[i] * n + g[i] * n_t;
  }
}

template <typename S>
void rows(const S* x, S* y, int64_t n, const Norm<Compute<S>>& p, Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t d = p.d, stride = scratch_row(d);
  for (int64_t r = 0; r < n; ++r, x += d, y += d) {
    const T* in = wide_row(x, d, scratch);
    const T* in_t = wide_row(x + p.half, d, scratch + stride);
    T* out = result_row(y, scratch + 2 * stride);
    T* out_t = result_row(y + p.half, scratch + 3 * stride);
    if (p.centred)
      forward<true>(in, in_t, out, out_t, p);
    else
      forward<false>(in, in_t, out, out_t, p);
    finish_row(y, out, d);
    finish_row(y + p.half, out_t, d);
  }
}

template <typename S>
void rows_bwd(const S* g, const S* x, S* dx, int64_t n, const Norm<Compute<S>>& p, Compute<S>* dw,
              Compute<S>* db, Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t d = p.d, stride = scratch_row(d);
  const auto row = p.centred ? dw ? backward<true, true, T> : backward<true, false, T>
                   : dw      ? backward<false, true, T>
                             : backward<false, false, T>;
  for (int64_t r = 0; r < n; ++r, g += d, x += d, dx += d) {
    const T* in = wide_row(x, d, scratch);
    const T* in_t = wide_row(x + p.half, d, scratch + stride);
    const T* grad_t = wide_row(g, d, scratch + 2 * stride);
    const T* grad = wide_row(g + p.half, d, scratch + 3 * stride);
    T* out = result_row(dx, scratch + 4 * stride);
    T* out_t = result_row(dx + p.half, scratch + 5 * stride);
    row(grad_t, grad, in, in_t, out, out_t, p, dw);
    finish_row(dx, out, d);
    finish_row(dx + p.half, out_t, d);
    if (db)
      for (int64_t i = 0; i < d; ++i) db[i] += grad_t[i];
  }
}

}  // namespace

#define U2A_DEFINE_NORM(S)                                                                      \
  void norm_rows(const S* x, S* y, int64_t n, const Norm<Compute<S>>& p, Compute<S>* scratch) { \
    rows(x, y, n, p, scratch);                                                                  \
  }                                                                                             \
  void norm_rows_bwd(const S* g, const S* x, S* dx, int64_t n, const Norm<Compute<S>>& p,       \
                     Compute<S>* dw, Compute<S>* db, Compute<S>* scratch) {                     \
    rows_bwd(g, x, dx, n, p, dw, db, scratch);                                                  \
  }

namespace u2a::U2A_ISA {
U2A_DEFINE_NORM(float)
U2A_DEFINE_NORM(double)
U2A_DEFINE_NORM(BFloat16)
U2A_DEFINE_NORM(Float16)
}  // namespace u2a::U2A_ISA
