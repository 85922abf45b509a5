// Kernels of grad_sketch. A table kernel sorts the coordinates by bucket once per call, so that the
// scatter becomes a gather in a fixed order: no float atomics, the same bits every time. A CTA then
// takes tokens one by one: rows to shared memory, buckets, Walsh-Hadamard through registers and
// shared memory, multiply, accumulate in registers. Written so that a host compiler can run it too.
#pragma once
#include <cstdint>

#include "sketch_hash.h"

namespace u2a {

constexpr int kTableThreads = 256;
constexpr int kPerThread = 16;  // features of a slice held by one thread
constexpr uint32_t kSignBit = 0x80000000u;

__device__ inline uint32_t parity(uint32_t v) {
  v ^= v >> 16;
  v ^= v >> 8;
  v ^= v >> 4;
  v ^= v >> 2;
  v ^= v >> 1;
  return v & 1;
}

// Grid (2 streams, slices). starts [slices, 2, size + 1]; entries [slices, 2, widest] hold, bucket
// by bucket in rising order, a coordinate and in bit 31 its sign in this slice.
__global__ void __launch_bounds__(kTableThreads)
    sketch_table_kernel(uint64_t seed, int64_t d_in, int64_t d_out, int64_t widest, int64_t k,
                        int size, int size_log2, int32_t* starts, uint32_t* entries) {
  extern __shared__ int32_t count[];  // [size], then [kTableThreads]
  int32_t* sums = count + size;
  const int tid = threadIdx.x, mine = size / kTableThreads;
  const uint32_t stream = blockIdx.x, slice = blockIdx.y;
  const int d = static_cast<int>(stream == kInputs ? d_in : d_out);
  const int64_t table = slice * 2 + stream;
  starts += table * (size + 1);
  entries += table * widest;
  for (int j = tid; j < size; j += kTableThreads) count[j] = 0;
  __syncthreads();
  for (int c = tid; c < d; c += kTableThreads)
    atomicAdd(&count[sketch_hash(seed, stream, c) & (k - 1) & (size - 1)], 1);
  __syncthreads();
  int32_t sum = 0;
  for (int j = tid * mine; j < (tid + 1) * mine; ++j) sum += count[j];
  sums[tid] = sum;
  __syncthreads();
  int32_t position = 0;
  for (int t = 0; t < tid; ++t) position += sums[t];
  for (int j = tid * mine; j < (tid + 1) * mine; ++j) {
    const int32_t here = count[j];
    starts[j] = count[j] = position;
    position += here;
  }
  if (tid == kTableThreads - 1) starts[size] = position;
  __syncthreads();
  for (int c = tid; c < d; c += kTableThreads) {
    const uint32_t word = sketch_hash(seed, stream, c), bucket = word & (k - 1);
    const uint32_t sign = (word ^ (parity(bucket >> size_log2 & slice) << 31)) & kSignBit;
    entries[atomicAdd(&count[bucket & (size - 1)], 1)] = static_cast<uint32_t>(c) | sign;
  }
  __syncthreads();
  for (int j = tid; j < size; j += kTableThreads) {
    for (int i = starts[j] + 1; i < starts[j + 1]; ++i) {
      const uint32_t entry = entries[i];
      int at = i;
      for (; at > starts[j] && (entries[at - 1] & ~kSignBit) > (entry & ~kSignBit); --at)
        entries[at] = entries[at - 1];
      entries[at] = entry;
    }
  }
}

// Butterflies over bits [FROM, TO) of the register index.
template <int FROM, int TO>
__device__ inline void butterflies(float (&v)[kPerThread]) {
#pragma unroll
  for (int bit = FROM; bit < TO; ++bit) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (e >> bit & 1) continue;
      const float a = v[e], b = v[e | 1 << bit];
      v[e] = a + b;
      v[e | 1 << bit] = a - b;
    }
  }
}

// Index whose bits [LOW, LOW + 4) are the register index e, the others the thread's.
template <int LOW>
__device__ inline int window(int tid, int e) {
  return (tid >> LOW) << (LOW + 4) | e << LOW | (tid & ((1 << LOW) - 1));
}

// One unused word after every 16 keeps the strided accesses of a window free of bank conflicts.
__device__ inline int padded(int i) { return i + (i >> 4); }

