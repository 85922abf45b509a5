// dual_rms_norm and dual_layer_norm on the CPU: threads take rows, a row stays in cache. Gradients
// of weight and bias are summed in row blocks that depend on the number of rows only.
#include <memory>
#include <optional>
#include <tuple>

#include "common.h"
#include "dual_norm_simd.h"
#include "row_types.h"

namespace {

using namespace u2a;
using OptTensor = std::optional<Tensor>;
constexpr int64_t kGrainElements = 1 << 14, kChunks = 64, kBlockRows = 32;

// Weight, bias and directions in the type of computation; zeros for what is absent.
template <typename T>
struct Parameters {
  std::vector<Tensor> held;
  Tensor zeros;
  Norm<T> norm;

  Parameters(const char* op, const Tensor& x, const Tensor& w, const OptTensor& b,
             const OptTensor& w_t, const OptTensor& b_t, double eps, bool centred) {
    STD_TORCH_CHECK(x.dim() >= 2 && x.size(0) % 2 == 0, op, ": x must be [2B, ..., d]");
    const int64_t d = x.size(x.dim() - 1);
    zeros = torch::stable::new_zeros(w, {d}, compute_type(x));
    norm = {vector(op, w, d), vector(op, w_t, d),  vector(op, b, d), vector(op, b_t, d), d,
            x.numel() / 2,    static_cast<T>(eps), centred};
  }

  const T* vector(const char* op, const OptTensor& t, int64_t d) {
    if (!t) return zeros.const_data_ptr<T>();
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == d, op, ": weight and bias must be [d = ", d,
                    "]");
    held.push_back(prepared(*t, zeros.scalar_type()));
    return held.back().const_data_ptr<T>();
  }

  int64_t rows() const { return norm.d == 0 ? 0 : norm.half / norm.d; }
};

template <typename S>
Tensor forward(const Tensor& x, const Parameters<Compute<S>>& p) {
  using T = Compute<S>;
  Tensor in = prepared(x, x.scalar_type());
  Tensor y = torch::stable::empty_like(in);
  const S* px = static_cast<const S*>(in.data_ptr());
  S* py = static_cast<S*>(y.data_ptr());
  const int64_t d = p.norm.d,
                grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, d));
  torch::stable::parallel_for(0, p.rows(), grain, [&](int64_t lo, int64_t hi) {
    std::unique_ptr<T[]> scratch(new T[sizeof(S) == 2 ? kNormForwardScratch * scratch_row(d) : 0]);
    U2A_SIMD(norm_rows(px + lo * d, py + lo * d, hi - lo, p.norm, scratch.get()));
  });
  return y;
}

// Sums over rows, one per chunk, in double; added up in order.
struct Partials {
  int64_t d;
  std::vector<double> sums;
  Partials(bool wanted, int64_t chunks, int64_t width) : d(width), sums(wanted * chunks * width) {}

  template <typename T>
  void add(int64_t chunk, T* block) {
    if (sums.empty()) return;
    double* to = sums.data() + chunk * d;
    for (int64_t i = 0; i < d; ++i) to[i] += static_cast<double>(block[i]);
    std::fill(block, block + d, T(0));
  }

  Tensor total(const Tensor& like) const {
    if (sums.empty()) return new_tensor(like, {0}, like.scalar_type());
    Tensor out = new_tensor(like, {d}, ScalarType::Double);
    double* to = out.mutable_data_ptr<double>();
    std::copy(sums.begin(), sums.begin() + d, to);
    for (size_t at = d; at < sums.size(); at += d)
      for (int64_t i = 0; i < d; ++i) to[i] += sums[at + i];
    return prepared(out, like.scalar_type());
  }
};

