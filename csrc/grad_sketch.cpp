// grad_sketch on the CPU, in one of two ways that formed_is_cheaper() chooses by shape. Per token:
// both factors into k buckets each, Walsh-Hadamard transform, multiply and accumulate; the same
// bits on every instruction set. Per example: blocks of the gradient by GEMM, their entries into k
// buckets, one transform; the same bits wherever the GEMM's are. Threads share the examples;
// bf16/fp16 inputs are copied to float32 once.
#include <cmath>

#include "common.h"
#include "grad_sketch_entries_simd.h"
#include "grad_sketch_table.h"

namespace {

using namespace u2a;
constexpr int64_t kMaxWidth = int64_t{1} << 27;  // coordinates share 32 bits with a pattern
constexpr int64_t kTile = int64_t{1} << 18;      // elements of a formed block

// Nanoseconds per example of either way, measured on an AVX-512 core whose GEMM does 160 GFLOP/s. A
// function of the shape, never of the machine or the threads.
bool formed_is_cheaper(int64_t n, int64_t b, int64_t d_in, int64_t d_out, int64_t k) {
  const double tokens = static_cast<double>(n) / std::max<int64_t>(1, b);
  const double entries = static_cast<double>(d_in) * d_out, size = static_cast<double>(k);
  const double adds = size * std::max(0.0, std::log2(size / 16)) / 32 * (k <= 4096 ? 1.4 : 2.0);
  const double transformed = tokens * (0.6 * (d_in + d_out) + adds);
  return 2000 + entries * (1 + tokens / 80) + 2 * size < transformed;
}

template <typename T>
struct Inputs {
  Tensor x, g;  // contiguous [N, d_in], [N, d_out]
  const std::vector<int64_t>& seg;
  int64_t d_in, d_out, k;
  uint64_t seed;
  const T* row_of(const Tensor& t, int64_t e) const {
    return t.const_data_ptr<T>() + seg[e] * t.size(1);
  }
};

template <typename T>
void by_token(const Inputs<T>& in, T* out) {
  const int64_t b = in.seg.size() - 1, rows = std::max<int64_t>(1, in.k / kLanes<T>);
  const SketchTable table_x(in.seed, kInputs, in.d_in, in.k, rows, kLanes<T>);
  const SketchTable table_g(in.seed, kOutputs, in.d_out, in.k, rows, kLanes<T>);
  const SketchRows<T> patterns = sketch_patterns<T>();
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(in.k)));
  torch::stable::parallel_for(0, b, 1, [&](int64_t lo, int64_t hi) {
    const int64_t at_once = rows <= kTokenRows ? kTokens : 1;
    SketchRows<T> zx(rows * at_once), zg(rows * at_once), sum(rows);
    const SketchTotal<T> total{patterns.data(), rows, sum.data()};
    for (int64_t e = lo; e < hi; ++e) {
      const auto fx = table_x.factor(in.row_of(in.x, e), in.d_in, zx.data());
      const auto fg = table_g.factor(in.row_of(in.g, e), in.d_out, zg.data());
      U2A_SIMD(sketch_tokens(fx, fg, in.seg[e + 1] - in.seg[e], total));
      for (int64_t j = 0; j < in.k; ++j) out[e * in.k + j] = total.sum[j] * scale;
    }
  });
}

template <typename T>
void by_example(const Inputs<T>& in, T* out) {
  const int64_t b = in.seg.size() - 1, block = std::max<int64_t>(1, kTile / in.d_in);
  const std::vector<uint32_t> word_x = sketch_words(in.seed, kInputs, in.d_in);
  const std::vector<uint32_t> word_g = sketch_words(in.seed, kOutputs, in.d_out);
  const SketchRows<T> patterns = sketch_patterns<T>();
  torch::stable::parallel_for(0, b, 1, [&](int64_t lo, int64_t hi) {
    Tensor tile = new_tensor(in.x, {std::min(block, in.d_out), in.d_in}, in.x.scalar_type());
    SketchRows<T> z(std::max<int64_t>(1, in.k / kLanes<T>));
    for (int64_t e = lo; e < hi; ++e) {
      const int64_t tokens = in.seg[e + 1] - in.seg[e];
      z.clear();
      Tensor g_e = rows(in.g, in.seg[e], tokens), x_e = rows(in.x, in.seg[e], tokens);
      for (int64_t o0 = 0; tokens && o0 < in.d_out; o0 += block) {
        const int64_t m = std::min(block, in.d_out - o0);
        Tensor part = rows(tile, 0, m);
        mm_out(part, transposed(torch::stable::narrow(g_e, 1, o0, m)), x_e);
        const T* value = part.const_data_ptr<T>();
        for (int64_t r = 0; r < m; ++r, value += in.d_in)
          U2A_SIMD(
              scatter_entries(value, in.d_in, word_x.data(), word_g[o0 + r], in.k - 1, z.data()));
      }
      finish_sketch(z, patterns, in.k, out + e * in.k);
    }
  });
}

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, int64_t k, int64_t seed,
           ScalarType type) {
  const std::vector<int64_t> seg = host_offsets("grad_sketch", offsets, x.size(0));
  const int64_t b = static_cast<int64_t>(seg.size()) - 1;
  const Inputs<T> in{prepared(x, type),          prepared(g, type), seg, x.size(1), g.size(1), k,
                     static_cast<uint64_t>(seed)};
  Tensor out = new_tensor(x, {b, k}, type);
  if (in.d_in > 0 && in.d_out > 0 && formed_is_cheaper(x.size(0), b, in.d_in, in.d_out, k))
    by_example(in, out.mutable_data_ptr<T>());
  else
    by_token(in, out.mutable_data_ptr<T>());
  return out;
}

Tensor grad_sketch(Tensor x, Tensor g, Tensor offsets, int64_t k, int64_t seed) {
  STD_TORCH_CHECK(x.size(0) == g.size(0), "grad_sketch: x and g must have the same N rows, got ",
                  x.size(0), " and ", g.size(0));
  STD_TORCH_CHECK(k >= 2 && k <= 65536 && (k & (k - 1)) == 0,
                  "grad_sketch: k must be a power of two from 2 to 65536, got ", k);
  STD_TORCH_CHECK(x.size(1) < kMaxWidth && g.size(1) < kMaxWidth,
                  "grad_sketch: d_in and d_out must be below 2^27, got ", x.size(1), " and ",
                  g.size(1));
  const ScalarType type = compute_type(x);
  return is_double(x) ? run<double>(x, g, offsets, k, seed, type)
                      : run<float>(x, g, offsets, k, seed, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_sketch", TORCH_BOX(&grad_sketch)); }
