// grad_gram on the CPU. By tokens: strips of x x2^T and g g2^T by GEMM, multiplied and summed over
// both segments. By gradients: blocks of all G_b and G'_b' in bounded scratch, multiplied by GEMM.
// Where the second set is the first, blocks are formed once and only the lower triangle is made.
#include "grad_gram_simd.h"
#include "gradient_block.h"

namespace {

using namespace u2a;
constexpr int64_t kStrip = 256, kStripCols = 1024, kFormed = 1 << 21, kRows = 64;

template <typename T>
struct Gram {
  const Tokens<T>& a;
  const Tokens<T>& b;
  bool same;
  T* out;  // [a.examples(), b.examples()], zero

  int64_t columns(int64_t rows) const { return same ? rows : b.examples(); }

  // Examples first..last of a, in strips of their tokens, against the tokens of b.
  void by_tokens(int64_t first, int64_t last, T* p, double* line) const {
    T* q = p + kStrip * kStripCols;
    const std::vector<int64_t>&sa = a.seg, &sb = b.seg;
    const int64_t n_b = sb[columns(last)];
    for (int64_t t = sa[first]; t < sa[last]; t += kStrip) {
      const int64_t m = std::min(kStrip, sa[last] - t);
      for (int64_t s = 0; s < n_b; s += kStripCols) {
        const int64_t n = std::min(kStripCols, n_b - s);
        gemm<T>({p, m, n, n}, a.inputs(t, m), b.inputs(s, n).transposed());
        gemm<T>({q, m, n, n}, a.outputs(t, m), b.outputs(s, n).transposed());
        const int64_t from = std::upper_bound(sb.begin(), sb.end(), s) - sb.begin() - 1;
        const int64_t to = std::lower_bound(sb.begin(), sb.end(), s + n) - sb.begin();
        for (int64_t e = first; e < last; ++e) {
          const int64_t lo = std::max(sa[e], t) - t, hi = std::min(sa[e + 1], t + m) - t;
          if (hi <= lo) continue;
          U2A_SIMD(segment_products(p + lo * n, q + lo * n, hi - lo, n, line, sb.data(), s, from,
                                    to, out + e * b.examples()));
        }
      }
    }
  }

  void all_by_tokens() const {
    std::vector<int64_t> group{0};  // about a strip of tokens each
    for (int64_t e = 0; e < a.examples(); ++e)
      if (a.seg[e + 1] - a.seg[group.back()] >= kStrip || e + 1 == a.examples())
        group.push_back(e + 1);
    torch::stable::parallel_for(0, group.size() - 1, 1, [&](int64_t lo, int64_t hi) {
      const std::unique_ptr<T[]> work = scratch<T>(2 * kStrip * kStripCols);
      const std::unique_ptr<double[]> line = scratch<double>(kStripCols);
      for (int64_t k = lo; k < hi; ++k) by_tokens(group[k], group[k + 1], work.get(), line.get());
    });
  }

  void all_by_gradients() const {
    const int64_t na = a.examples(), nb = b.examples(), held = same ? na : na + nb;
    const int64_t elements = std::max<int64_t>(1, kFormed / held);
    const std::unique_ptr<T[]> work = scratch<T>(held * std::max<int64_t>(16, elements));
    for_each_block(a.d_out, a.d_in, elements, [&](const Block& k) {
      T *pa = work.get(), *pb = same ? pa : pa + na * k.size();
      form_block(a, k, pa);
      if (!same) form_block(b, k, pb);
      for (int64_t r = 0; r < na; r += kRows) {
        const int64_t m = std::min(kRows, na - r), n = columns(r + m);
        const Matrix<const T> left(pa + r * k.size(), m, k.size(), k.size());
        const Matrix<const T> right(pb, n, k.size(), k.size());
        gemm_add<T>({out + r * nb, m, n, nb}, left, right.transposed());
      }
    });
  }
};

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, const Tensor& x2,
           const Tensor& g2, const Tensor& offsets2, bool same, bool by_tokens, ScalarType type) {
  const std::vector<int64_t> seg = host_offsets("grad_gram", offsets, x.size(0));
  const std::vector<int64_t> seg2 = host_offsets("grad_gram", offsets2, x2.size(0));
  const int64_t d_in = x.size(1), d_out = g.size(1);
  Tensor xc = prepared(x, type), gc = prepared(g, type);
  Tensor xc2 = same ? xc : prepared(x2, type), gc2 = same ? gc : prepared(g2, type);
  const Tokens<T> a{xc.const_data_ptr<T>(), gc.const_data_ptr<T>(), d_in, d_out, seg};
  const Tokens<T> b{xc2.const_data_ptr<T>(), gc2.const_data_ptr<T>(), d_in, d_out, seg2};
  const int64_t na = a.examples(), nb = b.examples();
  Tensor out = new_tensor(x, {na, nb}, type);
  torch::stable::zero_(out);
  if (x.size(0) == 0 || x2.size(0) == 0 || d_in == 0 || d_out == 0) return out;
  T* po = out.mutable_data_ptr<T>();
  const Gram<T> gram{a, b, same, po};
  by_tokens ? gram.all_by_tokens() : gram.all_by_gradients();
  if (same)
    for (int64_t r = 0; r < na; ++r)
      for (int64_t c = 0; c < r; ++c) po[c * nb + r] = po[r * nb + c];
  return out;
}

Tensor grad_gram(Tensor x, Tensor g, Tensor offsets, Tensor x2, Tensor g2, Tensor offsets2,
                 bool same, bool by_tokens) {
  STD_TORCH_CHECK(x.size(0) == g.size(0) && x2.size(0) == g2.size(0) && x.size(1) == x2.size(1) &&
                      g.size(1) == g2.size(1),
                  "grad_gram: x [N, d_in], g [N, d_out], x2 [N2, d_in], g2 [N2, d_out] disagree");
  const ScalarType type = compute_type(x);
  return is_double(x) ? run<double>(x, g, offsets, x2, g2, offsets2, same, by_tokens, type)
                      : run<float>(x, g, offsets, x2, g2, offsets2, same, by_tokens, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_gram", TORCH_BOX(&grad_gram)); }
