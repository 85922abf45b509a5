// grad_dot on the CPU: row chunks of y = x V^T by GEMM, then one pass that dots y with g and sums
// the rows of each example. Peak memory is one chunk, not [N, d_out]. bf16/fp16 compute in float32.
#include "common.h"
#include "grad_dot_simd.h"

namespace {

using namespace u2a;
constexpr int64_t kChunkElements = 1 << 19;

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, const Tensor& v,
           ScalarType type) {
  const int64_t n = x.size(0), d_out = g.size(1), d_in = x.size(1), q = v.size(0);
  const std::vector<int64_t> seg = host_offsets("grad_dot", offsets, n);
  const int64_t b = static_cast<int64_t>(seg.size()) - 1;
  Tensor out = new_tensor(x, {b, q}, type);
  torch::stable::zero_(out);
  if (n == 0 || q == 0 || d_out == 0 || d_in == 0) return out;
  Tensor token = new_tensor(x, {n}, type);
  const int64_t chunk = std::max<int64_t>(1, std::min(n, kChunkElements / d_out));
  Tensor y = new_tensor(x, {chunk, d_out}, type);
  for (int64_t k = 0; k < q; ++k) {
    Tensor v_k = transposed(prepared(torch::stable::select(v, 0, k), type));
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t m = std::min(chunk, n - start);
      Tensor g_m = prepared(rows(g, start, m), type), y_m = rows(y, 0, m);
      mm_out(y_m, prepared(rows(x, start, m), type), v_k);
      const T *py = y_m.const_data_ptr<T>(), *pg = g_m.const_data_ptr<T>();
      T* pt = token.mutable_data_ptr<T>() + start;
      torch::stable::parallel_for(0, m, 16, [&](int64_t lo, int64_t hi) {
        U2A_SIMD(row_dot(py + lo * d_out, pg + lo * d_out, hi - lo, d_out, pt + lo));
      });
    }
    const T* pt = token.const_data_ptr<T>();
    T* po = out.mutable_data_ptr<T>();
    for (int64_t e = 0; e < b; ++e) {
      double sum = 0;
      for (int64_t t = seg[e]; t < seg[e + 1]; ++t) sum += pt[t];
      po[e * q + k] = static_cast<T>(sum);
    }
  }
  return out;
}

Tensor grad_dot(Tensor x, Tensor g, Tensor offsets, Tensor v) {
  STD_TORCH_CHECK(x.size(0) == g.size(0) && v.size(1) == g.size(1) && v.size(2) == x.size(1),
                  "grad_dot: x [N, d_in], g [N, d_out] and v [Q, d_out, d_in] disagree");
  const ScalarType type = compute_type(x);
  return is_double(x) ? run<double>(x, g, offsets, v, type) : run<float>(x, g, offsets, v, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_dot", TORCH_BOX(&grad_dot)); }
