// grad_sketch on the CPU: per token, scatter each factor into k buckets, Walsh-Hadamard transform,
// multiply and accumulate. Threads share the examples. bf16/fp16 inputs are copied to float32 once.
#include <cmath>

#include "common.h"
#include "grad_sketch_simd.h"
#include "sketch_hash.h"

namespace {

using namespace u2a;
constexpr int64_t kMaxWidth = int64_t{1} << 27;  // coordinates share 32 bits with a pattern

template <typename T>
struct alignas(64) Row {
  T lane[kLanes<T>];
};

// Aligned work space of whole rows.
template <typename T>
struct Rows {
  explicit Rows(int64_t n) : rows(n) {}
  T* data() { return rows.data()->lane; }
  std::vector<Row<T>> rows;
};

// The values of one factor, ordered by row; see SketchFactor.
struct Table {
  std::vector<int32_t> row;
  std::vector<SketchGroup> group;
  std::vector<uint32_t> entry;

  Table(uint64_t seed, uint32_t stream, int64_t d, int64_t k, int64_t rows, int lanes)
      : row(rows), entry(d) {
    std::vector<uint32_t> word(d);
    std::vector<int64_t> first(rows + 1);
    for (int64_t c = 0; c < d; ++c) {
      word[c] = sketch_hash(seed, stream, c);
      ++first[(word[c] & (k - 1)) / lanes + 1];
    }
    for (int64_t r = 0; r < rows; ++r) row[r] = static_cast<int32_t>(r);
    std::stable_sort(row.begin(), row.end(),
                     [&](int32_t a, int32_t b) { return first[a + 1] < first[b + 1]; });
    std::vector<int64_t> at(rows);
    int64_t next = 0;
    for (const int32_t r : row) {
      const int32_t count = static_cast<int32_t>(first[r + 1]);
      if (group.empty() || group.back().count != count) group.push_back({0, count});
      ++group.back().rows;
      at[r] = next;
      next += count;
    }
    for (int64_t c = 0; c < d; ++c) {
      const uint32_t bucket = word[c] & (k - 1), sign = word[c] >> 31;
      entry[at[bucket / lanes]++] =
          static_cast<uint32_t>(c) * 2 * lanes + sign * lanes + bucket % lanes;
    }
  }

  template <typename T>
  SketchFactor<T> factor(const T* tokens, int64_t d, T* work) const {
    return {tokens,       d,   row.data(), group.data(), static_cast<int64_t>(group.size()),
            entry.data(), work};
  }
};

// Row p: (-1)^popcount(p & lane), negated in the second half.
template <typename T>
Rows<T> patterns() {
  constexpr int n = kLanes<T>;
  Rows<T> rows(2 * n);
  for (int p = 0; p < 2 * n; ++p)
    for (int j = 0; j < n; ++j) {
      const bool odd = __builtin_popcount(p & (n - 1) & j) & 1;
      rows.rows[p].lane[j] = odd == (p >= n) ? T(1) : T(-1);
    }
  return rows;
}

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, int64_t k, int64_t seed,
           ScalarType type) {
  const int64_t d_in = x.size(1), d_out = g.size(1);
  const std::vector<int64_t> seg = host_offsets("grad_sketch", offsets, x.size(0));
  const int64_t b = static_cast<int64_t>(seg.size()) - 1;
  Tensor out = new_tensor(x, {b, k}, type);
  Tensor xc = prepared(x, type), gc = prepared(g, type);
  const T *px = xc.const_data_ptr<T>(), *pg = gc.const_data_ptr<T>();
  const int64_t rows = std::max<int64_t>(1, k / kLanes<T>);
  const Table in(seed, kInputs, d_in, k, rows, kLanes<T>);
  const Table to(seed, kOutputs, d_out, k, rows, kLanes<T>);
  Rows<T> signs = patterns<T>();
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(k)));
  T* po = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, b, 1, [&](int64_t lo, int64_t hi) {
    const int64_t at_once = rows <= kTokenRows ? kTokens : 1;
    Rows<T> zx(rows * at_once), zg(rows * at_once), sum(rows);
    const SketchTotal<T> total{signs.data(), rows, sum.data()};
    for (int64_t e = lo; e < hi; ++e) {
      const SketchFactor<T> fx = in.factor(px + seg[e] * d_in, d_in, zx.data());
      const SketchFactor<T> fg = to.factor(pg + seg[e] * d_out, d_out, zg.data());
      U2A_SIMD(sketch_tokens(fx, fg, seg[e + 1] - seg[e], total));
      for (int64_t j = 0; j < k; ++j) po[e * k + j] = total.sum[j] * scale;
    }
  });
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
