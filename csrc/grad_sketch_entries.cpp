// Sketches of a formed gradient and of one-hot gradients on the CPU. Blocks of the gradient by
// GEMM, as large as a cache; their entries into hashed buckets (sjlt), or a GEMM with a block of
// hashed signs (rademacher). A one-hot row of the gradient needs no GEMM: it is a row of x. The
// same bits on every instruction set; the GEMMs' bits are torch's.
#include "common.h"
#include "grad_sketch_entries_simd.h"
#include "grad_sketch_table.h"

namespace {

using namespace u2a;
constexpr int64_t kTile = int64_t{1} << 18;  // elements of a formed block
constexpr int64_t kEntriesAtOnce = 2048;     // rows of a block of signs
constexpr int64_t kFeaturesAtOnce = 256;     // its columns
enum Kind : int64_t { kTensorSketch = 0, kSjlt = 1, kRademacher = 2 };

struct Problem {
  Tensor x;  // [N, d_in] contiguous
  const std::vector<int64_t>& seg;
  int64_t k;
  uint64_t seed;
  int64_t b() const { return static_cast<int64_t>(seg.size()) - 1; }
  int64_t tokens(int64_t e) const { return seg[e + 1] - seg[e]; }
};

template <typename T>
void multiply(T* p, int64_t n, T factor) {
  for (int64_t i = 0; i < n; ++i) p[i] *= factor;
}

// A block of entries: rows with labels, columns from i0.
struct Block {
  const int64_t* label;
  int64_t rows, i0, columns;
};

// out [B', k] += values [B', rows * columns] @ signs of the block's entries, in slices of k.
template <typename T>
void add_signed_entries(Tensor& out, const Tensor& values, const Block& block, Tensor& signs,
                        const Problem& p) {
  const int64_t width = std::min(p.k, kFeaturesAtOnce), entries = block.rows * block.columns;
  T* sign = signs.mutable_data_ptr<T>();
  Tensor used = torch::stable::view(rows(signs, 0, entries * width), {entries, width});
  for (int64_t j0 = 0; j0 < p.k; j0 += width) {
    torch::stable::parallel_for(0, block.rows, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; ++r)
        U2A_SIMD(entry_signs(p.seed, static_cast<uint32_t>(block.label[r]),
                             static_cast<uint32_t>(block.i0), block.columns, j0, width,
                             sign + r * block.columns * width));
    });
    Tensor part = torch::stable::narrow(out, 1, j0, width);
    addmm_(part, values, used);
  }
}

Tensor sign_space(const Problem& p) {
  return new_tensor(p.x, {kEntriesAtOnce * std::min(p.k, kFeaturesAtOnce)}, p.x.scalar_type());
}

template <typename T>
void dense_of_formed(const Problem& p, const Tensor& g, Tensor& out) {
  const int64_t d_in = p.x.size(1), d_out = g.size(1), b = p.b();
  const int64_t columns = std::min(d_in, kEntriesAtOnce), height = kEntriesAtOnce / columns;
  Tensor signs = sign_space(p);
  Tensor space = new_tensor(p.x, {b * kEntriesAtOnce}, p.x.scalar_type());
  std::vector<int64_t> label(d_out);
  for (int64_t o = 0; o < d_out; ++o) label[o] = o;
  for (int64_t o0 = 0; o0 < d_out; o0 += height)
    for (int64_t i0 = 0; i0 < d_in; i0 += columns) {
      const int64_t m = std::min(height, d_out - o0), c = std::min(columns, d_in - i0);
      Tensor flat = rows(space, 0, b * m * c);
      Tensor tiles = torch::stable::view(flat, {b * m, c});
      for (int64_t e = 0; e < b; ++e) {
        Tensor x_e = rows(p.x, p.seg[e], p.tokens(e)), g_e = rows(g, p.seg[e], p.tokens(e));
        Tensor tile = rows(tiles, e * m, m);
        mm_out(tile, transposed(torch::stable::narrow(g_e, 1, o0, m)),
               torch::stable::narrow(x_e, 1, i0, c));
      }
      add_signed_entries<T>(out, torch::stable::view(flat, {b, m * c}),
                            {label.data() + o0, m, i0, c}, signs, p);
    }
}

template <typename T>
void dense_of_rows(const Problem& p, const int64_t* label, Tensor& out) {
  const int64_t d_in = p.x.size(1);
  const T* x = p.x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, p.b(), 1, [&](int64_t lo, int64_t hi) {
    for (int64_t e = lo; e < hi; ++e)
      for (int64_t t = p.seg[e]; t < p.seg[e + 1]; ++t)
        U2A_SIMD(add_signed_row(x + t * d_in, d_in, p.seed, static_cast<uint32_t>(label[t]), p.k,
                                to + e * p.k));
  });
}

template <typename T>
void sparse_of_formed(const Problem& p, const Tensor& g, Tensor& out) {
  const int64_t d_in = p.x.size(1), d_out = g.size(1);
  const int64_t height = std::min(d_out, std::max<int64_t>(1, kTile / d_in));
  std::vector<uint32_t> word(height * d_in);
  T* to = out.mutable_data_ptr<T>();
  for (int64_t o0 = 0; o0 < d_out; o0 += height) {
    const int64_t m = std::min(height, d_out - o0);
    torch::stable::parallel_for(0, m, 16, [&](int64_t lo, int64_t hi) {
      for (int64_t r = lo; r < hi; ++r)
        U2A_SIMD(entry_words(p.seed, static_cast<uint32_t>(o0 + r), 0, d_in, &word[r * d_in]));
    });
    torch::stable::parallel_for(0, p.b(), 1, [&](int64_t lo, int64_t hi) {
      Tensor tile = new_tensor(p.x, {m, d_in}, p.x.scalar_type());
      for (int64_t e = lo; e < hi; ++e) {
        if (p.tokens(e) == 0) continue;
        Tensor g_e = rows(g, p.seg[e], p.tokens(e));
        mm_out(tile, transposed(torch::stable::narrow(g_e, 1, o0, m)),
               rows(p.x, p.seg[e], p.tokens(e)));
        U2A_SIMD(scatter_entries(tile.const_data_ptr<T>(), m * d_in, word.data(), 0,
                                 static_cast<uint32_t>(p.k - 1), to + e * p.k));
      }
    });
  }
}

