// grad_project on the CPU: tokens in chunks, each projected by the SIMD kernel and contracted while
// it is in cache. Chunks start at their example's first token, so an example's result depends
// neither on its neighbours nor on the number of threads. bf16/fp16 are widened as they are loaded.
#include "grad_project_side.h"

namespace {

using namespace u2a;
constexpr int64_t kFormed = 1 << 20;

// `tokens` rows from `start`, all of one example; `slot`: which part of it, -1 when it has one
// part.
struct Span {
  int64_t example, slot, start, tokens;
  bool add;  // to what the spans before it left
};

// Spans of up to kChunk tokens; several short examples share a chunk, parts of a long one a task.
struct Plan {
  std::vector<Span> spans;
  std::vector<int64_t> chunk, task;  // first span of each chunk, first chunk of each task
  std::vector<int64_t> first_slot;   // [B+1]
  Plan(const std::vector<int64_t>& offsets, int64_t part) : chunk{}, task{}, first_slot{0} {
    int64_t slots = 0, room = 0;
    for (size_t b = 0; b + 1 < offsets.size(); ++b) {
      const int64_t start = offsets[b], end = offsets[b + 1];
      const bool split = end - start > part, shared = end - start <= kChunk;
      for (int64_t t = start; t < end; t += kChunk) {
        const int64_t n = std::min(kChunk, end - t);
        const bool add = (t - start) % part != 0;
        if (!shared || room < n) {
          if (!add) task.push_back(static_cast<int64_t>(chunk.size()));
          chunk.push_back(static_cast<int64_t>(spans.size()));
          room = shared ? kChunk : 0;
        }
        room -= shared ? n : 0;
        if (split && !add) ++slots;
        spans.push_back({static_cast<int64_t>(b), split ? slots - 1 : -1, t, n, add});
      }
      first_slot.push_back(slots);
    }
    task.push_back(static_cast<int64_t>(chunk.size()));
    chunk.push_back(static_cast<int64_t>(spans.size()));
  }
};

// One map: its output side, its results and the parts of long examples.
template <typename T>
struct Map {
  Side<T> to;
  Tensor out;
  T scale;
  std::vector<T> parts;
};

template <typename T>
void contract_span(const Span& s, const Block<T>& a, const Block<T>& b, int64_t t, Map<T>& m,
                   int64_t k_in) {
  const int64_t size = m.to.k * k_in;
  T* out = (s.slot < 0 ? m.out.template mutable_data_ptr<T>() + s.example * size
                       : m.parts.data() + s.slot * size) +
           a.first * k_in + b.first;
  U2A_SIMD(contract_tokens(a.data + t * a.ld, a.ld, b.data + t * b.ld, b.ld, s.tokens, a.count,
                           b.count, m.scale, s.add, out, k_in));
}

template <typename T>
void run_chunk(const Plan& plan, int64_t c, const Side<T>& from, std::vector<Map<T>>& maps,
               Scratch<T>& x, Scratch<T>& g) {
  const Span *span = &plan.spans[plan.chunk[c]], *end = plan.spans.data() + plan.chunk[c + 1];
  const int64_t t0 = span->start, tokens = end[-1].start + end[-1].tokens - t0;
  from.project(t0, tokens, x);
  for (Map<T>& m : maps) {
    m.to.project(t0, tokens, g);
    for (int64_t i = 0; i < from.k; i += from.columns) {
      const Block<T> b = from.block(t0, tokens, i, x);
      for (int64_t o = 0; o < m.to.k; o += m.to.columns) {
        const Block<T> a = m.to.block(t0, tokens, o, g);
        for (const Span* s = span; s < end; ++s) contract_span(*s, a, b, s->start - t0, m, from.k);
      }
    }
  }
}

// Parts of the examples that have several, in their order.
template <typename T>
void sum_parts(const Plan& plan, Map<T>& m, int64_t size) {
  T* out = m.out.template mutable_data_ptr<T>();
  const int64_t examples = static_cast<int64_t>(plan.first_slot.size()) - 1;
  torch::stable::parallel_for(0, examples, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t b = lo; b < hi; ++b)
      for (int64_t s = plan.first_slot[b]; s < plan.first_slot[b + 1]; ++s) {
        const T* part = m.parts.data() + s * size;
        for (int64_t i = 0; i < size; ++i)
          out[b * size + i] = s == plan.first_slot[b] ? part[i] : out[b * size + i] + part[i];
      }
  });
}

