// Host binding of dual_softmax on CUDA: checks what would read out of bounds, allocates, launches.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_common.h"
#include "dual_softmax.cuh"

namespace {

using namespace u2a;

template <typename F>
cudaError_t by_type(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(__half{});
    default:
      return f(__nv_bfloat16{});
  }
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

Tensor dual_softmax_cuda(Tensor z, [[maybe_unused]] std::string mode) {
  STD_TORCH_CHECK(z.dim() >= 2 && z.size(0) % 2 == 0, "dual_softmax: z must be [2B, ..., V]");
  torch::stable::accelerator::DeviceGuard guard(z.get_device());
  const Tensor in = prepared(z, z.scalar_type());
  Tensor out = torch::stable::empty_like(in);
  if (z.numel() == 0) return out;
  const int64_t v = z.size(z.dim() - 1), rows = z.numel() / 2 / v;
  STD_CUDA_CHECK(by_type(z, [&](auto s) {
    using T = decltype(s);
    return dual_softmax<T>(data<T>(in), static_cast<T*>(out.data_ptr()), rows, v,
                           current_stream(z));
  }));
  return out;
}

Tensor dual_softmax_bwd_cuda(Tensor grad, Tensor out, bool ggn) {
  STD_TORCH_CHECK(grad.numel() == out.numel() && grad.scalar_type() == out.scalar_type(),
                  "dual_softmax: grad must have the shape and dtype of the output");
  torch::stable::accelerator::DeviceGuard guard(out.get_device());
  const Tensor g = prepared(grad, grad.scalar_type()), p = prepared(out, out.scalar_type());
  Tensor dz = torch::stable::empty_like(p);
  if (out.numel() == 0) return dz;
  const int64_t v = out.size(out.dim() - 1), rows = out.numel() / 2 / v;
  STD_CUDA_CHECK(by_type(out, [&](auto s) {
    using T = decltype(s);
    return dual_softmax_bwd<T>(data<T>(g), data<T>(p), static_cast<T*>(dz.data_ptr()), rows, v, ggn,
                               current_stream(out));
  }));
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CUDA, m) {
  m.impl("dual_softmax", TORCH_BOX(&dual_softmax_cuda));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd_cuda));
}
