// The CUDA kernels of dual_softmax run by the host; see test_dual_softmax.py.
#include <cstring>

#include "cuda_on_cpu.h"  // before the kernels, which need its macros
#include "dual_softmax_device.cuh"
#include "lanes.h"

namespace u2a {
alignas(16) double row_states[5 * kWarp];
}

using namespace u2a;

struct Bf16 {
  uint16_t bits;
  Bf16() = default;
  explicit Bf16(float x) : bits(narrowed(x, BFloat16{}).bits) {}
  operator float() const { return widened(BFloat16{bits}); }
};

static void poison() { std::memset(row_states, 0xFF, sizeof(row_states)); }

template <int kThreads, typename F>
static void run_rows(int64_t rows, F kernel) {
  const unsigned cta = cta_threads(kThreads), per = cta / kThreads;
  launch_on_cpu({static_cast<unsigned>((rows + per - 1) / per), 1, 1}, cta, poison, kernel);
}

template <typename T, int W, int kThreads, int kPacks, bool kHeld>
static void softmax(const void* z, void* out, int64_t rows, int64_t v) {
  run_rows<kThreads>(rows, [=] {
    dual_softmax_kernel<T, W, kThreads, kPacks, kHeld>(static_cast<const T*>(z),
                                                       static_cast<T*>(out), rows, v);
  });
}

template <typename T, int W, int kThreads, int kPacks, bool kHeld>
static void softmax_bwd(const void* grad, const void* out, void* dz, int64_t rows, int64_t v,
                        bool ggn) {
  run_rows<kThreads>(rows, [=] {
    dual_softmax_bwd_kernel<T, W, kThreads, kPacks, kHeld>(
        static_cast<const T*>(grad), static_cast<const T*>(out), static_cast<T*>(dz), rows, v, ggn);
  });
}

// A part of a warp, a warp and a CTA to a row; a row in registers and one read twice. Rows that the
// shape does not hold must not be asked for.
#define U2A_SHAPES(T, W, NAME)                                                                     \
  void NAME(int shape, const void* z, void* out, int64_t rows, int64_t v) {                        \
    const auto run = shape == 0   ? softmax<T, W, 8, 2, true>                                      \
                     : shape == 1 ? softmax<T, W, 32, 4, true>                                     \
                     : shape == 2 ? softmax<T, W, 128, 4, true>                                    \
                                  : softmax<T, W, 128, 2, false>;                                  \
    run(z, out, rows, v);                                                                          \
  }                                                                                                \
  void NAME##_bwd(int shape, const void* grad, const void* out, void* dz, int64_t rows, int64_t v, \
                  int ggn) {                                                                       \
    const auto run = shape == 0   ? softmax_bwd<T, W, 8, 2, true>                                  \
                     : shape == 1 ? softmax_bwd<T, W, 32, 4, true>                                 \
                     : shape == 2 ? softmax_bwd<T, W, 128, 4, true>                                \
                                  : softmax_bwd<T, W, 128, 2, false>;                              \
    run(grad, out, dz, rows, v, ggn);                                                              \
  }

extern "C" {
U2A_SHAPES(float, 4, float32_wide)
U2A_SHAPES(float, 1, float32_narrow)
U2A_SHAPES(Bf16, 8, bfloat16_wide)
U2A_SHAPES(Bf16, 1, bfloat16_narrow)
U2A_SHAPES(double, 1, float64_narrow)
}
