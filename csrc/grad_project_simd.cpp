// Loading, widening and tiling of what grad_project multiplies; the products are in
// grad_project_block.h.
#include "grad_project_simd.h"

#include <type_traits>

#include "grad_project_block.h"

namespace {

using u2a::Element;
using u2a::kDepth;
using u2a::kPad;
using u2a::kPanel;
using u2a::Strided;

inline float widen_bf16(uint16_t h) { return __builtin_bit_cast(float, uint32_t{h} << 16); }

inline float widen_f16(uint16_t h) {
  const uint32_t low = (h & 0x7fffu) << 13, sign = (h & 0x8000u) << 16;
  const float tiny = static_cast<float>(h & 0x3ff) * 0x1p-24f;
  const uint32_t small = __builtin_bit_cast(uint32_t, tiny);
  const uint32_t normal = low + (112u << 23), special = low | 0x7f800000u;
  const uint32_t exponent = h & 0x7c00u;
  const uint32_t bits = exponent == 0 ? small : exponent == 0x7c00u ? special : normal;
  return __builtin_bit_cast(float, bits | sign);
}

template <typename T, typename From, typename F>
inline void copy_row(const From* from, int64_t stride, int64_t n, T* to, int64_t step, F widen) {
  if (stride == 1 && step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(widen(from[i]));
  else
    for (int64_t i = 0; i < n; ++i) to[i * step] = static_cast<T>(widen(from[i * stride]));
}

// n entries of row r from column c on, to every step-th place.
template <typename T>
inline void load_row(const Strided& m, int64_t r, int64_t c, int64_t n, T* to, int64_t step) {
  const int64_t at = r * m.row + c * m.column, s = m.column;
  switch (m.type) {
    case Element::f32:
      return copy_row(static_cast<const float*>(m.data) + at, s, n, to, step,
                      [](float v) { return v; });
    case Element::f64:
      return copy_row(static_cast<const double*>(m.data) + at, s, n, to, step,
                      [](double v) { return v; });
    case Element::bf16:
      return copy_row(static_cast<const uint16_t*>(m.data) + at, s, n, to, step, widen_bf16);
    case Element::f16:
      return copy_row(static_cast<const uint16_t*>(m.data) + at, s, n, to, step, widen_f16);
  }
}

template <typename T>
constexpr Element element() {
  return sizeof(T) == 8 ? Element::f64 : Element::f32;
}

template <typename T>
void rows_of(const Strided& m, int64_t r0, int64_t rows, int64_t c0, int64_t cols, T* to,
             int64_t ld) {
  for (int64_t r = 0; r < rows; ++r, to += ld) {
    load_row(m, r0 + r, c0, cols, to, 1);
    for (int64_t c = cols; c < ld; ++c) to[c] = 0;
  }
}

// Panels of kPanel columns, [cols][kPanel] each; the last one may be kPad wide.
inline int64_t width_of(int64_t j, int64_t ld) { return ld - j < kPanel ? ld - j : kPanel; }

template <typename T>
void tile_of(const Strided& p, int64_t k, int64_t c0, int64_t cols, T* tile) {
  const int64_t ld = u2a::padded(k);
  for (int64_t j = 0; j < ld; ++j) {
    const int64_t first = j / kPanel * kPanel, width = width_of(first, ld);
    T* to = tile + first * cols + (j - first);
    if (j < k)
      load_row(p, j, c0, cols, to, width);
    else
      for (int64_t c = 0; c < cols; ++c) to[c * width] = 0;
  }
}

// 1 with its sign bit from bits 0 to kPad - 1.
template <typename T>
inline void pad_signs(uint32_t bits, T* to) {
  using S = Simd<T>;
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Word W __attribute__((vector_size(kBytes)));
  constexpr int top = 8 * sizeof(T) - 1;
  W lane;
  for (int l = 0; l < S::lanes; ++l) lane[l] = l;
  const W one = reinterpret_cast<W>(typename S::V{} + T(1)), sign = (Word{1} << top) - W{};
  for (int i = 0; i < kPad; i += S::lanes) {
    const W word = ((Word{bits} >> i) - W{}) << (top - lane);
    *reinterpret_cast<typename S::U*>(to + i) =
        reinterpret_cast<typename S::V>((word & sign) | one);
  }
}

template <typename T>
void signs_of(const uint32_t* word, int64_t k, int64_t cols, T* tile) {
  const int64_t ld = u2a::padded(k), words = (k + 31) / 32;
  for (int64_t j0 = 0; j0 < ld; j0 += kPanel) {
    const int64_t width = width_of(j0, ld);
    for (int64_t c = 0; c < cols; ++c, tile += width) {
      const uint32_t bits = word[c * words + j0 / 32];
      for (int64_t j = 0; j < width; j += kPad) pad_signs(bits >> j, tile + j);
    }
  }
}

// The hardware prefetcher does not follow short pieces of long rows.
template <typename T>
inline void prefetch_rows(const T* a, int64_t am, int64_t cols) {
  for (int m = 0; m < kRows; ++m)
    for (int64_t c = 0; c < cols; c += 64 / sizeof(T)) __builtin_prefetch(a + m * am + c);
}

// y (+)= a tile; rows of a at stride am, their number a multiple of kRows.
template <typename T>
void project_rows(const T* a, int64_t am, int64_t tokens, int64_t cols, const T* tile, int64_t ld,
                  bool add, T* y) {
  const bool far = ld > kPad && am * static_cast<int64_t>(sizeof(T)) >= 8192;
  for (int64_t j = 0; j < ld; j += kPanel)
    for (int64_t t = 0; t < tokens; t += kRows) {
      if (far && j == 0 && t + kRows < tokens) prefetch_rows(a + (t + kRows) * am, am, cols);
      panel(a + t * am, am, 1, tile + j * cols, width_of(j, ld), cols, kRows, width_of(j, ld), T(1),
            add, y + t * ld + j, ld);
    }
}

template <typename T>
void project(const Strided& x, int64_t t0, int64_t tokens, int64_t c0, int64_t cols, const T* tile,
             int64_t k, bool add, T* y) {
  const int64_t ld = u2a::padded(k);
  const bool direct = x.type == element<T>() && x.column == 1;
  const int64_t whole = direct ? tokens / kRows * kRows : 0;
  if (whole)
    project_rows(static_cast<const T*>(x.data) + t0 * x.row + c0, x.row, whole, cols, tile, ld, add,
                 y);
  T stage[kPad * kDepth];
  for (int64_t t = whole; t < tokens; t += kPad) {
    const int64_t rows = tokens - t < kPad ? tokens - t : kPad;
    rows_of(x, t0 + t, rows, c0, cols, stage, cols);
    for (int64_t i = rows * cols; i < kPad * cols; ++i) stage[i] = 0;
    project_rows(stage, cols, (rows + kRows - 1) / kRows * kRows, cols, tile, ld, add, y + t * ld);
  }
}

template <typename T>
void contract(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t tokens, int64_t rows,
              int64_t cols, T scale, bool add, T* out, int64_t ldo) {
  for (int64_t o = 0; o < rows; o += kRows)
    panel(a + o, 1, lda, b, ldb, tokens, rows - o < kRows ? rows - o : kRows, cols, scale, add,
          out + o * ldo, ldo);
}

constexpr int kWide = 16;

// Philox4x32-10 on kWide counters at once; c[w] becomes word w.
inline void philox(uint32_t (&c)[4][kWide], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kWide; ++i) {
      const uint64_t p = uint64_t{0xD2511F53u} * c[0][i], q = uint64_t{0xCD9E8D57u} * c[2][i];
      c[0][i] = static_cast<uint32_t>(q >> 32) ^ c[1][i] ^ k0;
      c[2][i] = static_cast<uint32_t>(p >> 32) ^ c[3][i] ^ k1;
      c[1][i] = static_cast<uint32_t>(q);
      c[3][i] = static_cast<uint32_t>(p);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace

namespace u2a::U2A_ISA {

void sign_words(uint64_t seed, uint32_t stream, const int64_t* ids, int64_t first, int64_t n,
                int64_t words, uint32_t* word) {
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t m = n - i < kWide ? n - i : kWide;
    for (int64_t w = 0; w < words; w += 4) {
      uint32_t c[4][kWide];
      for (int l = 0; l < kWide; ++l) {
        c[0][l] = static_cast<uint32_t>(ids ? ids[l < m ? i + l : i] : first + i + l);
        c[1][l] = static_cast<uint32_t>(w / 4);
        c[2][l] = stream;
        c[3][l] = 0x55324153u;
      }
      philox(c, seed);
      for (int64_t l = 0; l < m; ++l)
        for (int64_t v = w; v < words && v < w + 4; ++v) word[(i + l) * words + v] = c[v - w][l];
    }
  }
}

#define U2A_DEFINE(T)                                                                         \
  void load_rows(const Strided& m, int64_t r0, int64_t rows, int64_t c0, int64_t cols, T* to, \
                 int64_t ld) {                                                                \
    rows_of(m, r0, rows, c0, cols, to, ld);                                                   \
  }                                                                                           \
  void load_tile(const Strided& p, int64_t k, int64_t c0, int64_t cols, T* tile) {            \
    tile_of(p, k, c0, cols, tile);                                                            \
  }                                                                                           \
  void sign_tile(const uint32_t* word, int64_t k, int64_t cols, T* tile) {                    \
    signs_of(word, k, cols, tile);                                                            \
  }                                                                                           \
  void project_tokens(const Strided& x, int64_t t0, int64_t tokens, int64_t c0, int64_t cols, \
                      const T* tile, int64_t k, bool add, T* y) {                             \
    project(x, t0, tokens, c0, cols, tile, k, add, y);                                        \
  }                                                                                           \
  void contract_tokens(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t tokens,      \
                       int64_t rows, int64_t cols, T scale, bool add, T* out, int64_t ldo) {  \
    contract(a, lda, b, ldb, tokens, rows, cols, scale, add, out, ldo);                       \
  }
U2A_DEFINE(float)
U2A_DEFINE(double)

}  // namespace u2a::U2A_ISA
