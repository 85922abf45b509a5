// The gradients of many examples, some rows and columns at a time: what grad_gram and grad_dot
// multiply with GEMM.
#pragma once
#include "gemm.h"

namespace u2a {

template <typename T>
struct Tokens {  // of one set of examples, in the computing type
  const T *x, *g;
  int64_t d_in, d_out;
  const std::vector<int64_t>& seg;

  int64_t examples() const { return static_cast<int64_t>(seg.size()) - 1; }
  Matrix<const T> inputs(int64_t t, int64_t n) const { return {x + t * d_in, n, d_in, d_in}; }
  Matrix<const T> outputs(int64_t t, int64_t n) const { return {g + t * d_out, n, d_out, d_out}; }
};

struct Block {  // rows o.. and columns i.. of a gradient
  int64_t o, rows, i, cols;
  int64_t size() const { return rows * cols; }
};

// Blocks of all d_out x d_in entries, at most `elements` each but never under 16 columns; columns
// are cut only where a whole row would not fit.
template <typename F>
void for_each_block(int64_t d_out, int64_t d_in, int64_t elements, F each) {
  const int64_t cols = std::min(d_in, std::max<int64_t>(16, elements));
  const int64_t rows = std::min(d_out, std::max<int64_t>(1, elements / cols));
  for (int64_t o = 0; o < d_out; o += rows)
    for (int64_t i = 0; i < d_in; i += cols)
      each(Block{o, std::min(rows, d_out - o), i, std::min(cols, d_in - i)});
}

// out[e] = G_e at the block, row-major, one after the other; threads share the examples.
template <typename T>
void form_block(const Tokens<T>& t, const Block& k, T* out) {
  torch::stable::parallel_for(0, t.examples(), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t e = lo; e < hi; ++e) {
      const int64_t start = t.seg[e], n = t.seg[e + 1] - start;
      T* to = out + e * k.size();
      if (n == 0) {
        std::fill(to, to + k.size(), T(0));
        continue;
      }
      const Matrix<const T> g(t.g + start * t.d_out + k.o, n, k.rows, t.d_out);
      const Matrix<const T> x(t.x + start * t.d_in + k.i, n, k.cols, t.d_in);
      gemm<T>({to, k.rows, k.cols, k.cols}, g.transposed(), x);
    }
  });
}

}  // namespace u2a
