// dual_softmax on CUDA, without any torch header. Kernels: dual_softmax_device.cuh.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace u2a {

// z and out [2 rows, v] contiguous: primal rows, then their tangents.
template <typename T>
cudaError_t dual_softmax(const T* z, T* out, int64_t rows, int64_t v, cudaStream_t stream);

// grad, out and dz likewise; ggn: the plain backward of the primal half, zeros for the tangents.
template <typename T>
cudaError_t dual_softmax_bwd(const T* grad, const T* out, T* dz, int64_t rows, int64_t v, bool ggn,
                             cudaStream_t stream);

}  // namespace u2a
