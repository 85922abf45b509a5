#pragma once
#include <cstdint>

#include "isa.h"

namespace u2a {

// A matrix where it lies: any strides, counted in elements.
enum class Element { f32, f64, bf16, f16 };
struct Strided {
  const void* data;
  Element type;
  int64_t row, column;
};

// k is padded to kPad columns in a tile and in y, tokens to a multiple of 8 rows in y. A tile holds
// depth(k) rows c of P^T in panels of kPanel columns: 32 KB of float in the first-level cache.
constexpr int64_t kPad = 16, kPanel = 32, kDepth = 512;
inline int64_t depth(int64_t k) { return k <= kPad ? kDepth : kDepth / 2; }
inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

}  // namespace u2a

#define U2A_DECLARE_PROJECT(T)                                                                     \
  /* to[r][c] = m[r0 + r, c0 + c], [rows, cols] in rows of ld; zero up to column ld. */            \
  U2A_DECLARE_SIMD(void load_rows(const Strided& m, int64_t r0, int64_t rows, int64_t c0,          \
                                  int64_t cols, T* to, int64_t ld))                                \
  /* tile(c, j) = p[j, c0 + c] for the k rows j of p. */                                           \
  U2A_DECLARE_SIMD(void load_tile(const Strided& p, int64_t k, int64_t c0, int64_t cols, T* tile)) \
  /* The same for P = 1 - 2 bit, bit j & 31 of word[c][j >> 5]. */                                 \
  U2A_DECLARE_SIMD(void sign_tile(const uint32_t* word, int64_t k, int64_t cols, T* tile))         \
  /* y[t][j] (+)= sum_c x[t0 + t, c0 + c] tile(c, j), cols <= depth(k); y padded both ways. */     \
  U2A_DECLARE_SIMD(void project_tokens(const Strided& x, int64_t t0, int64_t tokens, int64_t c0,   \
                                       int64_t cols, const T* tile, int64_t k, bool add, T* y))    \
  /* out[o][i] (+)= scale sum_t a[t][o] b[t][i], o < rows, i < cols; a and b padded. */            \
  U2A_DECLARE_SIMD(void contract_tokens(const T* a, int64_t lda, const T* b, int64_t ldb,          \
                                        int64_t tokens, int64_t rows, int64_t cols, T scale,       \
                                        bool add, T* out, int64_t ldo))
U2A_DECLARE_PROJECT(float)
U2A_DECLARE_PROJECT(double)

// Words of Philox4x32-10 for n coordinates: bits 32 w to 32 w + 31 of coordinate i in
// word[i * words + w]. Coordinates are first + i, or ids[i] when ids is not null.
U2A_DECLARE_SIMD(void sign_words(uint64_t seed, uint32_t stream, const int64_t* ids, int64_t first,
                                 int64_t n, int64_t words, uint32_t* word))
