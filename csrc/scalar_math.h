// exp, tanh, sigmoid and the normal distribution as straight-line code that compilers vectorise,
// for X_simd.cpp files (see isa.h). float: own polynomials, the same bits on every instruction set;
// double: the C library.
#pragma once
#include <cstdint>

#define U2A_INLINE __attribute__((always_inline)) inline

namespace {

// x = n ln2 + r; n = -127 has the exponent bits of 0, so that e^x is 0 from -87.7 down.
struct Reduced {
  float r;
  uint32_t power;  // bits of 2^n
};

U2A_INLINE Reduced reduced(float x) {
  const float c = -88.f > x ? -88.f : x;
  const float t = c * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const float n = t - 12582912.f;
  return {(c - n * 0.693359375f) - n * -2.12194440e-4f, (__builtin_bit_cast(uint32_t, t) + 127u)
                                                            << 23};
}

// e^r is a polynomial fitted on |r| <= ln2 / 2 to 3e-9.
U2A_INLINE float exp_of(Reduced x) {
  const float r = x.r;
  const float q =
      (((1.38144672e-3f * r + 8.36878084e-3f) * r + 4.16683927e-2f) * r + 1.66665196e-1f) * r +
      4.9999994e-1f;
  return ((q * r) * r + r + 1.f) * __builtin_bit_cast(float, x.power);
}

// e^x for x <= 88, NaN for NaN; about 1 ulp.
U2A_INLINE float exp_of(float x) { return exp_of(reduced(x)); }
U2A_INLINE double exp_of(double x) { return __builtin_exp(x); }

// Odd polynomial fitted to 4e-9 for |x| < 0.625, else (1 - e^-2|x|) / (1 + e^-2|x|).
U2A_INLINE float tanh_of(float x) {
  const float a = __builtin_fabsf(x), u = x * x, e = exp_of(-2.f * a);
  const float q =
      (((-5.71703445e-3f * u + 2.06505787e-2f) * u - 5.37434965e-2f) * u + 1.33314908e-1f) * u -
      3.33332837e-1f;
  const float large = __builtin_copysignf((1.f - e) / (1.f + e), x);
  return a < 0.625f ? x + x * (u * q) : large;
}
U2A_INLINE double tanh_of(double x) { return __builtin_tanh(x); }

// The sigmoids of x and -x, each with its own tail.
template <typename T>
struct Sigmoids {
  T here, rest;
};
template <typename T>
U2A_INLINE Sigmoids<T> sigmoids_of(T x) {
  const T e = exp_of(x < 0 ? x : -x), large = 1 / (1 + e), small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

// Phi and phi of the standard normal distribution, for |x| <= 16.
template <typename T>
struct Normal {
  T below, density;
};

// Phi(-z) e^(z^2/2) is t times a polynomial in t = 1 / (1 + 0.3 z), fitted for 0 <= z <= 13.4 to
// 4e-9. z is split, so that its square is exact and e^(-z^2/2) as good as any exponential.
U2A_INLINE Normal<float> normal_of(float x) {
  const float z = __builtin_fabsf(x);
  const float top = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, z) & 0xfffff000u),
              low = z - top;
  Reduced square = reduced(-0.5f * top * top);
  square.r -= 0.5f * low * (z + top);
  const float e = exp_of(square);
  const float t = 1.f / (1.f + 0.3f * z), u = t - 0.5f;
  float p = -2.05898586e-2f * u + 1.95920827e-2f;
  p = ((p * u + 3.59257299e-2f) * u - 3.64560475e-2f) * u - 7.75533114e-2f;
  p = ((p * u + 2.90564135e-2f) * u + 2.22082753e-1f) * u + 3.46198840e-1f;
  p = (p * u + 3.29158970e-1f) * u + 2.21970613e-1f;
  const float tail = e * (t * p);
  return {x < 0 ? tail : 1.f - tail, e * 0.398942280f};
}
U2A_INLINE Normal<double> normal_of(double x) {
  return {0.5 * __builtin_erfc(x * -0.70710678118654752440),
          0.39894228040143267794 * __builtin_exp(-0.5 * x * x)};
}

}  // namespace
