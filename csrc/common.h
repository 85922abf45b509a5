// What every CPU op shares: stable-ABI headers, scalar types, and a GEMM through the dispatcher.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace u2a {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

// float64 stays; float32, bfloat16 and float16 compute in float32.
inline ScalarType compute_type(const Tensor& t) {
  return is_double(t) ? ScalarType::Double : ScalarType::Float;
}

// Contiguous, in the type the kernels compute in; no copy when it already is.
inline Tensor prepared(const Tensor& t, ScalarType type) {
  Tensor c = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return torch::stable::contiguous(c);
}

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// out = a @ b, a [m, k], b [k, n], any strides.
inline void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  out = torch::stable::detail::to<Tensor>(stack[0]);
}

// out += a @ b. The dispatcher's stack holds no Scalar, hence the shim.
inline void addmm_(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

inline Tensor rows(const Tensor& t, int64_t start, int64_t length) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, start, length);
}

// Offsets [B+1] as int64 on the host; rejects what would read out of bounds.
inline std::vector<int64_t> host_offsets(const char* op, const Tensor& offsets, int64_t n) {
  Tensor o = prepared(offsets, ScalarType::Long);
  const int64_t* p = o.const_data_ptr<int64_t>();
  std::vector<int64_t> v(p, p + o.numel());
  for (size_t i = 0; i < v.size(); ++i) {
    bool ok = v[i] >= 0 && v[i] <= n && (i == 0 || v[i] >= v[i - 1]);
    STD_TORCH_CHECK(ok, op, ": offsets must be non-decreasing within [0, N = ", n, "], got ", v[i],
                    " at position ", i);
  }
  return v;
}

}  // namespace u2a