// The thread's and the register's share of the address apart: the latter is a constant.
template <int LOW>
__device__ inline void put(float* buffer, int tid, const float (&v)[kPerThread]) {
  float* p = buffer + padded(window<LOW>(tid, 0));
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) p[padded(window<LOW>(0, e))] = v[e];
  __syncthreads();
}

template <int LOW>
__device__ inline void get(const float* buffer, int tid, float (&v)[kPerThread]) {
  const float* p = buffer + padded(window<LOW>(tid, 0));
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) v[e] = p[padded(window<LOW>(0, e))];
}

// v <- H C row for the 2^LOG2 features of a slice; thread tid ends with those of window<LOG2 - 8>.
template <int LOG2, typename T>
__device__ inline void sketch_row(const T* row, const int32_t* starts, const uint32_t* entries,
                                  float* buffer, int tid, float (&v)[kPerThread]) {
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int j = window<LOG2 - 4>(tid, e);
    float sum = 0;
#pragma unroll 1
    for (int i = starts[j], end = starts[j + 1]; i < end; ++i) {
      const uint32_t entry = entries[i];
      const float value = static_cast<float>(row[entry & ~kSignBit]);
      sum += entry & kSignBit ? -value : value;
    }
    v[e] = sum;
  }
  butterflies<0, 4>(v);
  __syncthreads();
  put<LOG2 - 4>(buffer, tid, v);
  get<0>(buffer, tid, v);
  butterflies<0, 4>(v);
  put<0>(buffer, tid, v);
  constexpr int kDone = LOG2 > 12 ? 8 : 4;
  if constexpr (LOG2 > 12) {
    get<4>(buffer, tid, v);
    butterflies<0, 4>(v);
    put<4>(buffer, tid, v);
  }
  get<LOG2 - 8>(buffer, tid, v);
  butterflies<kDone - (LOG2 - 8), 4>(v);
}

// Grid (b, splits, slices); 2^LOG2 / 16 threads. Rows pass through shared memory when `staged`.
template <int LOG2, typename T>
__global__ void __launch_bounds__((1 << LOG2) / kPerThread, 1)
    sketch_kernel(const T* x, const T* g, const int64_t* offsets, int d_in, int d_out, int widest,
                  int64_t k, bool staged, float scale, const int32_t* starts,
                  const uint32_t* entries, float* out) {
  constexpr int kSize = 1 << LOG2, kThreads = kSize / kPerThread;
  extern __shared__ float buffer[];  // [padded(kSize)], then the two rows
  T* x_row = reinterpret_cast<T*>(buffer + padded(kSize));
  T* g_row = x_row + d_in;
  const int tid = threadIdx.x;
  const int64_t b = blockIdx.x, split = blockIdx.y, slice = blockIdx.z;
  const int32_t* from = starts + slice * 2 * (kSize + 1);
  const uint32_t* list = entries + slice * 2 * widest;
  const int64_t first = offsets[b], length = offsets[b + 1] - first;
  const int64_t begin = first + length * split / gridDim.y;
  const int64_t end = first + length * (split + 1) / gridDim.y;
  float total[kPerThread] = {};
  for (int64_t t = begin; t < end; ++t) {
    const T *x_t = x + t * d_in, *g_t = g + t * d_out;
    if (staged) {
      for (int i = tid; i < d_in; i += kThreads) x_row[i] = x_t[i];
      for (int i = tid; i < d_out; i += kThreads) g_row[i] = g_t[i];
      __syncthreads();
      x_t = x_row;
      g_t = g_row;
    }
    float zx[kPerThread], zg[kPerThread];
    sketch_row<LOG2>(x_t, from + (kSize + 1), list + widest, buffer, tid, zx);
    sketch_row<LOG2>(g_t, from, list, buffer, tid, zg);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) total[e] += zx[e] * zg[e];
  }
  out += (b * gridDim.y + split) * k + slice * kSize;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int j = window<LOG2 - 8>(tid, e);
    if (j < k) out[j] = total[e] * scale;
  }
}

// out[b, j] = sum of partials[b, :, j] in order.
__global__ void sketch_sum_kernel(const float* partials, int64_t b, int64_t splits, int64_t k,
                                  float* out) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (at >= b * k) return;
  const float* p = partials + at / k * splits * k + at % k;
  float sum = 0;
  for (int64_t s = 0; s < splits; ++s) sum += p[s * k];
  out[at] = sum;
}

}  // namespace u2a
