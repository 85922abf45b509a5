#pragma once
#include "isa.h"
#include "logits.h"

namespace u2a {

// One row over the tiles seen so far. With p = exp(a - max): sum = sum p; mean and square are the
// p-weighted mean of the tangents a_t and sum p (a_t - mean)^2; y, y_t, slope, bend belong to the
// target: its logit, tangent, a'(z) and a''(z) z_t. `shift` centres the tangents of the products.
template <typename T>
struct DualState {
  T max, sum, mean, square, y, y_t, slope, bend, shift;
};

// What the backward knows of a row: cotangents of loss and loss_t, and the forward's statistics;
// scale = 1 / sum p.
template <typename T>
struct DualCotangent {
  T a, b, max, scale, mean;
};

}  // namespace u2a

// Tiles z, z_t [rows, cols] of logits before bias and cap, and of their tangents; target[r] is the
// target's column in the tile (any other value: not here). The row states take the tile in. With
// `rescale` z becomes s p and z_t becomes s p (a_t - shift) + p a''(z) z_t, for p = exp(a - max),
// without the last term if `ggn`; products of earlier tiles are brought to this max and shift by
// rescale[2r] and rescale[2r + 1].
U2A_DECLARE_SIMD(void dual_tile(float* z, float* z_t, int64_t rows, int64_t cols,
                                LogitMap<float> map, const float* bias_t, const int64_t* target,
                                DualState<float>* state, float* rescale, bool ggn))
U2A_DECLARE_SIMD(void dual_tile(double* z, double* z_t, int64_t rows, int64_t cols,
                                LogitMap<double> map, const double* bias_t, const int64_t* target,
                                DualState<double>* state, double* rescale, bool ggn))

// z, z_t become the cotangents of z and z_t; with `ggn` only z, the Gauss-Newton part.
U2A_DECLARE_SIMD(void dual_grad_tile(float* z, float* z_t, int64_t rows, int64_t cols,
                                     LogitMap<float> map, const float* bias_t,
                                     const int64_t* target, const DualCotangent<float>* row,
                                     bool ggn))
U2A_DECLARE_SIMD(void dual_grad_tile(double* z, double* z_t, int64_t rows, int64_t cols,
                                     LogitMap<double> map, const double* bias_t,
                                     const int64_t* target, const DualCotangent<double>* row,
                                     bool ggn))

// first = scale first, second = scale (second + by first), [rows, d]; (scale, by) = rescale[2r..].
U2A_DECLARE_SIMD(void dual_rescale(float* first, float* second, int64_t rows, int64_t d,
                                   const float* rescale))
U2A_DECLARE_SIMD(void dual_rescale(double* first, double* second, int64_t rows, int64_t d,
                                   const double* rescale))
