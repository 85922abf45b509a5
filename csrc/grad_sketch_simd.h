#pragma once
#include <cstdint>

#include "isa.h"

namespace u2a {

// A sketch lies in memory as rows of kLanes features: the bucket's low bits are the lane. All
// pointers to rows are aligned to 64 bytes, the size of one.
template <typename T>
constexpr int kLanes = 64 / sizeof(T);

// Sketches of up to kTokenRows rows are made for kTokens tokens at a time, larger ones for one.
constexpr int kTokens = 4, kTokenRows = 64;

// The next `rows` rows listed have `count` entries each.
struct SketchGroup {
  int32_t rows, count;
};

// One factor: value c of a token joins the row of its bucket times the pattern of the bucket's low
// bits, which is their transform already. `row` lists all rows by rising count of values, `group`
// the counts; `entry` lists, row by row, the values: c * 2 kLanes + pattern.
template <typename T>
struct SketchFactor {
  const T* tokens;  // [n, d]
  int64_t d;
  const int32_t* row;
  const SketchGroup* group;
  int64_t groups;
  const uint32_t* entry;
  T* work;  // [rows * tokens at a time, kLanes]
};

template <typename T>
struct SketchTotal {
  const T* pattern;  // [2 kLanes, kLanes]
  int64_t rows;
  T* sum;  // [rows, kLanes]
};

}  // namespace u2a

// total.sum[j] = sum_t (H C_out g_t)[j] (H C_in x_t)[j]
U2A_DECLARE_SIMD(void sketch_tokens(const SketchFactor<float>& x, const SketchFactor<float>& g,
                                    int64_t tokens, const SketchTotal<float>& total))
U2A_DECLARE_SIMD(void sketch_tokens(const SketchFactor<double>& x, const SketchFactor<double>& g,
                                    int64_t tokens, const SketchTotal<double>& total))
// Walsh-Hadamard transform in place, natural order, not normalised; pattern as in SketchTotal.
U2A_DECLARE_SIMD(void sketch_transform(float* z, int64_t rows, const float* pattern))
U2A_DECLARE_SIMD(void sketch_transform(double* z, int64_t rows, const double* pattern))
