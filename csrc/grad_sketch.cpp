// grad_sketch on the CPU: per token, scatter each factor into k buckets, Walsh-Hadamard transform,
// multiply and accumulate. Threads share the examples. bf16/fp16 inputs are copied to float32 once.
#include <cmath>

#include "common.h"
#include "grad_sketch_simd.h"
#include "sketch_hash.h"

namespace {

using namespace u2a;

template <typename T>
struct Buckets {
  std::vector<int32_t> bucket;
  std::vector<T> sign;
  Buckets(uint64_t seed, uint32_t stream, int64_t d, int64_t k) : bucket(d), sign(d) {
    for (int64_t i = 0; i < d; ++i) {
      const uint32_t word = sketch_hash(seed, stream, i);
      bucket[i] = static_cast<int32_t>(word & (k - 1));
      sign[i] = word >> 31 ? T(-1) : T(1);
    }
  }
};

template <typename T>
Tensor run(const Tensor& x, const Tensor& g, const Tensor& offsets, int64_t k, int64_t seed,
           ScalarType type) {
  const int64_t d_in = x.size(1), d_out = g.size(1);
  const std::vector<int64_t> seg = host_offsets("grad_sketch", offsets, x.size(0));
  const int64_t b = static_cast<int64_t>(seg.size()) - 1;
  Tensor out = new_tensor(x, {b, k}, type);
  Tensor xc = prepared(x, type), gc = prepared(g, type);
  const T *px = xc.const_data_ptr<T>(), *pg = gc.const_data_ptr<T>();
  const Buckets<T> in(seed, kInputs, d_in, k), to(seed, kOutputs, d_out, k);
  const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(k)));
  T* po = out.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, b, 1, [&](int64_t lo, int64_t hi) {
    std::vector<T> work(2 * k);
    for (int64_t e = lo; e < hi; ++e) {
      const SketchFactor<T> fx{px + seg[e] * d_in, d_in, in.bucket.data(), in.sign.data(),
                               work.data()};
      const SketchFactor<T> fg{pg + seg[e] * d_out, d_out, to.bucket.data(), to.sign.data(),
                               work.data() + k};
      U2A_SIMD(sketch_tokens(fx, fg, seg[e + 1] - seg[e], k, scale, po + e * k));
    }
  });
  return out;
}

Tensor grad_sketch(Tensor x, Tensor g, Tensor offsets, int64_t k, int64_t seed) {
  STD_TORCH_CHECK(x.size(0) == g.size(0), "grad_sketch: x and g must have the same N rows, got ",
                  x.size(0), " and ", g.size(0));
  STD_TORCH_CHECK(k >= 2 && k <= 65536 && (k & (k - 1)) == 0,
                  "grad_sketch: k must be a power of two from 2 to 65536, got ", k);
  const ScalarType type = compute_type(x);
  return is_double(x) ? run<double>(x, g, offsets, k, seed, type)
                      : run<float>(x, g, offsets, k, seed, type);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(u2a, CPU, m) { m.impl("grad_sketch", TORCH_BOX(&grad_sketch)); }
