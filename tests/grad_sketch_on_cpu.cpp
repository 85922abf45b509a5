// The CUDA kernels of grad_sketch run by the host, and the hash they use; see test_cuda_library.py.
#include <cmath>
#include <cstring>

#include "cuda_on_cpu.h"  // before the kernels, which need its macros
#include "grad_sketch_device.cuh"

namespace u2a {
alignas(16) float buffer[1 << 15];
alignas(16) int32_t count[1 << 14];
}  // namespace u2a

using namespace u2a;

static void poison() {
  std::memset(buffer, 0xFF, sizeof(buffer));
  std::memset(count, 0xFF, sizeof(count));
}

template <int LOG2>
static void sketch(const float* x, const float* g, const int64_t* offsets, int64_t b, int d_in,
                   int d_out, int64_t k, uint64_t seed, unsigned splits, bool staged, float* out) {
  const int size = 1 << LOG2;
  const unsigned slices = k > size ? static_cast<unsigned>(k / size) : 1;
  const int widest = d_in > d_out ? d_in : d_out;
  std::vector<int32_t> starts(slices * 2 * (size + 1), -1);
  std::vector<uint32_t> entries(slices * 2 * widest, ~0u);
  std::vector<float> partials(b * splits * k, NAN);
  launch_on_cpu({2, slices, 1}, kTableThreads, poison, [&] {
    sketch_table_kernel(seed, d_in, d_out, widest, k, size, LOG2, starts.data(), entries.data());
  });
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(k)));
  launch_on_cpu({static_cast<unsigned>(b), splits, slices}, size / kPerThread, poison, [&] {
    sketch_kernel<LOG2, float>(x, g, offsets, d_in, d_out, widest, k, staged, scale, starts.data(),
                               entries.data(), partials.data());
  });
  launch_on_cpu({static_cast<unsigned>((b * k + 63) / 64), 1, 1}, 64, poison,
                [&] { sketch_sum_kernel(partials.data(), b, splits, k, out); });
}

extern "C" {

void hashes(uint64_t seed, uint32_t stream, int64_t n, int64_t* out) {
  for (int64_t c = 0; c < n; ++c) out[c] = sketch_hash(seed, stream, c);
}

// `log2` is the slice's size; returns 1 where no kernel has that size.
int cuda_sketch(int log2, const float* x, const float* g, const int64_t* offsets, int64_t b,
                int64_t d_in, int64_t d_out, int64_t k, uint64_t seed, int splits, int staged,
                float* out) {
  const auto run = log2 == 9    ? sketch<9>
                   : log2 == 10 ? sketch<10>
                   : log2 == 11 ? sketch<11>
                   : log2 == 12 ? sketch<12>
                   : log2 == 13 ? sketch<13>
                                : nullptr;
  if (!run) return 1;
  run(x, g, offsets, b, static_cast<int>(d_in), static_cast<int>(d_out), k, seed, splits, staged,
      out);
  return 0;
}
}
