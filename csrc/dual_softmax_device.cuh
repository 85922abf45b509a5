// Kernels of dual_softmax: the statistics of a row in one read. A row that is one tile stays in
// registers, kHeld; a longer one is read twice, the second time for the result.
#pragma once
#include <cmath>

#include "rows_device.cuh"

namespace u2a {

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }

// The max of some elements of z, the sums of exp(z - max) and of exp(z - max) z_t.
template <typename A>
struct SoftmaxState {
  static constexpr A kLowest = -INFINITY;
  A top = kLowest, sum = 0, along = 0;

  template <typename F>
  __device__ SoftmaxState each(F f) const {
    return {f(top), f(sum), f(along)};
  }
  __device__ A shift() const { return top == kLowest ? 0 : top; }  // no -inf - -inf
  __device__ void raise(A z) { top = z > top ? z : top; }
  __device__ void take(A z, A z_t, A from) {
    const A e = exp_of(z - from);
    sum += e;
    along += e * z_t;
  }
  __device__ void add(const SoftmaxState& o) {
    const A before = top;
    raise(o.top);
    const A from = shift(), mine = exp_of(before - from), theirs = exp_of(o.top - from);
    sum = sum * mine + o.sum * theirs;
    along = along * mine + o.along * theirs;
  }
};

// Over some elements of p, p_t, g, g_t the sums of p g, of p_t g + p g_t and of p_t.
template <typename A>
struct ProductState {
  A c = 0, both = 0, p_t = 0;

  template <typename F>
  __device__ ProductState each(F f) const {
    return {f(c), f(both), f(p_t)};
  }
  __device__ void add(const ProductState& o) {
    c += o.c;
    both += o.both;
    p_t += o.p_t;
  }
  __device__ A c_t() const { return both - c * p_t; }  // <p_t, g - c> + <p, g_t>
};

template <typename T, int W, int kThreads, int kPacks>
struct SoftmaxTile {
  using A = typename Accumulator<T>::type;
  static constexpr int kColumns = W * kThreads * kPacks;
  Pack<T, W> z[kPacks], z_t[kPacks];

  template <typename F>
  static __device__ void packs(int64_t from, int64_t v, F f) {
    for_packs<W, kThreads, kPacks>(from, v, f);
  }
  __device__ void read(const T* in, int64_t half, int64_t from, int64_t v) {
    packs(from, v, [&](int k, int64_t i) {
      z[k] = load<T, W>(in + i);
      z_t[k] = load<T, W>(in + half + i);
    });
  }
  __device__ void keep() {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) keep_packed(z[k]), keep_packed(z_t[k]);
  }
  __device__ SoftmaxState<A> state(int64_t from, int64_t v) const {
    SoftmaxState<A> s;
    packs(from, v, [&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < W; ++i) s.raise(static_cast<A>(z[k].at[i]));
    });
    const A shift = s.shift();
    packs(from, v, [&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < W; ++i)
        s.take(static_cast<A>(z[k].at[i]), static_cast<A>(z_t[k].at[i]), shift);
    });
    return s;
  }
  __device__ void write(T* out, int64_t half, int64_t from, int64_t v,
                        const SoftmaxState<A>& s) const {
    const A shift = s.shift(), inverse = 1 / s.sum, mean = s.along / s.sum;
    packs(from, v, [&](int k, int64_t at) {
      Pack<T, W> p, p_t;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A here = exp_of(static_cast<A>(z[k].at[i]) - shift) * inverse;
        p.at[i] = static_cast<T>(here);
        p_t.at[i] = static_cast<T>(here * (static_cast<A>(z_t[k].at[i]) - mean));
      }
      store<T, W>(out + at, p);
      store<T, W>(out + half + at, p_t);
    });
  }
};

// The result and the cotangents g of the tangent half, g_t of the primal half. With ggn g is the
// cotangent of the primal half and the other tangents are zero.
template <typename T, int W, int kThreads, int kPacks>
struct SoftmaxBackwardTile {
  using A = typename Accumulator<T>::type;
  static constexpr int kColumns = W * kThreads * kPacks;
  Pack<T, W> p[kPacks], p_t[kPacks], g[kPacks], g_t[kPacks];

