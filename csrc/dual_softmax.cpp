// dual_softmax on the CPU: threads take rows; max, sum and mean of z_t in one read of z and z_t.
#include <memory>

#include "common.h"
#include "dual_softmax_simd.h"
#include "row_types.h"

namespace {

using namespace u2a;
constexpr int64_t kGrainElements = 1 << 14;

// call(first row, rows, scratch) by threads, over the primal rows of t.
template <typename S, typename F>
void for_rows(const Tensor& t, int64_t scratch_rows, F call) {
  const int64_t v = t.size(t.dim() - 1);
  if (t.numel() == 0) return;
  torch::stable::parallel_for(
      0, t.numel() / 2 / v, std::max<int64_t>(1, kGrainElements / v), [&](int64_t lo, int64_t hi) {
        using T = Compute<S>;
        std::unique_ptr<T[]> scratch(new T[sizeof(S) == 2 ? scratch_rows * scratch_row(v) : 0]);
        call(lo, hi - lo, scratch.get());
      });
}

Tensor dual_softmax(Tensor z, [[maybe_unused]] std::string mode) {
  STD_TORCH_CHECK(z.dim() >= 2 && z.size(0) % 2 == 0, "dual_softmax: z must be [2B, ..., V]");
  Tensor in = prepared(z, z.scalar_type()), out = torch::stable::empty_like(in);
  const int64_t v = z.size(z.dim() - 1), half = z.numel() / 2;
  by_row_type(z, [&](auto s) {
    using S = decltype(s);
    const S* p = static_cast<const S*>(in.data_ptr());
    S* po = static_cast<S*>(out.data_ptr());
    for_rows<S>(in, 2, [&](int64_t row, int64_t n, Compute<S>* scratch) {
      U2A_SIMD(softmax_rows(p + row * v, po + row * v, n, v, half, scratch));
    });
    return 0;
  });
  return out;
}

Tensor dual_softmax_bwd(Tensor grad, Tensor out, bool ggn) {
  STD_TORCH_CHECK(grad.numel() == out.numel() && grad.scalar_type() == out.scalar_type(),
                  "dual_softmax: grad must have the shape and dtype of the output");
  Tensor g = prepared(grad, grad.scalar_type()), p = prepared(out, out.scalar_type());
  Tensor dz = torch::stable::empty_like(p);
  const int64_t v = out.size(out.dim() - 1), half = out.numel() / 2;
  by_row_type(out, [&](auto s) {
    using S = decltype(s);
    const S *pg = static_cast<const S*>(g.data_ptr()), *pp = static_cast<const S*>(p.data_ptr());
    S* pz = static_cast<S*>(dz.data_ptr());
    for_rows<S>(p, 4, [&](int64_t row, int64_t n, Compute<S>* scratch) {
      const int64_t at = row * v;
      U2A_SIMD(softmax_rows_bwd(pg + at, pp + at, pz + at, n, v, half, ggn, scratch));
    });
    return 0;
  });
  return dz;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("dual_softmax", TORCH_BOX(&dual_softmax));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd));
}
