// dual_linear_cross_entropy on the CPU: vocabulary tiles x row chunks. A chunk's primal and tangent
// rows lie together, so that one GEMM makes both tiles and one pulls both back; between the two,
// one pass while they are in cache. The tiles' products are kept relative to a running maximum and
// a running centre of the tangents. bf16/fp16 compute in float32, the weight widened tile by tile.
#include <cmath>
#include <optional>
#include <tuple>

#include "dual_linear_cross_entropy_simd.h"
#include "loss_head.h"

namespace {

using namespace u2a;
using OptTensor = std::optional<Tensor>;
constexpr const char* kOp = "dual_linear_cross_entropy";
constexpr int64_t kTileElements = 1 << 19, kChunkRows = 512, kGrain = 8, kWide = 1 << 21;

template <typename T>
struct Head {
  const Tensor &h, &weight;
  OptTensor weight_t;
  Tensor bias, bias_t;
  std::vector<int64_t> row, target;
  ScalarType type;
  int64_t n, m, v, d, chunk, tile;
  T cap;

  Head(const Tensor& hidden, const Tensor& w, const Tensor& targets, const OptTensor& w_t,
       const OptTensor& b, const OptTensor& b_t, double softcap)
      : h(hidden),
        weight(w),
        weight_t(w_t),
        type(compute_type(hidden)),
        n(hidden.size(0) / 2),
        v(w.size(0)),
        d(w.size(1)),
        cap(static_cast<T>(softcap)) {
    STD_TORCH_CHECK(h.size(1) == d && targets.size(0) == n && h.size(0) == 2 * n &&
                        targets.scalar_type() == ScalarType::Long && (!b || b->size(0) == v) &&
                        (!b_t || b_t->size(0) == v) &&
                        (!w_t || (w_t->size(0) == v && w_t->size(1) == d)),
                    kOp, ": h [2N, d], weights [V, d], int64 targets [N] and biases [V] disagree");
    used_rows(kOp, targets, v, row, target);
    m = static_cast<int64_t>(row.size());
    if (b) bias = prepared(*b, type);
    if (b_t) bias_t = prepared(*b_t, type);
    chunk = std::max<int64_t>(1, std::min(m, kChunkRows));
    tile = std::min(v, kTileElements / (2 * chunk));
    if (weight.scalar_type() != type)
      tile = std::min(tile, std::max<int64_t>(128, kWide / std::max<int64_t>(1, d)));
  }

  LogitMap<T> map_at(int64_t c) const {
    return {bias.defined() ? bias.const_data_ptr<T>() + c : nullptr, cap, 1};
  }
  const T* tangent_at(int64_t c) const {
    return bias_t.defined() ? bias_t.const_data_ptr<T>() + c : nullptr;
  }
  // Where used row i is among packed rows, and how far behind it its tangent: by chunks.
  int64_t at(int64_t i) const { return i / chunk * 2 * chunk + i % chunk; }
  int64_t gap(int64_t i) const { return std::min(chunk, m - i / chunk * chunk); }

  Tensor packed() const {
    Tensor all = prepared(h, type), out = new_tensor(h, {2 * m, d}, type);
    const T* from = all.template const_data_ptr<T>();
    T* to = out.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < m; ++i) {
      std::copy_n(from + row[i] * d, d, to + at(i) * d);
      std::copy_n(from + (n + row[i]) * d, d, to + (at(i) + gap(i)) * d);
    }
    return out;
  }

  // each(c0, w, w_t, r0, z): z [2r, c] are the chunk's products at rows r0 and columns c0.
  template <typename F>
  void for_each_tile(const Tensor& x, F each) const {
    Tensor scratch = new_tensor(h, {2 * chunk * tile}, type), none;
    for (int64_t c0 = 0; c0 < v; c0 += tile) {
      const int64_t c = std::min(tile, v - c0);
      Tensor w = prepared(rows(weight, c0, c), type);
      Tensor w_t = weight_t ? prepared(rows(*weight_t, c0, c), type) : none;
      for (int64_t r0 = 0; r0 < m; r0 += chunk) {
        const int64_t r = std::min(chunk, m - r0);
        Tensor z = torch::stable::view(rows(scratch, 0, 2 * r * c), {2 * r, c});
        mm_out(z, rows(x, 2 * r0, 2 * r), transposed(w));
        if (weight_t) {
          Tensor z_t = rows(z, r, r);
          addmm_(z_t, rows(x, 2 * r0, r), transposed(w_t));
        }
        each(c0, w, w_t, r0, z);
      }
    }
  }
};

