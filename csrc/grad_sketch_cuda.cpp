// Host binding of grad_sketch on CUDA: checks what would read out of bounds, allocates, launches.
// No torch header meets nvcc; g++ compiles this file beside a CPU-only torch too.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_common.h"
#include "grad_sketch.cuh"

namespace {

using namespace u2a;
constexpr int64_t kMaxWidth = int64_t{1} << 30;  // coordinates share 32 bits with a sign

template <typename T>
cudaError_t run(const SketchSizes& s, int64_t seed, const Tensor& x, const Tensor& g,
                const Tensor& offsets, Tensor& starts, Tensor& entries, Tensor& partials,
                Tensor& out) {
  return grad_sketch<T>(
      s, static_cast<uint64_t>(seed), static_cast<const T*>(x.data_ptr()),
      static_cast<const T*>(g.data_ptr()), offsets.const_data_ptr<int64_t>(),
      starts.mutable_data_ptr<int32_t>(), static_cast<uint32_t*>(entries.data_ptr()),
      partials.mutable_data_ptr<float>(), out.mutable_data_ptr<float>(), current_stream(x));
}

Tensor grad_sketch_cuda(Tensor x, Tensor g, Tensor offsets, int64_t k, int64_t seed) {
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x.scalar_type() == g.scalar_type(),
                  "grad_sketch: x and g must have the same N rows and dtype, got N = ", x.size(0),
                  " and ", g.size(0));
  STD_TORCH_CHECK(k >= 2 && k <= 65536 && (k & (k - 1)) == 0,
                  "grad_sketch: k must be a power of two from 2 to 65536, got ", k);
  STD_TORCH_CHECK(x.size(1) < kMaxWidth && g.size(1) < kMaxWidth,
                  "grad_sketch: d_in and d_out must be below 2^30, got ", x.size(1), " and ",
                  g.size(1));
  STD_TORCH_CHECK(!is_double(x),
                  "grad_sketch: x must be float32, bfloat16 or float16 on CUDA, got float64 (which "
                  "is served on the CPU)");
  torch::stable::accelerator::DeviceGuard guard(x.get_device());
  const SketchSizes s{x.size(0), offsets.size(0) - 1, x.size(1), g.size(1), k};
  Tensor out = new_tensor(x, {s.b, k}, ScalarType::Float);
  if (s.b == 0) return out;
  const Tensor xc = prepared(x, x.scalar_type()), gc = prepared(g, g.scalar_type());
  const Tensor oc = prepared(offsets, ScalarType::Long);
  Tensor starts = new_tensor(x, {sketch_starts(s)}, ScalarType::Int);
  Tensor entries = new_tensor(x, {sketch_entries(s)}, ScalarType::Int);
  Tensor partials = new_tensor(x, {sketch_partials(s)}, ScalarType::Float);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      STD_CUDA_CHECK(run<float>(s, seed, xc, gc, oc, starts, entries, partials, out));
      break;
    case ScalarType::Half:
      STD_CUDA_CHECK(run<__half>(s, seed, xc, gc, oc, starts, entries, partials, out));
      break;
    default:
      STD_CUDA_CHECK(run<__nv_bfloat16>(s, seed, xc, gc, oc, starts, entries, partials, out));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CUDA, m) { m.impl("grad_sketch", TORCH_BOX(&grad_sketch_cuda)); }
