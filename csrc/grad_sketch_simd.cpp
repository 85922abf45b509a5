#include "grad_sketch_simd.h"

namespace {

using u2a::SketchFactor;

template <typename T>
void stage(T* a, int64_t h) {
  T* b = a + h;
  for (int64_t i = 0; i < h; ++i) {
    const T u = a[i], v = b[i];
    a[i] = u + v;
    b[i] = u - v;
  }
}

// Strides h and 2h at once, for half the memory traffic.
template <typename T>
void two_stages(T* a, int64_t h) {
  T *b = a + h, *c = a + 2 * h, *d = a + 3 * h;
  for (int64_t i = 0; i < h; ++i) {
    const T p = a[i] + b[i], q = a[i] - b[i], r = c[i] + d[i], s = c[i] - d[i];
    a[i] = p + r;
    b[i] = q + s;
    c[i] = p - r;
    d[i] = q - s;
  }
}

// Strides 16 to 128 of 256 values.
template <typename T>
void high_stages(T* a) {
  for (int i = 0; i < 256; i += 64) two_stages(a + i, 16);
  two_stages(a, 64);
}

// All eight stages of 256 values: transposed as a 16 x 16 block, the low strides vectorise too.
template <typename T>
void stages_256(T* a) {
  T t[256];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) t[16 * i + j] = a[16 * j + i];
  high_stages(t);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) a[16 * i + j] = t[16 * j + i];
  high_stages(a);
}

// Walsh-Hadamard transform, natural order, not normalised.
template <typename T>
void transform(T* a, int64_t k) {
  int64_t h = 1;
  if (k >= 256) {
    for (int64_t i = 0; i < k; i += 256) stages_256(a + i);
    for (h = 256; 4 * h <= k; h *= 4)
      for (int64_t i = 0; i < k; i += 4 * h) two_stages(a + i, h);
  }
  for (; h < k; h *= 2)
    for (int64_t i = 0; i < k; i += 2 * h) stage(a + i, h);
}

template <typename T>
void sketch_row(const SketchFactor<T>& f, int64_t t, int64_t k) {
  for (int64_t j = 0; j < k; ++j) f.work[j] = 0;
  const T* row = f.rows + t * f.d;
  for (int64_t i = 0; i < f.d; ++i) f.work[f.bucket[i]] += f.sign[i] * row[i];
  transform(f.work, k);
}

template <typename T>
void tokens_of(const SketchFactor<T>& x, const SketchFactor<T>& g, int64_t tokens, int64_t k,
               T scale, T* out) {
  for (int64_t j = 0; j < k; ++j) out[j] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    sketch_row(x, t, k);
    sketch_row(g, t, k);
    for (int64_t j = 0; j < k; ++j) out[j] += x.work[j] * g.work[j];
  }
  for (int64_t j = 0; j < k; ++j) out[j] *= scale;
}

}  // namespace

namespace u2a::U2A_ISA {
void sketch_tokens(const SketchFactor<float>& x, const SketchFactor<float>& g, int64_t tokens,
                   int64_t k, float scale, float* out) {
  tokens_of(x, g, tokens, k, scale, out);
}
void sketch_tokens(const SketchFactor<double>& x, const SketchFactor<double>& g, int64_t tokens,
                   int64_t k, double scale, double* out) {
  tokens_of(x, g, tokens, k, scale, out);
}
}  // namespace u2a::U2A_ISA
