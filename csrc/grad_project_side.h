// One side of grad_project: the tokens' values x or g (or row numbers of one-hot g) and the
// projection applied to them, which is a matrix, the signs of a seed, or the identity. Included
// once.
#pragma once
#include <cmath>
#include <memory>
#include <new>
#include <optional>

#include "common.h"
#include "grad_project_simd.h"

namespace u2a {
namespace {

constexpr uint32_t kOutputStream = 2, kInputStream = 3;
constexpr int64_t kChunk = 128, kIdentityColumns = 256, kNear = 1 << 20;

struct Factor {
  std::optional<Tensor> matrix;  // [k, d]
  int64_t k, seed;
  bool identity() const { return !matrix && seed < 0; }
};

// A matrix of two dimensions, or a placeholder of one where k and seed say what there is.
Factor factor_of(const Tensor& rows, const Tensor& p, int64_t k, int64_t seed) {
  if (p.dim() != 2) return {{}, k, seed};
  STD_TORCH_CHECK(rows.dim() == 1 || p.size(1) == rows.size(1),
                  "grad_project: a projection must have the columns of x or g");
  return {p, p.size(0), -1};
}

Strided strided(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  const Element type = s == ScalarType::Float      ? Element::f32
                       : s == ScalarType::Double   ? Element::f64
                       : s == ScalarType::BFloat16 ? Element::bf16
                                                   : Element::f16;
  return {t.const_data_ptr(), type, t.stride(0), t.stride(1)};
}

// Grows, starts on a cache line and is not initialised.
template <typename T>
class Buffer {
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;

 public:
  T* of(int64_t n) {
    if (n > size_)
      data_.reset(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))));
    size_ = std::max(n, size_);
    return data_.get();
  }
  const T* get() const { return data_.get(); }
};

// What one thread holds of one side.
template <typename T>
struct Scratch {
  Buffer<T> projected, tile, columns;
  Buffer<uint32_t> word;
};

// Columns first .. first + count of the projected tokens of a chunk, [tokens][ld].
template <typename T>
struct Block {
  const T* data;
  int64_t ld, first, count;
};

template <typename T>
struct Side {
  Tensor rows;
  Factor p;
  uint32_t stream;
  int64_t n, d, k, ld, words, columns;
  double factor;          // 1 / sqrt(k) for signs
  Buffer<T> tiles;        // of a matrix
  Buffer<uint32_t> word;  // of a seed: k bits a column

  Side(const Tensor& values, Factor projection, uint32_t s)
      : rows(values), p(std::move(projection)), stream(s), n(values.size(0)) {
    d = hot() ? 0 : rows.size(1);
    k = p.identity() ? d : p.k;
    ld = padded(k);
    words = (k + 31) / 32;
    columns = p.identity() ? kIdentityColumns : std::max<int64_t>(k, 1);
    factor = signs() ? 1 / std::sqrt(static_cast<double>(k)) : 1;
    if (hot()) check_ids();
  }

  bool hot() const { return rows.dim() == 1; }
  bool signs() const { return !p.matrix && p.seed >= 0; }
  uint64_t seed() const { return static_cast<uint64_t>(p.seed); }

