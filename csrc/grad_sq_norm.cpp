// grad_sq_norm on the CPU. Up to `ghost_tokens` tokens an example is the sum over pairs of its
// tokens: short ones in own loops, longer ones as GEMM strips on and below the diagonal. Beyond it
// G_b is formed, some rows at a time. Threads share strips and rows; partial sums add up in order.
#include "gemm.h"
#include "grad_sq_norm_simd.h"

namespace {

using namespace u2a;
// Own loops have half of GEMM's rate and half of its products: for examples that stay in cache.
constexpr int64_t kLoopTokens = 160, kLoopElements = 1 << 19;
constexpr int64_t kStrip = 128, kStripCols = 512, kFormed = 1 << 18;

struct Task {
  int64_t example, begin, end;  // rows of its tokens, or of its gradient
  enum { loops, strip, formed } form;
};

template <typename T>
struct Problem {
  const T *x, *g;
  int64_t d_in, d_out;
  const std::vector<int64_t>& seg;

  int64_t formed_rows() const { return std::max<int64_t>(16, kFormed / d_in); }
  int64_t scratch_elements() const {
    return std::max(2 * kStrip * kStripCols, std::min(d_out, formed_rows()) * d_in);
  }
  Matrix<const T> inputs(int64_t t, int64_t n) const { return {x + t * d_in, n, d_in, d_in}; }
  Matrix<const T> outputs(int64_t t, int64_t n) const { return {g + t * d_out, n, d_out, d_out}; }

  double loops(const Task& k) const {
    double sum = 0;
    const int64_t start = seg[k.example], n = seg[k.example + 1] - start;
    U2A_SIMD(pair_norm(x + start * d_in, g + start * d_out, n, d_in, d_out, &sum));
    return sum;
  }

  // Tokens begin..end against all up to end: twice what lies left of the diagonal block.
  double strip(const Task& k, T* p) const {
    T* q = p + kStrip * kStripCols;
    const int64_t start = seg[k.example], m = k.end - k.begin;
    double sum = 0;
    for (int64_t c = 0; c < k.end; c += kStripCols) {
      const int64_t n = std::min(kStripCols, k.end - c);
      const int64_t left = std::max<int64_t>(0, std::min(n, k.begin - c));
      gemm<T>({p, m, n, n}, inputs(start + k.begin, m), inputs(start + c, n).transposed());
      gemm<T>({q, m, n, n}, outputs(start + k.begin, m), outputs(start + c, n).transposed());
      double twice = 0, once = 0;
      U2A_SIMD(block_dot(p, q, m, left, n, &twice));
      U2A_SIMD(block_dot(p + left, q + left, m, n - left, n, &once));
      sum += 2 * twice + once;
    }
    return sum;
  }

  double formed(const Task& k, T* p) const {
    const int64_t start = seg[k.example], n = seg[k.example + 1] - start, m = k.end - k.begin;
    const Matrix<const T> rows(g + start * d_out + k.begin, n, m, d_out);
    gemm<T>({p, m, d_in, d_in}, rows.transposed(), inputs(start, n));
    double sum = 0;
    U2A_SIMD(square_sum(p, m * d_in, &sum));
    return sum;
  }
};

template <typename T>
std::vector<Task> tasks_of(const Problem<T>& p, int64_t ghost) {
  const std::vector<int64_t>& seg = p.seg;
  const int64_t formed_rows = p.formed_rows();
  const int64_t loop_tokens = std::min(kLoopTokens, kLoopElements / (p.d_in + p.d_out));
  std::vector<Task> tasks;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(seg.size()); ++e) {
    const int64_t n = seg[e + 1] - seg[e];
    if (n > ghost)
      for (int64_t o = 0; o < p.d_out; o += formed_rows)
        tasks.push_back({e, o, std::min(p.d_out, o + formed_rows), Task::formed});
    else if (n > loop_tokens)
      for (int64_t t = 0; t < n; t += kStrip)
        tasks.push_back({e, t, std::min(n, t + kStrip), Task::strip});
    else if (n > 0)
      tasks.push_back({e, 0, n, Task::loops});
  }
  return tasks;
}

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, int64_t ghost,
           ScalarType type) {
  const std::vector<int64_t> seg = host_offsets("grad_sq_norm", offsets, x.size(0));
  const int64_t b = static_cast<int64_t>(seg.size()) - 1;
  Tensor out = new_tensor(x, {b}, type);
  torch::stable::zero_(out);
  if (x.size(0) == 0 || x.size(1) == 0 || g.size(1) == 0) return out;
  Tensor xc = prepared(x, type), gc = prepared(g, type);
  const Problem<T> p{xc.const_data_ptr<T>(), gc.const_data_ptr<T>(), x.size(1), g.size(1), seg};
  const std::vector<Task> tasks = tasks_of(p, ghost);
  std::vector<double> part(tasks.size());
  torch::stable::parallel_for(0, part.size(), 1, [&](int64_t lo, int64_t hi) {
    std::unique_ptr<T[]> work;
    for (int64_t i = lo; i < hi; ++i) {
      const Task& k = tasks[i];
      if (k.form != Task::loops && !work) work = scratch<T>(p.scratch_elements());
      part[i] = k.form == Task::loops   ? p.loops(k)
                : k.form == Task::strip ? p.strip(k, work.get())
                                        : p.formed(k, work.get());
    }
  });
  T* po = out.mutable_data_ptr<T>();
  for (size_t i = 0; i < tasks.size();) {
    const int64_t e = tasks[i].example;
    double sum = 0;
    for (; i < tasks.size() && tasks[i].example == e; ++i) sum += part[i];
    po[e] = static_cast<T>(sum);
  }
  return out;
}

Tensor grad_sq_norm(Tensor x, Tensor g, Tensor offsets, int64_t ghost_tokens) {
  STD_TORCH_CHECK(x.size(0) == g.size(0), "grad_sq_norm: x and g must have the same N rows, got ",
                  x.size(0), " and ", g.size(0));
  const ScalarType type = compute_type(x);
  return is_double(x) ? run<double>(x, g, offsets, ghost_tokens, type)
                      : run<float>(x, g, offsets, ghost_tokens, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_sq_norm", TORCH_BOX(&grad_sq_norm)); }