template <typename S>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                            const Parameters<Compute<S>>& p, bool weight_grad,
                                            bool bias_grad) {
  using T = Compute<S>;
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "dual norm: grad must have the shape and dtype of x");
  const Tensor g = prepared(grad, x.scalar_type()), in = prepared(x, x.scalar_type());
  Tensor dx = torch::stable::empty_like(in);
  const S *pg = static_cast<const S*>(g.data_ptr()), *px = static_cast<const S*>(in.data_ptr());
  S* pdx = static_cast<S*>(dx.data_ptr());
  const int64_t d = p.norm.d, rows = p.rows();
  const int64_t chunks = std::max<int64_t>(1, std::min(kChunks, rows / kBlockRows));
  Partials dw(weight_grad, chunks, d), db(bias_grad, chunks, d);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t lo, int64_t hi) {
    std::vector<T> block_w(weight_grad * d), block_b(bias_grad * d);
    std::unique_ptr<T[]> scratch(new T[sizeof(S) == 2 ? kNormBackwardScratch * scratch_row(d) : 0]);
    for (int64_t c = lo; c < hi; ++c) {
      const int64_t end = rows * (c + 1) / chunks;
      for (int64_t r = rows * c / chunks; r < end; r += kBlockRows) {
        const int64_t n = std::min(kBlockRows, end - r), at = r * d;
        U2A_SIMD(norm_rows_bwd(pg + at, px + at, pdx + at, n, p.norm,
                               weight_grad ? block_w.data() : nullptr,
                               bias_grad ? block_b.data() : nullptr, scratch.get()));
        dw.add(c, block_w.data());
        db.add(c, block_b.data());
      }
    }
  });
  return {dx, dw.total(w), db.total(w)};
}

Tensor dual_norm(const char* op, const Tensor& x, const Tensor& w, const OptTensor& b,
                 const OptTensor& w_t, const OptTensor& b_t, double eps, bool centred) {
  return by_row_type(x, [&](auto s) {
    using S = decltype(s);
    return forward<S>(x, Parameters<Compute<S>>(op, x, w, b, w_t, b_t, eps, centred));
  });
}

std::tuple<Tensor, Tensor, Tensor> dual_norm_bwd(const char* op, const Tensor& grad,
                                                 const Tensor& x, const Tensor& w,
                                                 const OptTensor& w_t, double eps, bool centred,
                                                 bool weight_grad, bool bias_grad) {
  return by_row_type(x, [&](auto s) {
    using S = decltype(s);
    const Parameters<Compute<S>> p(op, x, w, std::nullopt, w_t, std::nullopt, eps, centred);
    return backward<S>(grad, x, w, p, weight_grad, bias_grad);
  });
}

Tensor dual_rms_norm(Tensor x, Tensor w, OptTensor w_t, double eps) {
  return dual_norm("dual_rms_norm", x, w, std::nullopt, w_t, std::nullopt, eps, false);
}

std::tuple<Tensor, Tensor> dual_rms_norm_bwd(Tensor grad, Tensor x, Tensor w, OptTensor w_t,
                                             double eps, bool weight_grad) {
  auto [dx, dw, _] =
      dual_norm_bwd("dual_rms_norm", grad, x, w, w_t, eps, false, weight_grad, false);
  return {dx, dw};
}

Tensor dual_layer_norm(Tensor x, Tensor w, OptTensor b, OptTensor w_t, OptTensor b_t, double eps) {
  return dual_norm("dual_layer_norm", x, w, b, w_t, b_t, eps, true);
}

std::tuple<Tensor, Tensor, Tensor> dual_layer_norm_bwd(Tensor grad, Tensor x, Tensor w,
                                                       OptTensor w_t, double eps, bool weight_grad,
                                                       bool bias_grad) {
  return dual_norm_bwd("dual_layer_norm", grad, x, w, w_t, eps, true, weight_grad, bias_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("dual_rms_norm", TORCH_BOX(&dual_rms_norm));
  m.impl("dual_rms_norm_bwd", TORCH_BOX(&dual_rms_norm_bwd));
  m.impl("dual_layer_norm", TORCH_BOX(&dual_layer_norm));
  m.impl("dual_layer_norm_bwd", TORCH_BOX(&dual_layer_norm_bwd));
}
