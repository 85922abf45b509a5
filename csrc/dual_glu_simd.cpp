#include "dual_glu_simd.h"

#include "scalar_math.h"

namespace {

using u2a::Activation;
using u2a::Compute;
using u2a::DualPiece;
constexpr int64_t kBlock = 256;  // columns staged at a time, in the first-level cache

// f, f' and f'' at a point.
template <typename T>
struct Curve {
  T f, f1, f2;
};

// All is 0 or 1 beyond, and no infinity meets a zero; NaN stays.
U2A_INLINE float clamped(float x) { return x > 16.f ? 16.f : x < -16.f ? -16.f : x; }
U2A_INLINE double clamped(double x) { return x > 40. ? 40. : x < -40. ? -40. : x; }

// a times the sigmoid of k a.
template <typename T>
U2A_INLINE Curve<T> swish(T a, T k) {
  const T ka = k * a;
  const auto s = sigmoids_of(ka);
  const T slope = k * s.here * s.rest;
  return {a * s.here, s.here + a * slope, slope * (2 + ka * (s.rest - s.here))};
}

template <typename T>
U2A_INLINE Curve<T> gelu(T a) {
  const T c = clamped(a);
  const auto n = normal_of(c);
  return {a * n.below, n.below + c * n.density, n.density * (2 - c * c)};
}

// 0.5 (1 + tanh u) is the sigmoid of 2 u.
template <typename T>
U2A_INLINE Curve<T> gelu_tanh(T a) {
  constexpr T k = 1.5957691216057308, cube = 0.044715;
  const T c = clamped(a), square = c * c;
  const T u1 = k + 3 * k * cube * square, u2 = 6 * k * cube * c;
  const auto s = sigmoids_of(k * (c + cube * c * square));
  const T slope = s.here * s.rest;
  return {a * s.here, s.here + c * slope * u1,
          slope * (2 * u1 + c * (u2 + (s.rest - s.here) * u1 * u1))};
}

template <typename T>
U2A_INLINE Curve<T> tanh_curve(T a) {
  const auto s = sigmoids_of(2 * a);
  const T f = tanh_of(a), slope = 4 * s.here * s.rest;
  return {f, slope, -2 * f * slope};
}

template <Activation kF, typename T>
U2A_INLINE Curve<T> curve(T a) {
  if constexpr (kF == Activation::silu) return swish<T>(a, 1);
  if constexpr (kF == Activation::gelu) return gelu(a);
  if constexpr (kF == Activation::gelu_tanh) return gelu_tanh(a);
  if constexpr (kF == Activation::tanh) return tanh_curve(a);
  if constexpr (kF == Activation::quick_gelu) return swish<T>(a, 1.702);
  if constexpr (kF == Activation::sigmoid) {
    const auto s = sigmoids_of(a);
    const T slope = s.here * s.rest;
    return {s.here, slope, slope * (s.rest - s.here)};
  }
  const T positive = a <= 0 ? 0 : a, step = a <= 0 ? 0 : 1;  // a NaN stays
  if constexpr (kF == Activation::relu) return {positive, step, 0};
  if constexpr (kF == Activation::relu2) return {positive * positive, 2 * positive, 2 * step};
  return {a, 1, 0};
}

// Staged blocks: primal, then tangent. Outputs overlap no input.
template <typename T>
struct In {
  const T *p, *t;
};
template <typename T>
struct Out {
  T *p, *t;
};

template <Activation kF, bool kGated, typename T>
void forward(In<T> a, In<T> b, Out<T> y, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Curve<T> c = curve<kF>(a.p[i]);
    const T tangent = c.f1 * a.t[i];
    y.p[i] = kGated ? c.f * b.p[i] : c.f;
    y.t[i] = kGated ? tangent * b.p[i] + c.f * b.t[i] : tangent;
  }
}

// g.p is the cotangent of the primal half, which is g_t; g.t is g.
template <Activation kF, bool kGated, typename T>
void backward(In<T> g, In<T> a, In<T> b, Out<T> da, Out<T> db, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const Curve<T> c = curve<kF>(a.p[i]);
    const T g_t = g.p[i], gi = g.t[i], at = a.t[i];
    if (kGated) {
      const T bp = b.p[i];
      da.p[i] = (g_t * bp + gi * b.t[i]) * c.f1 + gi * bp * at * c.f2;
      da.t[i] = gi * bp * c.f1;
      db.p[i] = g_t * c.f + gi * at * c.f1;
      db.t[i] = gi * c.f;
    } else {
      da.p[i] = g_t * c.f1 + gi * at * c.f2;
      da.t[i] = gi * c.f1;
    }
  }
}

U2A_INLINE float wide(float x) { return x; }
U2A_INLINE double wide(double x) { return x; }
U2A_INLINE float wide(u2a::BFloat16 x) { return widened(x); }
U2A_INLINE float wide(u2a::Float16 x) { return widened(x); }
U2A_INLINE void put(float x, float* to) { *to = x; }
U2A_INLINE void put(double x, double* to) { *to = x; }
template <typename S>
U2A_INLINE void put(float x, S* to) {
  *to = narrowed(x, S{});
}

