// grad_dot on the CPU. By tokens: row chunks of y = x V^T by GEMM, then one pass that dots y with g
// and sums the rows of each example. By gradients: blocks of all G_b in bounded scratch, multiplied
// by the same blocks of V. Factors: the chunks are g R and x L. bf16/fp16 compute in float32.
#include "grad_dot_simd.h"
#include "gradient_block.h"

namespace {

using namespace u2a;
constexpr int64_t kChunkElements = 1 << 19, kFormed = 1 << 21;

// out[e, k] = the sum of token[t, k] over the tokens of example e; token [n, columns].
template <typename T>
void sum_segments(const T* token, const std::vector<int64_t>& seg, int64_t columns, T* out,
                  int64_t out_stride) {
  std::vector<double> sum(columns);
  for (size_t e = 0; e + 1 < seg.size(); ++e, out += out_stride) {
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t t = seg[e]; t < seg[e + 1]; ++t)
      for (int64_t k = 0; k < columns; ++k) sum[k] += token[t * columns + k];
    for (int64_t k = 0; k < columns; ++k) out[k] = static_cast<T>(sum[k]);
  }
}

template <typename T>
void dot_rows(const Tensor& a, const Tensor& b, int64_t rows, int64_t d, T* out) {
  const T *pa = a.const_data_ptr<T>(), *pb = b.const_data_ptr<T>();
  torch::stable::parallel_for(0, rows, 16, [&](int64_t lo, int64_t hi) {
    U2A_SIMD(row_dot(pa + lo * d, pb + lo * d, hi - lo, d, out + lo));
  });
}

template <typename T>
void by_tokens(const Tensor& x, const Tensor& g, const std::vector<int64_t>& seg, const Tensor& v,
               Tensor& out) {
  const ScalarType type = out.scalar_type();
  const int64_t n = x.size(0), d_out = g.size(1), q = v.size(0);
  Tensor token = new_tensor(x, {n}, type);
  const int64_t chunk = std::max<int64_t>(1, std::min(n, kChunkElements / d_out));
  Tensor y = new_tensor(x, {chunk, d_out}, type);
  for (int64_t k = 0; k < q; ++k) {
    Tensor v_k = transposed(prepared(torch::stable::select(v, 0, k), type));
    for (int64_t start = 0; start < n; start += chunk) {
      const int64_t m = std::min(chunk, n - start);
      Tensor g_m = prepared(rows(g, start, m), type), y_m = rows(y, 0, m);
      mm_out(y_m, prepared(rows(x, start, m), type), v_k);
      dot_rows<T>(y_m, g_m, m, d_out, token.mutable_data_ptr<T>() + start);
    }
    sum_segments(token.const_data_ptr<T>(), seg, 1, out.mutable_data_ptr<T>() + k, q);
  }
}

template <typename T>
void by_gradients(const Tensor& x, const Tensor& g, const std::vector<int64_t>& seg,
                  const Tensor& v, Tensor& out) {
  const ScalarType type = out.scalar_type();
  Tensor xc = prepared(x, type), gc = prepared(g, type), whole = v;
  const Tokens<T> t{xc.const_data_ptr<T>(), gc.const_data_ptr<T>(), x.size(1), g.size(1), seg};
  const int64_t b = t.examples(), q = v.size(0), elements = std::max<int64_t>(1, kFormed / b);
  const std::unique_ptr<T[]> work = scratch<T>(b * std::max<int64_t>(16, elements));
  T* po = out.mutable_data_ptr<T>();
  for_each_block(t.d_out, t.d_in, elements, [&](const Block& k) {
    form_block(t, k, work.get());
    Tensor v_rows = torch::stable::narrow(whole, 1, k.o, k.rows);
    Tensor v_k = prepared(torch::stable::narrow(v_rows, 2, k.i, k.cols), type);
    const Matrix<const T> directions(v_k.const_data_ptr<T>(), q, k.size(), k.size());
    gemm_add<T>({po, b, q, q}, {work.get(), b, k.size(), k.size()}, directions.transposed());
  });
}