  void check_ids() {
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && !p.identity(),
                    "grad_project: a one-dimensional g must be int64 and needs a p_out");
    rows = torch::stable::contiguous(rows);
    const int64_t* id = rows.const_data_ptr<int64_t>();
    const int64_t end = p.matrix ? p.matrix->size(1) : int64_t{1} << 32;
    for (int64_t t = 0; t < n; ++t)
      STD_TORCH_CHECK(id[t] >= 0 && id[t] < end, "grad_project: g must be in [0, ", end, "), got ",
                      id[t], " at ", t);
  }

  // What every chunk needs of the projection: the matrix in tiles, or the bits of the seed.
  void prepare() {
    if (hot() || p.identity()) return;
    const int64_t step = depth(k), blocks = (d + step - 1) / step;
    uint32_t* bits = signs() ? word.of(d * words) : nullptr;
    T* to = signs() ? nullptr : tiles.of(d * ld);
    torch::stable::parallel_for(0, blocks, 4, [&](int64_t lo, int64_t hi) {
      const int64_t c = lo * step, cols = std::min(hi * step, d) - c;
      if (signs()) {
        U2A_SIMD(sign_words(seed(), stream, nullptr, c, cols, words, bits + c * words));
        return;
      }
      const Strided m = strided(*p.matrix);
      for (int64_t i = c; i < c + cols; i += step)
        U2A_SIMD(load_tile(m, k, i, std::min(step, d - i), to + i * ld));
    });
  }

  // The projected values of a chunk, [tokens][ld] in scratch.
  void project(int64_t t0, int64_t tokens, Scratch<T>& s) const {
    if (p.identity()) return;
    T* y = s.projected.of(kChunk * ld);
    if (hot()) return look_up(t0, tokens, y, s);
    if (d == 0) std::fill(y, y + tokens * ld, T(0));
    for (int64_t t = 0; t < tokens; t += strip())
      project_strip(t0 + t, std::min(strip(), tokens - t), y + t * ld, s);
  }

  // Tokens that pass all columns before the next do. Few, so that the rows of x are read along (no
  // hardware prefetch and a TLB miss a row otherwise), but enough to make signs or fetch tiles for.
  int64_t strip() const {
    return !signs() && d * ld * static_cast<int64_t>(sizeof(T)) <= kNear ? 16 : 64;
  }

  void project_strip(int64_t t0, int64_t tokens, T* y, Scratch<T>& s) const {
    const Strided m = strided(rows);
    const int64_t step = depth(k);
    for (int64_t c = 0; c < d; c += step) {
      const int64_t cols = std::min(step, d - c);
      const T* tile = tiles.get() + c * ld;
      if (signs()) {
        T* made = s.tile.of(step * ld);
        U2A_SIMD(sign_tile(word.get() + c * words, k, cols, made));
        tile = made;
      }
      U2A_SIMD(project_tokens(m, t0, tokens, c, cols, tile, k, c > 0, y));
    }
  }

  // One-hot rows: columns of the projection.
  void look_up(int64_t t0, int64_t tokens, T* y, Scratch<T>& s) const {
    const int64_t* id = rows.const_data_ptr<int64_t>() + t0;
    if (p.matrix) {
      const Strided m = strided(transposed(*p.matrix));
      for (int64_t t = 0; t < tokens; ++t) U2A_SIMD(load_rows(m, id[t], 1, 0, k, y + t * ld, ld));
      return;
    }
    uint32_t* w = s.word.of(kChunk * words);
    U2A_SIMD(sign_words(seed(), stream, id, 0, tokens, words, w));
    for (int64_t t = 0; t < tokens; ++t, w += words, y += ld)
      for (int64_t j = 0; j < ld; ++j)
        y[j] = j < k ? static_cast<T>(1 - 2 * static_cast<int>(w[j / 32] >> (j & 31) & 1)) : T(0);
  }

  // Of the identity, the values where they lie when no padding or conversion is needed.
  Block<T> block(int64_t t0, int64_t tokens, int64_t first, Scratch<T>& s) const {
    if (!p.identity()) return {s.projected.get(), ld, 0, k};
    const int64_t count = std::min(columns, k - first), wide = padded(count);
    const Strided m = strided(rows);
    if (m.type == (sizeof(T) == 8 ? Element::f64 : Element::f32) && m.column == 1 && count == wide)
      return {static_cast<const T*>(m.data) + t0 * m.row + first, m.row, first, count};
    T* to = s.columns.of(kChunk * wide);
    U2A_SIMD(load_rows(m, t0, tokens, first, count, to, wide));
    return {to, wide, first, count};
  }
};

}  // namespace
}  // namespace u2a
