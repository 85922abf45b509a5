#pragma once
#include <cstdint>

#include "isa.h"

// z[w & mask] += value, negated where bit 31 of w is set, for w = word[i] ^ flip.
U2A_DECLARE_SIMD(void scatter_entries(const float* value, int64_t n, const uint32_t* word,
                                      uint32_t flip, uint32_t mask, float* z))
U2A_DECLARE_SIMD(void scatter_entries(const double* value, int64_t n, const uint32_t* word,
                                      uint32_t flip, uint32_t mask, double* z))

// word[i] of entry (row, first + i): word 0 of Philox with counter (first + i, row, stream, tag).
U2A_DECLARE_SIMD(void entry_words(uint64_t seed, uint32_t row, uint32_t first, int64_t n,
                                  uint32_t* word))

// sign[i, j] = +-1 of entry (row, first + i) and feature j0 + j; sign [n, width].
U2A_DECLARE_SIMD(void entry_signs(uint64_t seed, uint32_t row, uint32_t first, int64_t n,
                                  int64_t j0, int64_t width, float* sign))
U2A_DECLARE_SIMD(void entry_signs(uint64_t seed, uint32_t row, uint32_t first, int64_t n,
                                  int64_t j0, int64_t width, double* sign))

// out[j] += sum_i value[i] * sign of entry (row, i) and feature j, for j < k.
U2A_DECLARE_SIMD(void add_signed_row(const float* value, int64_t n, uint64_t seed, uint32_t row,
                                     int64_t k, float* out))
U2A_DECLARE_SIMD(void add_signed_row(const double* value, int64_t n, uint64_t seed, uint32_t row,
                                     int64_t k, double* out))
