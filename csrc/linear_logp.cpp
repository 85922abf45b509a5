// linear_logp on the CPU: vocabulary tiles x row chunks of h W^T by GEMM into a few MB of scratch,
// then one pass per tile while it is in cache. Rows without a target are left out before the GEMM.
// bf16/fp16 compute in float32, the weight converted one tile at a time.
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "linear_logp_simd.h"
#include "loss_head.h"

namespace {

using namespace u2a;
using OptTensor = std::optional<Tensor>;
constexpr int64_t kTileElements = 1 << 19, kTileRows = 1024, kGrain = 16;

// The rows that have a target, and what every pass over the tiles needs.
template <typename T>
struct Problem {
  std::vector<int64_t> row, target;
  Tensor h, bias;
  ScalarType type;
  int64_t m, v, d, chunk, tile;
  LogitMap<T> map;

  Problem(const Tensor& all_h, const Tensor& weight, const Tensor& targets, const OptTensor& b,
          double softcap, double temperature)
      : type(compute_type(all_h)), v(weight.size(0)), d(weight.size(1)) {
    STD_TORCH_CHECK(
        all_h.size(1) == d && targets.size(0) == all_h.size(0) &&
            targets.scalar_type() == ScalarType::Long && (!b || b->size(0) == v),
        "linear_logp: h [N, d], weight [V, d], int64 targets [N] and bias [V] disagree");
    used_rows("linear_logp", targets, v, row, target);
    m = static_cast<int64_t>(row.size());
    h = prepared(m == all_h.size(0) ? all_h : index_rows(all_h, row), type);
    if (b) bias = prepared(*b, type);
    map = {b ? bias.const_data_ptr<T>() : nullptr, static_cast<T>(softcap),
           static_cast<T>(temperature)};
    chunk = std::max<int64_t>(1, std::min(m, kTileRows));
    tile = std::min(v, kTileElements / chunk);
  }

