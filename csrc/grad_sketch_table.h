// Tables of grad_sketch on the CPU, made once per call.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "grad_sketch_simd.h"
#include "sketch_hash.h"

namespace u2a {

template <typename T>
struct alignas(64) SketchRow {
  T lane[kLanes<T>];
};

// Aligned work space of whole rows.
template <typename T>
struct SketchRows {
  explicit SketchRows(int64_t n) : rows(n) {}
  T* data() { return rows.data()->lane; }
  void clear() { std::fill(rows.begin(), rows.end(), SketchRow<T>{}); }
  const T* data() const { return rows.data()->lane; }
  std::vector<SketchRow<T>> rows;
};

inline std::vector<uint32_t> sketch_words(uint64_t seed, uint32_t stream, int64_t d) {
  std::vector<uint32_t> word(d);
  for (int64_t c = 0; c < d; ++c) word[c] = sketch_hash(seed, stream, c);
  return word;
}

// The values of one factor, ordered by row; see SketchFactor.
struct SketchTable {
  std::vector<int32_t> row;
  std::vector<SketchGroup> group;
  std::vector<uint32_t> entry;

  SketchTable(uint64_t seed, uint32_t stream, int64_t d, int64_t k, int64_t rows, int lanes)
      : row(rows), entry(d) {
    const std::vector<uint32_t> word = sketch_words(seed, stream, d);
    std::vector<int64_t> first(rows + 1);
    for (const uint32_t w : word) ++first[(w & (k - 1)) / lanes + 1];
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
SketchRows<T> sketch_patterns() {
  constexpr int n = kLanes<T>;
  SketchRows<T> rows(2 * n);
  for (int p = 0; p < 2 * n; ++p)
    for (int j = 0; j < n; ++j) {
      const bool odd = __builtin_popcount(p & (n - 1) & j) & 1;
      rows.rows[p].lane[j] = odd == (p >= n) ? T(1) : T(-1);
    }
  return rows;
}

// Bucket domain to features, times 1/sqrt(k).
template <typename T>
void finish_sketch(SketchRows<T>& z, const SketchRows<T>& patterns, int64_t k, T* out) {
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(k)));
  U2A_SIMD(sketch_transform(z.data(), z.rows.size(), patterns.data()));
  for (int64_t j = 0; j < k; ++j) out[j] = z.data()[j] * scale;
}

}  // namespace u2a
