// grad_sketch on CUDA, without any torch header: sizes and launches. Kernels:
// grad_sketch_device.cuh.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace u2a {

// A slice is what one CTA transforms. Larger sketches are cut into slices of kMaxSlice features,
// whose high hash bits only change signs; smaller ones leave the upper buckets of kMinSlice empty.
constexpr int64_t kMinSlice = 512, kMaxSlice = 8192;

struct SketchSizes {
  int64_t n, b, d_in, d_out, k;
  int64_t slice() const { return k < kMinSlice ? kMinSlice : k > kMaxSlice ? kMaxSlice : k; }
  int64_t slices() const { return k > kMaxSlice ? k / kMaxSlice : 1; }
  int64_t widest() const { return d_in > d_out ? d_in : d_out; }
  int64_t splits() const;  // CTAs that share the tokens of one example
};

// Work space in elements: bucket starts, bucket entries, and one partial result per split.
inline int64_t sketch_starts(const SketchSizes& s) { return s.slices() * 2 * (s.slice() + 1); }
inline int64_t sketch_entries(const SketchSizes& s) { return s.slices() * 2 * s.widest(); }
inline int64_t sketch_partials(const SketchSizes& s) {
  return s.splits() == 1 ? 0 : s.b * s.splits() * s.k;
}

// x [n, d_in], g [n, d_out] contiguous, offsets [b+1], out [b, k].
template <typename T>
cudaError_t grad_sketch(const SketchSizes& sizes, uint64_t seed, const T* x, const T* g,
                        const int64_t* offsets, int32_t* starts, uint32_t* entries, float* partials,
                        float* out, cudaStream_t stream);

}  // namespace u2a