template <typename T>
void by_factors(const Tensor& x, const Tensor& g, const std::vector<int64_t>& seg, const Tensor& r,
                const Tensor& l, Tensor& out) {
  const ScalarType type = out.scalar_type();
  const int64_t n = x.size(0), q = r.size(0), rank = r.size(2), columns = q * rank;
  auto flat = [&](const Tensor& f) {  // [d, Q rank]
    Tensor c = prepared(torch::stable::transpose(f, 0, 1), type);
    return torch::stable::view(c, {f.size(1), columns});
  };
  Tensor rf = flat(r), lf = flat(l);
  const int64_t wide = std::max({x.size(1), g.size(1), columns});
  const int64_t chunk = std::max<int64_t>(1, std::min(n, 4 * kChunkElements / wide));
  Tensor zg = new_tensor(x, {chunk, columns}, type), zx = new_tensor(x, {chunk, columns}, type);
  Tensor token = new_tensor(x, {n, q}, type);
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t m = std::min(chunk, n - start);
    Tensor zg_m = rows(zg, 0, m), zx_m = rows(zx, 0, m);
    mm_out(zg_m, prepared(rows(g, start, m), type), rf);
    mm_out(zx_m, prepared(rows(x, start, m), type), lf);
    dot_rows<T>(zg_m, zx_m, m * q, rank, token.mutable_data_ptr<T>() + start * q);
  }
  sum_segments(token.const_data_ptr<T>(), seg, q, out.mutable_data_ptr<T>(), q);
}

// Zeros [B, Q], and whether anything is to be added.
bool nothing(const Tensor& x, const Tensor& g, const std::vector<int64_t>& seg, int64_t q,
             Tensor& out) {
  out = new_tensor(x, {static_cast<int64_t>(seg.size()) - 1, q}, compute_type(x));
  torch::stable::zero_(out);
  return x.size(0) == 0 || x.size(1) == 0 || g.size(1) == 0 || q == 0;
}

Tensor grad_dot(Tensor x, Tensor g, Tensor offsets, Tensor v, bool tokens) {
  STD_TORCH_CHECK(x.size(0) == g.size(0) && v.size(1) == g.size(1) && v.size(2) == x.size(1),
                  "grad_dot: x [N, d_in], g [N, d_out] and v [Q, d_out, d_in] disagree");
  const std::vector<int64_t> seg = host_offsets("grad_dot", offsets, x.size(0));
  Tensor out;
  if (nothing(x, g, seg, v.size(0), out)) return out;
  if (tokens)
    is_double(x) ? by_tokens<double>(x, g, seg, v, out) : by_tokens<float>(x, g, seg, v, out);
  else
    is_double(x) ? by_gradients<double>(x, g, seg, v, out) : by_gradients<float>(x, g, seg, v, out);
  return out;
}

Tensor grad_dot_low_rank(Tensor x, Tensor g, Tensor offsets, Tensor r, Tensor l) {
  STD_TORCH_CHECK(x.size(0) == g.size(0) && r.size(1) == g.size(1) && l.size(1) == x.size(1) &&
                      r.size(0) == l.size(0) && r.size(2) == l.size(2),
                  "grad_dot: x [N, d_in], g [N, d_out] and factors [Q, d_out, rank], "
                  "[Q, d_in, rank] disagree");
  const std::vector<int64_t> seg = host_offsets("grad_dot", offsets, x.size(0));
  Tensor out;
  if (nothing(x, g, seg, r.size(0), out) || r.size(2) == 0) return out;
  is_double(x) ? by_factors<double>(x, g, seg, r, l, out) : by_factors<float>(x, g, seg, r, l, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("grad_dot", TORCH_BOX(&grad_dot));
  m.impl("grad_dot_low_rank", TORCH_BOX(&grad_dot_low_rank));
}