// Sums of the tiles become r1 = f W and r2 = g W + f W_t, in rows of the result: `kept` [1 or 2, N,
// d] is r2, or r2 and r1.
template <typename T>
Tensor finish(const Head<T>& p, Tensor& acc, const std::vector<DualState<T>>& state, bool ggn) {
  Tensor kept = new_tensor(p.h, {ggn ? 1 : 2, p.n, p.d}, p.type), own_t;
  torch::stable::zero_(kept);
  Tensor own = prepared(index_rows(p.weight, p.target), p.type);
  if (p.weight_t && !ggn) own_t = prepared(index_rows(*p.weight_t, p.target), p.type);
  const T *w = own.template const_data_ptr<T>(), *sums = acc.template const_data_ptr<T>();
  const T* w_t = own_t.defined() ? own_t.template const_data_ptr<T>() : nullptr;
  T* out = kept.template mutable_data_ptr<T>();
  torch::stable::parallel_for(0, p.m, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const DualState<T>& s = state[i];
      const T scale = 1 / s.sum, by = s.shift - s.mean;
      const T *first = sums + p.at(i) * p.d, *second = first + p.gap(i) * p.d;
      T *r2 = out + p.row[i] * p.d, *r1 = r2 + p.n * p.d;
      if (ggn) {
        for (int64_t k = 0; k < p.d; ++k) r2[k] = scale * (second[k] + by * first[k]);
        continue;
      }
      const T *own_row = w + i * p.d, *own_row_t = w_t ? w_t + i * p.d : nullptr;
      for (int64_t k = 0; k < p.d; ++k) {
        r1[k] = scale * first[k] - s.slope * own_row[k];
        r2[k] = scale * (second[k] + by * first[k]) - s.bend * own_row[k];
      }
      if (w_t)
        for (int64_t k = 0; k < p.d; ++k) r2[k] -= s.slope * own_row_t[k];
    }
  });
  return prepared(kept, p.h.scalar_type());
}