  template <typename F>
  static __device__ void packs(int64_t from, int64_t v, F f) {
    for_packs<W, kThreads, kPacks>(from, v, f);
  }
  __device__ void read(const T* grad, const T* out, int64_t half, bool ggn, int64_t from,
                       int64_t v) {
    packs(from, v, [&](int k, int64_t i) {
      p[k] = load<T, W>(out + i);
      g[k] = load<T, W>(grad + (ggn ? 0 : half) + i);
      p_t[k] = ggn ? Pack<T, W>{} : load<T, W>(out + half + i);
      g_t[k] = ggn ? Pack<T, W>{} : load<T, W>(grad + i);
    });
  }
  __device__ void keep() {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      keep_packed(p[k]), keep_packed(p_t[k]), keep_packed(g[k]), keep_packed(g_t[k]);
  }
  __device__ void add_to(ProductState<A>& s, int64_t from, int64_t v) const {
    packs(from, v, [&](int k, int64_t) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A here = static_cast<A>(p[k].at[i]), here_t = static_cast<A>(p_t[k].at[i]);
        const A to = static_cast<A>(g[k].at[i]);
        s.c += here * to;
        s.both += here_t * to + here * static_cast<A>(g_t[k].at[i]);
        s.p_t += here_t;
      }
    });
  }
  __device__ void write(T* dz, int64_t half, bool ggn, int64_t from, int64_t v,
                        const ProductState<A>& s) const {
    const A c_t = s.c_t();
    packs(from, v, [&](int k, int64_t at) {
      Pack<T, W> to, to_t;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A here = static_cast<A>(p[k].at[i]), u = static_cast<A>(g[k].at[i]) - s.c;
        const A along =
            static_cast<A>(p_t[k].at[i]) * u + here * (static_cast<A>(g_t[k].at[i]) - c_t);
        to.at[i] = static_cast<T>(ggn ? here * u : along);
        to_t.at[i] = static_cast<T>(ggn ? 0 : here * u);
      }
      store<T, W>(dz + at, to);
      store<T, W>(dz + half + at, to_t);
    });
  }
};

// Threads of a CTA; CTAs whose registers must fit together, for 16 warps (128 registers a thread)
// or 32 (64 registers).
constexpr int cta_threads(int threads) { return threads < 128 ? 128 : threads; }
constexpr int ctas(int threads, int warps) { return warps * kWarp / cta_threads(threads); }
template <typename T>
constexpr int kForwardWarps = sizeof(T) == 8 ? 16 : 32;

template <typename T, int W, int kThreads, int kPacks, bool kHeld>
__global__ void __launch_bounds__(cta_threads(kThreads), ctas(kThreads, kForwardWarps<T>))
    dual_softmax_kernel(const T* z, T* out, int64_t rows, int64_t v) {
  using Tile = SoftmaxTile<T, W, kThreads, kPacks>;
  const int64_t row = own_row<kThreads>(), half = rows * v, start = row * v;
  if (row >= rows) v = 0;  // its lanes still take part in the exchanges of their warp
  Tile tile;
  SoftmaxState<typename Tile::A> s;
  for_tiles<kHeld, Tile::kColumns>(v, [&](int64_t from) {
    tile.read(z + start, half, from, v);
    s.add(tile.state(from, v));
  });
  s = over_row<kThreads>(s);
  tile.keep();
  for_tiles<kHeld, Tile::kColumns>(v, [&](int64_t from) {
    if constexpr (!kHeld) tile.read(z + start, half, from, v);
    tile.write(out + start, half, from, v, s);
  });
}

template <typename T, int W, int kThreads, int kPacks, bool kHeld>
__global__ void __launch_bounds__(cta_threads(kThreads), ctas(kThreads, 16))
    dual_softmax_bwd_kernel(const T* grad, const T* out, T* dz, int64_t rows, int64_t v, bool ggn) {
  using Tile = SoftmaxBackwardTile<T, W, kThreads, kPacks>;
  const int64_t row = own_row<kThreads>(), half = rows * v, start = row * v;
  if (row >= rows) v = 0;
  Tile tile;
  ProductState<typename Tile::A> s;
  for_tiles<kHeld, Tile::kColumns>(v, [&](int64_t from) {
    tile.read(grad + start, out + start, half, ggn, from, v);
    tile.add_to(s, from, v);
  });
  s = over_row<kThreads>(s);
  tile.keep();
  for_tiles<kHeld, Tile::kColumns>(v, [&](int64_t from) {
    if constexpr (!kHeld) tile.read(grad + start, out + start, half, ggn, from, v);
    tile.write(dz + start, half, ggn, from, v, s);
  });
}

}  // namespace u2a
