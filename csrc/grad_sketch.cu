// Launches of grad_sketch on CUDA. Pure CUDA: the tensors stay in grad_sketch_cuda.cpp.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "grad_sketch.cuh"
#include "grad_sketch_device.cuh"

namespace u2a {
namespace {

int log2_of(int64_t v) {
  int bits = 0;
  while (v >>= 1) ++bits;
  return bits;
}

// Lets the kernel use `bytes` of shared memory; 48 KB need no permission.
cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

cudaError_t shared_limit(size_t* bytes) {
  int device = 0, limit = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  cudaError_t error =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<size_t>(limit);
  return error;
}

template <int LOG2, typename T>
cudaError_t launch(const SketchSizes& s, const T* x, const T* g, const int64_t* offsets,
                   const int32_t* starts, const uint32_t* entries, float* out,
                   cudaStream_t stream) {
  const size_t transform = sizeof(float) * ((1 << LOG2) + (1 << LOG2) / 16);
  const size_t rows = sizeof(T) * (s.d_in + s.d_out);
  size_t limit = 0;
  if (cudaError_t error = shared_limit(&limit)) return error;
  const bool staged = transform + rows <= limit;
  const size_t bytes = transform + (staged ? rows : 0);
  const auto kernel = sketch_kernel<LOG2, T>;
  if (cudaError_t error = allow_shared(reinterpret_cast<const void*>(kernel), bytes)) return error;
  const dim3 grid(static_cast<unsigned>(s.b), static_cast<unsigned>(s.splits()),
                  static_cast<unsigned>(s.slices()));
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.k)));
  kernel<<<grid, (1 << LOG2) / kPerThread, bytes, stream>>>(
      x, g, offsets, static_cast<int>(s.d_in), static_cast<int>(s.d_out),
      static_cast<int>(s.widest()), s.k, staged, scale, starts, entries, out);
  return cudaGetLastError();
}

}  // namespace

// About four CTAs per multiprocessor of a large GPU, at least 16 tokens each.
int64_t SketchSizes::splits() const {
  const int64_t wanted = 528 / std::max<int64_t>(1, b * slices());
  const int64_t useful = n / std::max<int64_t>(1, 16 * b);
  return std::max<int64_t>(1, std::min(wanted, useful));
}

template <typename T>
cudaError_t grad_sketch(const SketchSizes& s, uint64_t seed, const T* x, const T* g,
                        const int64_t* offsets, int32_t* starts, uint32_t* entries, float* partials,
                        float* out, cudaStream_t stream) {
  const int size = static_cast<int>(s.slice());
  sketch_table_kernel<<<dim3(2, static_cast<unsigned>(s.slices())), kTableThreads,
                        sizeof(int32_t) * (size + kTableThreads), stream>>>(
      seed, s.d_in, s.d_out, s.widest(), s.k, size, log2_of(size), starts, entries);
  if (cudaError_t error = cudaGetLastError()) return error;
  const int64_t splits = s.splits();
  float* to = splits == 1 ? out : partials;
  cudaError_t error = cudaErrorInvalidValue;
  switch (size) {
    case 512:
      error = launch<9>(s, x, g, offsets, starts, entries, to, stream);
      break;
    case 1024:
      error = launch<10>(s, x, g, offsets, starts, entries, to, stream);
      break;
    case 2048:
      error = launch<11>(s, x, g, offsets, starts, entries, to, stream);
      break;
    case 4096:
      error = launch<12>(s, x, g, offsets, starts, entries, to, stream);
      break;
    case 8192:
      error = launch<13>(s, x, g, offsets, starts, entries, to, stream);
      break;
  }
  if (error != cudaSuccess || splits == 1) return error;
  sketch_sum_kernel<<<static_cast<unsigned>((s.b * s.k + 255) / 256), 256, 0, stream>>>(
      partials, s.b, splits, s.k, out);
  return cudaGetLastError();
}

#define U2A_INSTANTIATE(T)                                                                 \
  template cudaError_t grad_sketch<T>(const SketchSizes&, uint64_t, const T*, const T*,    \
                                      const int64_t*, int32_t*, uint32_t*, float*, float*, \
                                      cudaStream_t);
U2A_INSTANTIATE(float)
U2A_INSTANTIATE(__half)
U2A_INSTANTIATE(__nv_bfloat16)

}  // namespace u2a