template <typename T>
Tensor per_token(const Head<T>& p, int64_t count) {
  Tensor t = count ? new_tensor(p.h, {count, p.n}, p.type) : new_tensor(p.h, {p.n}, p.type);
  return torch::stable::zero_(t);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Outputs forward(const Head<T>& p, bool ggn, bool keep) {
  std::vector<DualState<T>> state(p.m, {-static_cast<T>(INFINITY), 0, 0, 0, 0, 0, 0, 0, 0});
  std::vector<T> rescale(keep ? 2 * p.m : 0);
  Tensor x = p.packed(), acc = new_tensor(p.h, {keep ? 2 * p.m : 0, p.d}, p.type), extra;
  torch::stable::zero_(acc);
  p.for_each_tile(x, [&](int64_t c0, const Tensor& w, const Tensor& w_t, int64_t r0, Tensor& z) {
    const int64_t r = z.size(0) / 2, c = z.size(1);
    T* pz = z.mutable_data_ptr<T>();
    T* sums = keep ? acc.mutable_data_ptr<T>() + 2 * r0 * p.d : nullptr;
    torch::stable::parallel_for(0, r, kGrain, [&](int64_t lo, int64_t hi) {
      const std::vector<int64_t> target = local(p.target, r0 + lo, r0 + hi, c0);
      T* scales = keep ? rescale.data() + 2 * (r0 + lo) : nullptr;
      U2A_SIMD(dual_tile(pz + lo * c, pz + (r + lo) * c, hi - lo, c, p.map_at(c0), p.tangent_at(c0),
                         target.data(), state.data() + r0 + lo, scales, ggn));
      if (keep)
        U2A_SIMD(dual_rescale(sums + lo * p.d, sums + (r + lo) * p.d, hi - lo, p.d, scales));
    });
    if (!keep) return;
    Tensor to = rows(acc, 2 * r0, 2 * r);
    addmm_(to, z, w);
    if (!p.weight_t || ggn) return;
    Tensor second = rows(acc, 2 * r0 + r, r);
    addmm_(second, rows(z, 0, r), w_t);
  });
  Tensor loss = per_token(p, 0), loss_t = per_token(p, 0), curvature = per_token(p, 0);
  Tensor stats = per_token(p, 3);
  T* ps = stats.template mutable_data_ptr<T>();
  for (int64_t i = 0; i < p.m; ++i) {
    const DualState<T>& s = state[i];
    const int64_t at = p.row[i];
    loss.template mutable_data_ptr<T>()[at] = (s.max - s.y) + std::log(s.sum);
    loss_t.template mutable_data_ptr<T>()[at] = s.mean - s.y_t;
    curvature.template mutable_data_ptr<T>()[at] = s.square / s.sum;
    ps[at] = s.max, ps[p.n + at] = 1 / s.sum, ps[2 * p.n + at] = s.mean;
  }
  if (!keep)
    return {loss, loss_t, curvature, stats, new_tensor(p.h, {0, p.n, p.d}, p.h.scalar_type())};
  return {loss, loss_t, curvature, stats, finish(p, acc, state, ggn)};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Head<T>& p, const Tensor& a, const Tensor& b,
                                    const Tensor& stats, bool ggn) {
  Tensor dw = new_tensor(p.weight, {p.v, p.d}, p.weight.scalar_type());
  Tensor db = new_tensor(p.weight, {p.bias.defined() ? p.v : 0}, p.weight.scalar_type());
  if (p.m == 0) return {torch::stable::zero_(dw), torch::stable::zero_(db)};
  Tensor ca = prepared(a, p.type), cb = prepared(b, p.type), cs = prepared(stats, p.type);
  const T *pa = ca.template const_data_ptr<T>(), *pb = cb.template const_data_ptr<T>();
  const T* ps = cs.template const_data_ptr<T>();
  std::vector<DualCotangent<T>> row(p.m);
  for (int64_t i = 0; i < p.m; ++i) {
    const int64_t at = p.row[i];
    row[i] = {pa[at], pb[at], ps[at], ps[p.n + at], ps[2 * p.n + at]};
  }
  const bool direct = p.weight.scalar_type() == p.type;
  Tensor x = p.packed(), part = new_tensor(p.weight, {direct ? 0 : p.tile, p.d}, p.type);
  Tensor sums = new_tensor(p.weight, {db.size(0)}, ScalarType::Double);
  torch::stable::zero_(sums);
  double* db_sum = sums.mutable_data_ptr<double>();
  p.for_each_tile(x, [&](int64_t c0, const Tensor&, const Tensor&, int64_t r0, Tensor& z) {
    const int64_t r = z.size(0) / 2, c = z.size(1), used = ggn ? r : 2 * r;
    T* pz = z.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, r, kGrain, [&](int64_t lo, int64_t hi) {
      const std::vector<int64_t> target = local(p.target, r0 + lo, r0 + hi, c0);
      U2A_SIMD(dual_grad_tile(pz + lo * c, pz + (r + lo) * c, hi - lo, c, p.map_at(c0),
                              p.tangent_at(c0), target.data(), row.data() + r0 + lo, ggn));
    });
    Tensor to = direct ? rows(dw, c0, c) : rows(part, 0, c);
    Tensor g = transposed(rows(z, 0, used)), in = rows(x, 2 * r0, used);
    r0 == 0 ? mm_out(to, g, in) : addmm_(to, g, in);
    if (!direct && r0 + r == p.m) {
      Tensor out = rows(dw, c0, c);
      torch::stable::copy_(out, to);
    }
    if (!p.bias.defined()) return;
    torch::stable::parallel_for(0, c, 256, [&](int64_t lo, int64_t hi) {
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = lo; j < hi; ++j) db_sum[c0 + j] += pz[i * c + j];
    });
  });
  if (p.bias.defined()) torch::stable::copy_(db, sums);
  return {dw, db};
}

Outputs fwd(Tensor h, Tensor weight, Tensor targets, OptTensor weight_t, OptTensor bias,
            OptTensor bias_t, double softcap, std::string mode, bool keep) {
  const bool ggn = mode == "ggn";
  if (is_double(h))
    return forward(Head<double>(h, weight, targets, weight_t, bias, bias_t, softcap), ggn, keep);
  return forward(Head<float>(h, weight, targets, weight_t, bias, bias_t, softcap), ggn, keep);
}

std::tuple<Tensor, Tensor> bwd(Tensor a, Tensor b, Tensor h, Tensor weight, Tensor targets,
                               OptTensor weight_t, OptTensor bias, OptTensor bias_t, Tensor stats,
                               double softcap, std::string mode) {
  const bool ggn = mode == "ggn";
  if (is_double(h))
    return backward(Head<double>(h, weight, targets, weight_t, bias, bias_t, softcap), a, b, stats,
                    ggn);
  return backward(Head<float>(h, weight, targets, weight_t, bias, bias_t, softcap), a, b, stats,
                  ggn);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("dual_linear_cross_entropy", TORCH_BOX(&fwd));
  m.impl("dual_linear_cross_entropy_bwd", TORCH_BOX(&bwd));
}
