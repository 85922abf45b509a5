// Launches of dual_softmax on CUDA. Pure CUDA: the tensors stay in dual_softmax_cuda.cpp.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dual_softmax.cuh"
#include "dual_softmax_device.cuh"

namespace u2a {
namespace {

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename State>
constexpr size_t shared_bytes(int threads) {
  return threads > kWarp ? threads / kWarp * sizeof(State) : 0;
}

template <int kThreads>
unsigned grid(int64_t rows) {
  constexpr int64_t per = cta_threads(kThreads) / kThreads;
  return static_cast<unsigned>((rows + per - 1) / per);
}

template <typename T>
struct Forward {
  const T* z;
  T* out;
  int64_t rows, v;
  cudaStream_t stream;

  bool wide() const { return aligned(z) && aligned(out); }
  template <int W, int kThreads, int kPacks, bool kHeld>
  void launch() const {
    using A = typename Accumulator<T>::type;
    dual_softmax_kernel<T, W, kThreads, kPacks, kHeld>
        <<<grid<kThreads>(rows), cta_threads(kThreads), shared_bytes<SoftmaxState<A>>(kThreads),
           stream>>>(z, out, rows, v);
  }
};

template <typename T>
struct Backward {
  const T *grad, *out;
  T* dz;
  int64_t rows, v;
  bool ggn;
  cudaStream_t stream;

  bool wide() const { return aligned(grad) && aligned(out) && aligned(dz); }
  template <int W, int kThreads, int kPacks, bool kHeld>
  void launch() const {
    using A = typename Accumulator<T>::type;
    dual_softmax_bwd_kernel<T, W, kThreads, kPacks, kHeld>
        <<<grid<kThreads>(rows), cta_threads(kThreads), shared_bytes<ProductState<A>>(kThreads),
           stream>>>(grad, out, dz, rows, v, ggn);
  }
};

// The fewest threads whose registers hold the row, else a CTA that reads it twice.
template <int W, int kMostThreads, typename Call>
void launch(const Call& call) {
  const int64_t packs = call.v / W;
  if (packs <= 8 * 2)
    call.template launch<W, 8, 2, true>();
  else if (packs <= 32 * 4)
    call.template launch<W, 32, 4, true>();
  else if (packs <= 256 * 4)
    call.template launch<W, 256, 4, true>();
  else if (packs <= 512 * 4)
    call.template launch<W, 512, 4, true>();
  else if (packs <= kMostThreads * 4)
    call.template launch<W, kMostThreads, 4, true>();
  else
    call.template launch<W, 512, 2, false>();
}

// float64, which few use, takes the kernels of rows that are not aligned.
template <typename T, int kMostThreads, typename Call>
cudaError_t run(const Call& call) {
  constexpr int W = sizeof(T) == 8 ? 1 : 16 / sizeof(T);
  if (call.rows > (int64_t{1} << 31) - 1) return cudaErrorInvalidValue;
  if constexpr (W > 1) {
    if (call.v % W == 0 && call.wide()) {
      launch<W, kMostThreads>(call);
      return cudaGetLastError();
    }
  }
  if (call.v <= kWarp * 4)
    call.template launch<1, kWarp, 4, true>();
  else
    call.template launch<1, 256, 4, false>();
  return cudaGetLastError();
}

}  // namespace

template <typename T>
cudaError_t dual_softmax(const T* z, T* out, int64_t rows, int64_t v, cudaStream_t stream) {
  return run<T, 1024>(Forward<T>{z, out, rows, v, stream});
}

template <typename T>
cudaError_t dual_softmax_bwd(const T* grad, const T* out, T* dz, int64_t rows, int64_t v, bool ggn,
                             cudaStream_t stream) {
  return run<T, 512>(Backward<T>{grad, out, dz, rows, v, ggn, stream});
}

#define U2A_INSTANTIATE(T)                                                                 \
  template cudaError_t dual_softmax<T>(const T*, T*, int64_t, int64_t, cudaStream_t);      \
  template cudaError_t dual_softmax_bwd<T>(const T*, const T*, T*, int64_t, int64_t, bool, \
                                           cudaStream_t);
U2A_INSTANTIATE(float)
U2A_INSTANTIATE(double)
U2A_INSTANTIATE(__half)
U2A_INSTANTIATE(__nv_bfloat16)

}  // namespace u2a