  LogitMap<T> map_at(int64_t column) const {
    return {map.bias ? map.bias + column : nullptr, map.cap, map.temperature};
  }
};

// each(c0, w, r0, block): block [r, c] = h W^T at rows r0 and columns c0, in scratch; w [c, d].
template <typename T, typename F>
void for_each_tile(const Problem<T>& p, const Tensor& weight, F each) {
  Tensor scratch = new_tensor(p.h, {p.chunk * p.tile}, p.type);
  for (int64_t c0 = 0; c0 < p.v; c0 += p.tile) {
    const int64_t c = std::min(p.tile, p.v - c0);
    Tensor w = prepared(rows(weight, c0, c), p.type);
    for (int64_t r0 = 0; r0 < p.m; r0 += p.chunk) {
      const int64_t r = std::min(p.chunk, p.m - r0);
      Tensor block = torch::stable::view(rows(scratch, 0, r * c), {r, c});
      mm_out(block, rows(p.h, r0, r), transposed(w));
      each(c0, w, r0, block);
    }
  }
}

// acc becomes dlogp/dh = (slope W[target] - acc / sum) / temperature, in rows of the result.
template <typename T>
Tensor finish_grad(const Problem<T>& p, const Tensor& like, const Tensor& weight, Tensor& acc,
                   const std::vector<RowState<T>>& state) {
  Tensor w = prepared(index_rows(weight, p.target), p.type);
  const T* pw = w.template const_data_ptr<T>();
  T* pa = acc.template mutable_data_ptr<T>();
  torch::stable::parallel_for(0, p.m, kGrain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const T slope = state[i].slope / p.map.temperature;
      const T scale = 1 / (state[i].sum * p.map.temperature);
      for (int64_t k = i * p.d; k < (i + 1) * p.d; ++k) pa[k] = slope * pw[k] - scale * pa[k];
    }
  });
  if (p.m == like.size(0)) return prepared(acc, like.scalar_type());
  Tensor out = new_tensor(like, {like.size(0), p.d}, like.scalar_type());
  torch::stable::zero_(out);
  Tensor typed = prepared(acc, like.scalar_type());
  const int64_t bytes = p.d * (is_double(like)                           ? 8
                               : like.scalar_type() == ScalarType::Float ? 4
                                                                         : 2);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = static_cast<const char*>(typed.const_data_ptr());
  for (int64_t i = 0; i < p.m; ++i) std::memcpy(to + p.row[i] * bytes, from + i * bytes, bytes);
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& h, const Tensor& weight,
                                           const Problem<T>& p, bool grad_h) {
  Tensor logp = new_tensor(h, {h.size(0)}, p.type), lse = new_tensor(h, {h.size(0)}, p.type);
  torch::stable::zero_(logp);
  torch::stable::zero_(lse);
  std::vector<RowState<T>> state(p.m, {-static_cast<T>(INFINITY), 0, 0, 0});
  std::vector<T> rescale(grad_h ? p.m : 0);
  Tensor acc = new_tensor(h, {grad_h ? p.m : 0, p.d}, p.type);
  torch::stable::zero_(acc);
  for_each_tile(p, weight, [&](int64_t c0, const Tensor& w, int64_t r0, const Tensor& block) {
    const int64_t c = block.size(1);
    T* z = block.mutable_data_ptr<T>();
    T* pa = grad_h ? acc.mutable_data_ptr<T>() : nullptr;
    torch::stable::parallel_for(0, block.size(0), kGrain, [&](int64_t lo, int64_t hi) {
      const std::vector<int64_t> target = local(p.target, r0 + lo, r0 + hi, c0);
      T* old = grad_h ? rescale.data() + r0 + lo : nullptr;
      U2A_SIMD(logp_tile(z + lo * c, hi - lo, c, p.map_at(c0), target.data(),
                         state.data() + r0 + lo, old));
      if (grad_h) U2A_SIMD(scale_rows(pa + (r0 + lo) * p.d, hi - lo, p.d, old));
    });
    if (!grad_h) return;
    Tensor acc_r = rows(acc, r0, block.size(0));
    addmm_(acc_r, block, w);
  });
  for (int64_t i = 0; i < p.m; ++i) {
    const T value = state[i].max + std::log(state[i].sum);
    lse.mutable_data_ptr<T>()[p.row[i]] = value;
    logp.mutable_data_ptr<T>()[p.row[i]] = state[i].y - value;
  }
  if (!grad_h) return {logp, lse, new_tensor(h, {0, p.d}, h.scalar_type())};
  return {logp, lse, finish_grad(p, h, weight, acc, state)};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& lse, const Tensor& weight,
                                    const Problem<T>& p) {
  Tensor dw = new_tensor(weight, {p.v, p.d}, weight.scalar_type());
  Tensor db = new_tensor(weight, {p.map.bias ? p.v : 0}, weight.scalar_type());
  if (p.m == 0) return {torch::stable::zero_(dw), torch::stable::zero_(db)};
  const bool direct = weight.scalar_type() == p.type;
  Tensor all_g = prepared(grad, p.type), all_lse = prepared(lse, p.type);
  std::vector<T> g(p.m), l(p.m);
  for (int64_t i = 0; i < p.m; ++i) {
    g[i] = all_g.const_data_ptr<T>()[p.row[i]];
    l[i] = all_lse.const_data_ptr<T>()[p.row[i]];
  }
  Tensor sums = new_tensor(weight, {p.map.bias ? p.v : 0}, ScalarType::Double);
  torch::stable::zero_(sums);
  double* db_sum = sums.mutable_data_ptr<double>();
  Tensor part = new_tensor(weight, {direct ? 0 : p.tile, p.d}, p.type);
  for_each_tile(p, weight, [&](int64_t c0, const Tensor&, int64_t r0, const Tensor& block) {
    const int64_t r = block.size(0), c = block.size(1);
    T* z = block.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, r, kGrain, [&](int64_t lo, int64_t hi) {
      const std::vector<int64_t> target = local(p.target, r0 + lo, r0 + hi, c0);
      U2A_SIMD(grad_tile(z + lo * c, hi - lo, c, p.map_at(c0), target.data(), l.data() + r0 + lo,
                         g.data() + r0 + lo));
    });
    Tensor to = direct ? rows(dw, c0, c) : rows(part, 0, c);
    if (r0 == 0)
      mm_out(to, transposed(block), rows(p.h, r0, r));
    else
      addmm_(to, transposed(block), rows(p.h, r0, r));
    if (!direct && r0 + r == p.m) {
      Tensor out = rows(dw, c0, c);
      torch::stable::copy_(out, to);
    }
    if (!p.map.bias) return;
    torch::stable::parallel_for(0, c, 256, [&](int64_t lo, int64_t hi) {
      for (int64_t i = 0; i < r; ++i)
        for (int64_t j = lo; j < hi; ++j) db_sum[c0 + j] += z[i * c + j];
    });
  });
  if (p.map.bias) torch::stable::copy_(db, sums);
  return {dw, db};
}

std::tuple<Tensor, Tensor, Tensor> linear_logp_fwd(Tensor h, Tensor weight, Tensor targets,
                                                   OptTensor bias, double softcap,
                                                   double temperature, bool grad_h) {
  if (is_double(h))
    return forward(h, weight, Problem<double>(h, weight, targets, bias, softcap, temperature),
                   grad_h);
  return forward(h, weight, Problem<float>(h, weight, targets, bias, softcap, temperature), grad_h);
}

std::tuple<Tensor, Tensor> linear_logp_bwd(Tensor grad, Tensor h, Tensor weight, Tensor targets,
                                           OptTensor bias, Tensor lse, double softcap,
                                           double temperature) {
  if (is_double(h))
    return backward(grad, lse, weight,
                    Problem<double>(h, weight, targets, bias, softcap, temperature));
  return backward(grad, lse, weight,
                  Problem<float>(h, weight, targets, bias, softcap, temperature));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("linear_logp_fwd", TORCH_BOX(&linear_logp_fwd));
  m.impl("linear_logp_bwd", TORCH_BOX(&linear_logp_bwd));
}