template <typename T>
void sparse_of_rows(const Problem& p, const int64_t* label, Tensor& out) {
  const int64_t d_in = p.x.size(1);
  const T* x = p.x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, p.b(), 1, [&](int64_t lo, int64_t hi) {
    std::vector<uint32_t> word(d_in);
    for (int64_t e = lo; e < hi; ++e)
      for (int64_t t = p.seg[e]; t < p.seg[e + 1]; ++t) {
        U2A_SIMD(entry_words(p.seed, static_cast<uint32_t>(label[t]), 0, d_in, word.data()));
        U2A_SIMD(scatter_entries(x + t * d_in, d_in, word.data(), 0, static_cast<uint32_t>(p.k - 1),
                                 to + e * p.k));
      }
  });
}

// The XOR of two hashes needs no table of rows: one transform per example, of any number of tokens.
template <typename T>
void tensorsketch_of_rows(const Problem& p, const int64_t* label, Tensor& out) {
  const int64_t d_in = p.x.size(1);
  const std::vector<uint32_t> word = sketch_words(p.seed, kInputs, d_in);
  const SketchRows<T> patterns = sketch_patterns<T>();
  const T* x = p.x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, p.b(), 1, [&](int64_t lo, int64_t hi) {
    SketchRows<T> z(std::max<int64_t>(1, p.k / kLanes<T>));
    for (int64_t e = lo; e < hi; ++e) {
      z.clear();
      for (int64_t t = p.seg[e]; t < p.seg[e + 1]; ++t)
        U2A_SIMD(scatter_entries(x + t * d_in, d_in, word.data(),
                                 sketch_hash(p.seed, kOutputs, label[t]),
                                 static_cast<uint32_t>(p.k - 1), z.data()));
      finish_sketch(z, patterns, p.k, to + e * p.k);
    }
  });
}

void check(const char* op, const Tensor& x, const Tensor& g, int64_t k) {
  STD_TORCH_CHECK(x.size(0) == g.size(0), op, ": x and g must have the same N rows, got ",
                  x.size(0), " and ", g.size(0));
  STD_TORCH_CHECK(k >= 2 && k <= 65536 && (k & (k - 1)) == 0, op,
                  ": k must be a power of two from 2 to 65536, got ", k);
}

template <typename T>
Tensor entries(const Problem& p, const Tensor& g, bool dense) {
  Tensor out = new_tensor(p.x, {p.b(), p.k}, p.x.scalar_type());
  torch::stable::zero_(out);
  if (p.x.numel() == 0 || g.numel() == 0) return out;
  if (!dense) {
    sparse_of_formed<T>(p, g, out);
    return out;
  }
  dense_of_formed<T>(p, g, out);
  multiply(out.mutable_data_ptr<T>(), out.numel(), static_cast<T>(1 / std::sqrt(double(p.k))));
  return out;
}

template <typename T>
Tensor one_hot(const Problem& p, const int64_t* label, int64_t kind) {
  Tensor out = new_tensor(p.x, {p.b(), p.k}, p.x.scalar_type());
  torch::stable::zero_(out);
  if (p.x.numel() == 0) return out;
  if (kind == kSjlt) sparse_of_rows<T>(p, label, out);
  if (kind == kTensorSketch) tensorsketch_of_rows<T>(p, label, out);
  if (kind == kRademacher) {
    dense_of_rows<T>(p, label, out);
    multiply(out.mutable_data_ptr<T>(), out.numel(), static_cast<T>(1 / std::sqrt(double(p.k))));
  }
  return out;
}

Tensor grad_sketch_entries(Tensor x, Tensor g, Tensor offsets, int64_t k, int64_t seed,
                           bool dense) {
  check("grad_sketch_entries", x, g, k);
  const ScalarType type = compute_type(x);
  const std::vector<int64_t> seg = host_offsets("grad_sketch_entries", offsets, x.size(0));
  const Problem p{prepared(x, type), seg, k, static_cast<uint64_t>(seed)};
  const Tensor gc = prepared(g, type);
  return is_double(x) ? entries<double>(p, gc, dense) : entries<float>(p, gc, dense);
}

Tensor grad_sketch_rows(Tensor x, Tensor g, Tensor offsets, int64_t k, int64_t seed, int64_t kind) {
  check("grad_sketch_rows", x, g, k);
  STD_TORCH_CHECK(kind >= kTensorSketch && kind <= kRademacher,
                  "grad_sketch_rows: kind must be 0, 1 or 2, got ", kind);
  const ScalarType type = compute_type(x);
  const std::vector<int64_t> seg = host_offsets("grad_sketch_rows", offsets, x.size(0));
  const Problem p{prepared(x, type), seg, k, static_cast<uint64_t>(seed)};
  const Tensor label = prepared(g, ScalarType::Long);
  const int64_t* rows = label.const_data_ptr<int64_t>();
  return is_double(x) ? one_hot<double>(p, rows, kind) : one_hot<float>(p, rows, kind);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("grad_sketch_entries", TORCH_BOX(&grad_sketch_entries));
  m.impl("grad_sketch_rows", TORCH_BOX(&grad_sketch_rows));
}
