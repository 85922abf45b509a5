#pragma once
#include <cstdint>

#include "isa.h"
#include "logits.h"

namespace u2a {

// Online softmax state of one row; y and slope belong to the target: its logit and the
// softcap's derivative there.
template <typename T>
struct RowState {
  T max, sum, y, slope;
};

}  // namespace u2a

// One tile z [rows, cols] of h W^T goes through the map and into the row states. `target` is the
// target's column in the tile (any other value: not here). With `rescale`, z becomes exp(z - max)
// times the softcap's derivative, and rescale[r] is what earlier tiles' sums of row r must be
// multiplied by.
U2A_DECLARE_SIMD(void logp_tile(float* z, int64_t rows, int64_t cols, LogitMap<float> map,
                                const int64_t* target, RowState<float>* state, float* rescale))
U2A_DECLARE_SIMD(void logp_tile(double* z, int64_t rows, int64_t cols, LogitMap<double> map,
                                const int64_t* target, RowState<double>* state, double* rescale))

// z -> grad[r] (1[column is target] - exp(z - lse[r])) dz/d(h w), in place.
U2A_DECLARE_SIMD(void grad_tile(float* z, int64_t rows, int64_t cols, LogitMap<float> map,
                                const int64_t* target, const float* lse, const float* grad))
U2A_DECLARE_SIMD(void grad_tile(double* z, int64_t rows, int64_t cols, LogitMap<double> map,
                                const int64_t* target, const double* lse, const double* grad))

// acc[r, :] *= scale[r]
U2A_DECLARE_SIMD(void scale_rows(float* acc, int64_t rows, int64_t d, const float* scale))
U2A_DECLARE_SIMD(void scale_rows(double* acc, int64_t rows, int64_t d, const double* scale))