// Columns [i, i + n) in the type that is computed in: in place, or in `buffer` of 2 kBlock.
template <typename S, typename T = Compute<S>>
In<T> taken(DualPiece<const S> x, int64_t i, int64_t n, T* buffer) {
  if constexpr (sizeof(S) == sizeof(T))
    if (x.step == 1) return {x.primal + i, x.tangent + i};
  const S *p = x.primal + i * x.step, *t = x.tangent + i * x.step;
  if (x.step == 0) {
    for (int64_t j = 0; j < n; ++j) buffer[j] = wide(*p);
    for (int64_t j = 0; j < n; ++j) buffer[kBlock + j] = wide(*t);
  } else {
    for (int64_t j = 0; j < n; ++j) buffer[j] = wide(p[j]);
    for (int64_t j = 0; j < n; ++j) buffer[kBlock + j] = wide(t[j]);
  }
  return {buffer, buffer + kBlock};
}

template <typename S, typename T = Compute<S>>
Out<T> place(DualPiece<S> x, int64_t i, T* buffer) {
  if constexpr (sizeof(S) == sizeof(T)) return {x.primal + i, x.tangent + i};
  return {buffer, buffer + kBlock};
}

template <typename S, typename T>
void given(Out<T> from, DualPiece<S> x, int64_t i, int64_t n) {
  if constexpr (sizeof(S) == sizeof(T)) return;
  for (int64_t j = 0; j < n; ++j) put(from.p[j], x.primal + i + j);
  for (int64_t j = 0; j < n; ++j) put(from.t[j], x.tangent + i + j);
}

// use(Tag<f>{})
template <Activation kF>
struct Tag {
  static constexpr Activation f = kF;
};
template <typename F>
void by_activation(Activation f, F use) {
  switch (f) {
    case Activation::silu:
      return use(Tag<Activation::silu>{});
    case Activation::gelu:
      return use(Tag<Activation::gelu>{});
    case Activation::gelu_tanh:
      return use(Tag<Activation::gelu_tanh>{});
    case Activation::quick_gelu:
      return use(Tag<Activation::quick_gelu>{});
    case Activation::relu:
      return use(Tag<Activation::relu>{});
    case Activation::relu2:
      return use(Tag<Activation::relu2>{});
    case Activation::sigmoid:
      return use(Tag<Activation::sigmoid>{});
    case Activation::tanh:
      return use(Tag<Activation::tanh>{});
    case Activation::identity:
      return use(Tag<Activation::identity>{});
  }
}

template <typename T>
void forward_block(Activation f, bool gated, In<T> a, In<T> b, Out<T> y, int64_t n) {
  by_activation(f, [&](auto tag) {
    constexpr Activation kF = decltype(tag)::f;
    gated ? forward<kF, true>(a, b, y, n) : forward<kF, false>(a, b, y, n);
  });
}

template <typename T>
void backward_block(Activation f, bool gated, In<T> g, In<T> a, In<T> b, Out<T> da, Out<T> db,
                    int64_t n) {
  by_activation(f, [&](auto tag) {
    constexpr Activation kF = decltype(tag)::f;
    gated ? backward<kF, true>(g, a, b, da, db, n) : backward<kF, false>(g, a, b, da, db, n);
  });
}

template <typename S, typename T = Compute<S>>
void run_forward(Activation f, DualPiece<const S> a, DualPiece<const S> b, DualPiece<S> y,
                 int64_t columns) {
  alignas(64) T buffer[6 * kBlock];
  const bool gated = b.primal != nullptr;
  for (int64_t i = 0; i < columns; i += kBlock) {
    const int64_t n = columns - i < kBlock ? columns - i : kBlock;
    const In<T> va = taken(a, i, n, buffer);
    const In<T> vb = gated ? taken(b, i, n, buffer + 2 * kBlock) : In<T>{};
    const Out<T> vy = place(y, i, buffer + 4 * kBlock);
    forward_block(f, gated, va, vb, vy, n);
    given(vy, y, i, n);
  }
}

template <typename S, typename T = Compute<S>>
void run_backward(Activation f, DualPiece<const S> g, DualPiece<const S> a, DualPiece<const S> b,
                  DualPiece<S> da, DualPiece<S> db, int64_t columns) {
  alignas(64) T buffer[10 * kBlock];
  const bool gated = b.primal != nullptr;
  for (int64_t i = 0; i < columns; i += kBlock) {
    const int64_t n = columns - i < kBlock ? columns - i : kBlock;
    const In<T> vg = taken(g, i, n, buffer), va = taken(a, i, n, buffer + 2 * kBlock);
    const In<T> vb = gated ? taken(b, i, n, buffer + 4 * kBlock) : In<T>{};
    const Out<T> oa = place(da, i, buffer + 6 * kBlock);
    const Out<T> ob = gated ? place(db, i, buffer + 8 * kBlock) : Out<T>{};
    backward_block(f, gated, vg, va, vb, oa, ob, n);
    given(oa, da, i, n);
    if (gated) given(ob, db, i, n);
  }
}

}  // namespace

#define U2A_DEFINE_GLU(S)                                                                    \
  void glu_forward(Activation f, DualPiece<const S> a, DualPiece<const S> b, DualPiece<S> y, \
                   int64_t n) {                                                              \
    run_forward<S>(f, a, b, y, n);                                                           \
  }                                                                                          \
  void glu_backward(Activation f, DualPiece<const S> g, DualPiece<const S> a,                \
                    DualPiece<const S> b, DualPiece<S> da, DualPiece<S> db, int64_t n) {     \
    run_backward<S>(f, g, a, b, da, db, n);                                                  \
  }

namespace u2a::U2A_ISA {
U2A_DEFINE_GLU(float)
U2A_DEFINE_GLU(double)
U2A_DEFINE_GLU(BFloat16)
U2A_DEFINE_GLU(Float16)
}  // namespace u2a::U2A_ISA
