// Rows of two halves on CUDA: kThreads threads own a row, a part of a warp, a warp or a CTA. They
// move W elements at a time (16 bytes; 1 where rows are not aligned), a tile of kPacks times W
// each. Written so that a host compiler can run it too.
#pragma once
#include <cstdint>

namespace u2a {

constexpr int kWarp = 32;

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename T, int W>
struct alignas(W * sizeof(T)) Pack {
  T at[W];
};

template <int kWidth, typename A>
__device__ inline A other_lane(A x, int bits) {
  return __shfl_xor_sync(~0u, x, bits, kWidth);
}
template <int kWidth, typename A>
__device__ inline A first_lane(A x) {
  return __shfl_sync(~0u, x, 0, kWidth);
}

// S{}: of nothing; add(S); each(f): the same state with f of every member.
template <int kWidth, typename S>
__device__ inline S over_lanes(S s) {
#pragma unroll
  for (int bits = kWidth / 2; bits; bits >>= 1)
    s.add(s.each([&](auto x) { return other_lane<kWidth>(x, bits); }));
  return s.each([](auto x) { return first_lane<kWidth>(x); });  // the lanes' orders round apart
}

// The state of all threads of a row, the same bits in each. Every warp adds up the warps' states.
template <int kThreads, typename S>
__device__ inline S over_row(S s) {
  if constexpr (kThreads <= kWarp) {
    return over_lanes<kThreads>(s);
  } else {
    extern __shared__ double row_states[];
    S* of_warp = reinterpret_cast<S*>(row_states);
    const int lane = threadIdx.x % kWarp;
    s = over_lanes<kWarp>(s);
    if (lane == 0) of_warp[threadIdx.x / kWarp] = s;
    __syncthreads();
    return over_lanes<kWarp>(lane < kThreads / kWarp ? of_warp[lane] : S{});
  }
}

template <int kThreads>
__device__ inline int64_t own_row() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
}

template <typename T, int W>
__device__ inline Pack<T, W> load(const T* p) {
  return *reinterpret_cast<const Pack<T, W>*>(p);
}
template <typename T, int W>
__device__ inline void store(T* p, const Pack<T, W>& pack) {
  *reinterpret_cast<Pack<T, W>*>(p) = pack;
}

// Makes the compiler widen packed elements again rather than keep them widened in registers.
template <typename T, int W>
__device__ inline void keep_packed([[maybe_unused]] Pack<T, W>& pack) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(pack) == 16)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(reinterpret_cast<unsigned*>(&pack)[i]));
#endif
}

// f(pack number, first element) for this thread's packs of the tile at `from` of a row of v.
template <int W, int kThreads, int kPacks, typename F>
__device__ inline void for_packs(int64_t from, int64_t v, F f) {
  const int lane = threadIdx.x % kThreads;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t at = from + (k * kThreads + lane) * W;
    if (at < v) f(k, at);
  }
}

// f(first column) for the tiles of a row of v, kHeld: which is one tile.
template <bool kHeld, int kColumns, typename F>
__device__ inline void for_tiles(int64_t v, F f) {
  if constexpr (kHeld) {
    f(0);
  } else {
#pragma unroll 1
    for (int64_t from = 0; from < v; from += kColumns) f(from);
  }
}

}  // namespace u2a
