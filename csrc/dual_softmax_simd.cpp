#include "dual_softmax_simd.h"

#include "scalar_math.h"

namespace {

using u2a::Compute;
constexpr int kLanes = 32;
constexpr int64_t kBlock = 1024;

// Max so far, and sums of exp(z - max) and exp(z - max) z_t.
template <typename T>
struct Running {
  T top = -__builtin_inf(), sum = 0, along = 0;

  T shift() const { return top == -__builtin_inf() ? 0 : top; }  // no -inf - -inf

  void raise(const T* z, int64_t n) {
    T lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = top;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int j = 0; j < kLanes; ++j) lane[j] = z[i + j] > lane[j] ? z[i + j] : lane[j];
    for (; i < n; ++i) lane[0] = z[i] > lane[0] ? z[i] : lane[0];
    for (int j = 0; j < kLanes; ++j) top = lane[j] > top ? lane[j] : top;
  }

  void extend(const T* z, const T* z_t, int64_t n) {
    const T before = top;
    raise(z, n);
    const T from = shift(), rescale = exp_of(before - from);
    T lane[kLanes] = {}, lane_t[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int j = 0; j < kLanes; ++j) {
        const T e = exp_of(z[i + j] - from);
        lane[j] += e;
        lane_t[j] += e * z_t[i + j];
      }
    for (int j = 0; i + j < n; ++j) {
      const T e = exp_of(z[i + j] - from);
      lane[j] += e;
      lane_t[j] += e * z_t[i + j];
    }
    for (int w = kLanes / 2; w; w /= 2)
      for (int j = 0; j < w; ++j) {
        lane[j] += lane[j + w];
        lane_t[j] += lane_t[j + w];
      }
    sum = sum * rescale + lane[0];
    along = along * rescale + lane_t[0];
  }
};

// Results may take the place of inputs, element by element.
template <typename T>
void forward(const T* z, const T* z_t, T* p, T* p_t, int64_t v) {
  Running<T> r;
  for (int64_t i = 0; i < v; i += kBlock) r.extend(z + i, z_t + i, v - i < kBlock ? v - i : kBlock);
  const T from = r.shift(), inverse = 1 / r.sum, mean = r.along / r.sum;
#pragma GCC ivdep
  for (int64_t i = 0; i < v; ++i) {
    const T here = exp_of(z[i] - from) * inverse;
    p_t[i] = here * (z_t[i] - mean);
    p[i] = here;
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t v) {
  typename Lanes<T>::Vector sum{}, x, y;
  sweep<T>(v, [&](int64_t i, int64_t n) {
    load(x, a + i, n);
    load(y, b + i, n);
    sum += x * y;
  });
  return sum_of(sum);
}

template <typename T>
void backward(const T* g_t, const T* g, const T* p, const T* p_t, T* dz, T* dz_t, int64_t v) {
  const T c = dot(p, g, v);
  typename Lanes<T>::Vector sum{}, x, x_t, y, y_t;
  sweep<T>(v, [&](int64_t i, int64_t n) {
    load(x, p + i, n);
    load(x_t, p_t + i, n);
    load(y, g + i, n, c);
    load(y_t, g_t + i, n);
    sum += x_t * y + x * y_t;
  });
  const T c_t = sum_of(sum);
#pragma GCC ivdep
  for (int64_t i = 0; i < v; ++i) {
    const T u = g[i] - c, here = p[i];
    dz[i] = p_t[i] * u + here * (g_t[i] - c_t);
    dz_t[i] = here * u;
  }
}

// The plain softmax backward of the primal half.
template <typename T>
void backward_ggn(const T* g_t, const T* p, T* dz, T* dz_t, int64_t v) {
  const T c = dot(p, g_t, v);
#pragma GCC ivdep
  for (int64_t i = 0; i < v; ++i) {
    dz[i] = p[i] * (g_t[i] - c);
    dz_t[i] = 0;
  }
}

template <typename S>
void rows(const S* z, S* out, int64_t n, int64_t v, int64_t half, Compute<S>* scratch) {
  using T = Compute<S>;
  T* scratch_t = scratch + scratch_row(v);
  for (int64_t r = 0; r < n; ++r, z += v, out += v) {
    const T *a = wide_row(z, v, scratch), *a_t = wide_row(z + half, v, scratch_t);
    T *p = result_row(out, scratch), *p_t = result_row(out + half, scratch_t);
    forward(a, a_t, p, p_t, v);
    finish_row(out, p, v);
    finish_row(out + half, p_t, v);
  }
}

template <typename S>
void rows_bwd(const S* grad, const S* out, S* dz, int64_t n, int64_t v, int64_t half, bool ggn,
              Compute<S>* scratch) {
  using T = Compute<S>;
  const int64_t stride = scratch_row(v);
  for (int64_t r = 0; r < n; ++r, grad += v, out += v, dz += v) {
    const T* g_t = wide_row(grad, v, scratch);
    const T* p = wide_row(out, v, scratch + stride);
    T *to = result_row(dz, scratch), *to_t = result_row(dz + half, scratch + stride);
    if (ggn) {
      backward_ggn(g_t, p, to, to_t, v);
    } else {
      const T* g = wide_row(grad + half, v, scratch + 2 * stride);
      const T* p_t = wide_row(out + half, v, scratch + 3 * stride);
      backward(g_t, g, p, p_t, to, to_t, v);
    }
    finish_row(dz, to, v);
    finish_row(dz + half, to_t, v);
  }
}

}  // namespace

#define U2A_DEFINE_SOFTMAX(S)                                                                      \
  void softmax_rows(const S* z, S* out, int64_t n, int64_t v, int64_t half, Compute<S>* scratch) { \
    rows(z, out, n, v, half, scratch);                                                             \
  }                                                                                                \
  void softmax_rows_bwd(const S* g, const S* out, S* dz, int64_t n, int64_t v, int64_t half,       \
                        bool ggn, Compute<S>* scratch) {                                           \
    rows_bwd(g, out, dz, n, v, half, ggn, scratch);                                                \
  }

namespace u2a::U2A_ISA {
U2A_DEFINE_SOFTMAX(float)
U2A_DEFINE_SOFTMAX(double)
U2A_DEFINE_SOFTMAX(BFloat16)
U2A_DEFINE_SOFTMAX(Float16)
}  // namespace u2a::U2A_ISA
