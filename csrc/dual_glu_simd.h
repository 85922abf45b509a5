#pragma once
#include "isa.h"
#include "lanes.h"

namespace u2a {

enum class Activation { silu, gelu, gelu_tanh, quick_gelu, relu, relu2, sigmoid, tanh, identity };

// A piece of a row and of its tangent; step 1, or 0 where one element stands for all.
template <typename S>
struct DualPiece {
  S *primal, *tangent;
  int64_t step;
};

}  // namespace u2a

// y = f(a) b and its tangent for n columns; without b (null) y = f(a).
#define U2A_DECLARE_GLU(S)                                                                     \
  U2A_DECLARE_SIMD(void glu_forward(Activation f, DualPiece<const S> a, DualPiece<const S> b,  \
                                    DualPiece<S> y, int64_t n))                                \
  U2A_DECLARE_SIMD(void glu_backward(Activation f, DualPiece<const S> g, DualPiece<const S> a, \
                                     DualPiece<const S> b, DualPiece<S> da, DualPiece<S> db,   \
                                     int64_t n))

U2A_DECLARE_GLU(float)
U2A_DECLARE_GLU(double)
U2A_DECLARE_GLU(BFloat16)
U2A_DECLARE_GLU(Float16)
#undef U2A_DECLARE_GLU
