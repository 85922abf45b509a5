#pragma once
#include <cstdint>

#include "isa.h"

// One factor of the sketch: d values fall into k buckets, value i into bucket[i] times sign[i].
namespace u2a {
template <typename T>
struct SketchFactor {
  const T* rows;  // [tokens, d]
  int64_t d;
  const int32_t* bucket;
  const T* sign;
  T* work;  // [k]
};
}  // namespace u2a

// out[j] = scale * sum_t (H C_out g_t)[j] (H C_in x_t)[j]; out [k].
U2A_DECLARE_SIMD(void sketch_tokens(const SketchFactor<float>& x, const SketchFactor<float>& g,
                                    int64_t tokens, int64_t k, float scale, float* out))
U2A_DECLARE_SIMD(void sketch_tokens(const SketchFactor<double>& x, const SketchFactor<double>& g,
                                    int64_t tokens, int64_t k, double scale, double* out))
