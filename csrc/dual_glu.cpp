// dual_glu on the CPU: pieces of rows, shared by threads; 16-bit floats are widened block by block.
// Rows are read where they lie; rows that are all dense become one.
#include <iterator>
#include <optional>
#include <string>
#include <tuple>

#include "dual_glu_simd.h"
#include "row_types.h"

namespace {

using namespace u2a;
constexpr int64_t kColumns = 4096;  // of a task

Activation activation_of(const std::string& name) {
  static const char* const kNames[] = {"silu",  "gelu",    "gelu_tanh", "quick_gelu", "relu",
                                       "relu2", "sigmoid", "tanh",      "identity"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  STD_TORCH_CHECK(found != std::end(kNames), "dual_glu: unknown activation ", name);
  return static_cast<Activation>(found - kNames);
}

// Rows [2M, width]: element j of row i is at data + i stride + j step.
template <typename S>
struct Rows {
  S* data = nullptr;
  int64_t stride = 0, step = 1;

  DualPiece<S> piece(int64_t row, int64_t column, int64_t half) const {
    if (data == nullptr) return {nullptr, nullptr, 1};
    S* at = data + row * stride + column * step;
    return {at, at + half * stride, step};
  }
};

// Do the leading dimensions walk with one stride, and the last one with 1 or 0?
bool has_row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1 && t.stride(last) != 0) return false;
  int64_t next = -1;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (next >= 0 && t.stride(i) != next) return false;
    next = t.stride(i) * t.size(i);
  }
  return true;
}

int64_t row_stride(const Tensor& t) {
  for (int64_t i = t.dim() - 2; i >= 0; --i)
    if (t.size(i) != 1) return t.stride(i);
  return t.size(t.dim() - 1);
}

// A tensor whose rows can be addressed: itself, or its copy.
Tensor addressable(const Tensor& t) { return has_row_stride(t) ? t : torch::stable::contiguous(t); }

template <typename S>
Rows<const S> read(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {static_cast<const S*>(t.const_data_ptr()), row_stride(t),
          t.size(last) > 1 ? t.stride(last) : 1};
}

template <typename S>
Rows<S> written(Tensor& t) {
  return {static_cast<S*>(t.mutable_data_ptr()), t.size(t.dim() - 1), 1};
}

template <typename S>
Rows<S> beside(Rows<S> r, int64_t columns) {
  return {r.data + columns * r.step, r.stride, r.step};
}

// each(row, column, n) over all pieces of [m, width], in threads.
template <typename F>
void over_pieces(int64_t m, int64_t width, F each) {
  const int64_t pieces = (width + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 2 * kColumns / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, m * pieces, grain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t column = i % pieces * kColumns;
      each(i / pieces, column, std::min(kColumns, width - column));
    }
  });
}

// How many rows, of how many columns: one long row where all are dense.
struct Extent {
  int64_t m, width;

  template <typename... R>
  void join(R&... rows) {
    const bool dense = ((rows.data == nullptr || (rows.stride == width && rows.step == 1)) && ...);
    if (!dense) return;
    ((rows.stride = m * width), ...);
    width *= m;
    m = 1;
  }
};

Extent extent_of(const Tensor& y) {
  const int64_t width = y.size(y.dim() - 1);
  return {width ? y.numel() / width / 2 : 0, width};
}

std::vector<int64_t> sizes_with(const Tensor& t, int64_t width) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) shape.push_back(t.size(i));
  shape.push_back(width);
  return shape;
}

Tensor like(const Tensor& t) {
  return new_tensor(t, sizes_with(t, t.size(t.dim() - 1)), t.scalar_type());
}

Tensor dual_glu(Tensor gate, std::optional<Tensor> up, std::string activation, bool gated) {
  const Activation f = activation_of(activation);
  const bool packed = gated && !up;
  const int64_t columns = gate.size(gate.dim() - 1);
  Tensor y = new_tensor(gate, sizes_with(gate, packed ? columns / 2 : columns), gate.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor a = addressable(gate), b = up ? addressable(*up) : a;
  by_row_type(gate, [&](auto type) {
    using S = decltype(type);
    Extent e = extent_of(y);
    Rows<const S> ra = read<S>(a), rb;
    if (gated) rb = packed ? beside(ra, e.width) : read<S>(b);
    Rows<S> ry = written<S>(y);
    e.join(ra, rb, ry);
    over_pieces(e.m, e.width, [&](int64_t row, int64_t j, int64_t n) {
      U2A_SIMD(
          glu_forward(f, ra.piece(row, j, e.m), rb.piece(row, j, e.m), ry.piece(row, j, e.m), n));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> dual_glu_bwd(Tensor grad, Tensor gate, std::optional<Tensor> up,
                                        std::string activation, bool gated) {
  const Activation f = activation_of(activation);
  const bool packed = gated && !up;
  Tensor d_gate = like(gate);
  Tensor d_up = up ? like(*up) : new_tensor(gate, {0}, gate.scalar_type());
  if (grad.numel() == 0) return {d_gate, d_up};
  const Tensor g = addressable(grad), a = addressable(gate), b = up ? addressable(*up) : a;
  by_row_type(gate, [&](auto type) {
    using S = decltype(type);
    Extent e = extent_of(grad);
    Rows<const S> rg = read<S>(g), ra = read<S>(a), rb;
    Rows<S> da = written<S>(d_gate), db;
    if (gated) {
      rb = packed ? beside(ra, e.width) : read<S>(b);
      db = packed ? beside(da, e.width) : written<S>(d_up);
    }
    e.join(rg, ra, rb, da, db);
    over_pieces(e.m, e.width, [&](int64_t row, int64_t j, int64_t n) {
      U2A_SIMD(glu_backward(f, rg.piece(row, j, e.m), ra.piece(row, j, e.m), rb.piece(row, j, e.m),
                            da.piece(row, j, e.m), db.piece(row, j, e.m), n));
    });
  });
  return {d_gate, d_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) {
  m.impl("dual_glu", TORCH_BOX(&dual_glu));
  m.impl("dual_glu_bwd", TORCH_BOX(&dual_glu_bwd));
}
