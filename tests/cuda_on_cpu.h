// Runs simple CUDA kernels on the CPU: a host thread for each thread of a CTA, CTAs one by one. For
// kernels that use threadIdx.x, blockIdx, gridDim, __syncthreads, integer atomicAdd and shuffles of
// whole warps. Each dynamic shared array is to be defined by the includer as a global of the
// kernel's namespace.
#pragma once
#include <atomic>
#include <barrier>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local Dim3 threadIdx, blockIdx;
inline Dim3 gridDim, blockDim;
inline std::unique_ptr<std::barrier<>> cta;

inline void __syncthreads() { cta->arrive_and_wait(); }
inline int32_t atomicAdd(int32_t* p, int32_t v) {
  return std::atomic_ref<int32_t>(*p).fetch_add(v, std::memory_order_relaxed);
}

// What the lanes of a warp exchange, twice: whoever writes the next exchange cannot meet a late
// reader of this one, and one barrier an exchange suffices.
struct Warp {
  std::barrier<> all{32};
  uint64_t lane[2][32];
};
inline std::deque<Warp> warps;
inline thread_local unsigned exchanges = 0;

template <typename T>
T from_lane(T x, int source) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = warps[threadIdx.x / 32];
  uint64_t* lanes = warp.lane[exchanges++ % 2];
  std::memcpy(&lanes[threadIdx.x % 32], &x, sizeof(T));
  warp.all.arrive_and_wait();
  std::memcpy(&x, &lanes[source], sizeof(T));
  return x;
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int bits, int width) {
  const int lane = threadIdx.x % 32;
  return from_lane(x, (lane ^ bits) / width == lane / width ? lane ^ bits : lane);
}
template <typename T>
T __shfl_sync(unsigned, T x, int source, int width) {
  return from_lane(x, static_cast<int>(threadIdx.x % 32) / width * width + source % width);
}

#define __global__ inline
#define __device__
#define __shared__
#define __launch_bounds__(...)

// `poison` spoils shared memory before each CTA; `body` calls the kernel.
template <typename Poison, typename Body>
void launch_on_cpu(Dim3 grid, unsigned threads, Poison poison, Body body) {
  gridDim = grid;
  blockDim = {threads, 1, 1};
  cta = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  warps.resize(threads / 32);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        poison();
        std::vector<std::thread> all;
        for (unsigned t = 0; t < threads; ++t)
          all.emplace_back([=] {
            threadIdx = {t, 0, 0};
            blockIdx = {x, y, z};
            body();
          });
        for (auto& thread : all) thread.join();
      }
}