// Without any projection and with large gradients: one GEMM an example.
Tensor form(const Tensor& x, const Tensor& g, const std::vector<int64_t>& offsets,
            ScalarType type) {
  const int64_t examples = static_cast<int64_t>(offsets.size()) - 1;
  Tensor out = new_tensor(x, {examples, g.size(1), x.size(1)}, type);
  torch::stable::zero_(out);
  for (int64_t b = 0; b < examples; ++b) {
    const int64_t start = offsets[b], n = offsets[b + 1] - start;
    if (n == 0) continue;
    Tensor to = torch::stable::select(out, 0, b);
    mm_out(to, transposed(prepared(rows(g, start, n), type)), prepared(rows(x, start, n), type));
  }
  return out;
}

template <typename T>
std::vector<Tensor> run(const Tensor& x, const std::vector<Tensor>& g,
                        const std::vector<int64_t>& offsets, const Factor& in,
                        const std::vector<Factor>& to, ScalarType type) {
  const int64_t examples = static_cast<int64_t>(offsets.size()) - 1, d_in = x.size(1);
  std::vector<Tensor> out(g.size(), x);
  std::vector<Map<T>> maps;
  Side<T> from(x, in, kInputStream);
  int64_t part = kChunk;
  for (size_t i = 0; i < g.size(); ++i) {
    if (in.identity() && to[i].identity() && d_in * g[i].size(1) >= kFormed) {
      out[i] = form(x, g[i], offsets, type);
      continue;
    }
    Side<T> side(g[i], to[i], kOutputStream);
    out[i] = new_tensor(x, {examples, side.k, from.k}, type);
    torch::stable::zero_(out[i]);
    // A part is long enough for its result to be an eighth of what is read for it.
    const int64_t read = std::max<int64_t>(1, d_in + (g[i].dim() == 2 ? g[i].size(1) : 1));
    part = std::max(part, 8 * side.k * from.k / read / kChunk * kChunk);
    const T scale = static_cast<T>(from.factor * side.factor);
    maps.push_back({std::move(side), out[i], scale, {}});
  }
  if (maps.empty() || from.k == 0) return out;
  from.prepare();
  for (Map<T>& m : maps) m.to.prepare();
  const Plan plan(offsets, part);
  for (Map<T>& m : maps) m.parts.resize(plan.first_slot.back() * m.to.k * from.k);
  const int64_t tasks = static_cast<int64_t>(plan.task.size()) - 1;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t lo, int64_t hi) {
    Scratch<T> sx, sg;
    for (int64_t c = plan.task[lo]; c < plan.task[hi]; ++c) run_chunk(plan, c, from, maps, sx, sg);
  });
  for (Map<T>& m : maps) sum_parts(plan, m, m.to.k * from.k);
  return out;
}

std::vector<Tensor> grad_project(Tensor x, std::vector<Tensor> g, Tensor offsets,
                                 std::optional<Tensor> p_in, std::vector<Tensor> p_out,
                                 int64_t k_in, std::vector<int64_t> k_out, int64_t seed_in,
                                 std::vector<int64_t> seed_out) {
  STD_TORCH_CHECK(
      g.size() == p_out.size() && g.size() == k_out.size() && g.size() == seed_out.size(),
      "grad_project: g, p_out, k_out and seed_out must have one entry a map");
  const ScalarType type = compute_type(x);
  std::vector<Factor> to;
  for (size_t i = 0; i < g.size(); ++i) {
    STD_TORCH_CHECK(g[i].size(0) == x.size(0), "grad_project: x and g must have the same N rows");
    to.push_back(factor_of(g[i], p_out[i], k_out[i], seed_out[i]));
  }
  const Factor in = p_in ? factor_of(x, *p_in, k_in, seed_in) : Factor{{}, k_in, seed_in};
  const std::vector<int64_t> seg = host_offsets("grad_project", offsets, x.size(0));
  return is_double(x) ? run<double>(x, g, seg, in, to, type) : run<float>(x, g, seg, in, to, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_project", TORCH_BOX(&grad_project)); }
