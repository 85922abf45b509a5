#include "grad_sketch_entries_simd.h"

#include "sketch_hash.h"

namespace {

constexpr int kGroup = 16;  // counters hashed side by side

template <typename T, typename Bits>
void scatter(const T* value, int64_t n, const uint32_t* word, uint32_t flip, uint32_t mask, T* z) {
  constexpr int kShift = 8 * sizeof(T) - 32;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t w = word[i] ^ flip;
    Bits bits;
    __builtin_memcpy(&bits, value + i, sizeof(T));
    bits ^= static_cast<Bits>(w & 0x80000000u) << kShift;
    T signed_value;
    __builtin_memcpy(&signed_value, &bits, sizeof(T));
    z[w & mask] += signed_value;
  }
}

// Four words for each of kGroup counters (first + i, row, stream, tag).
void philox(uint64_t seed, uint32_t row, uint32_t first, uint32_t stream,
            uint32_t (&c)[4][kGroup]) {
  for (int i = 0; i < kGroup; ++i) {
    c[0][i] = first + i;
    c[1][i] = row;
    c[2][i] = stream;
    c[3][i] = u2a::kSketchTag;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kGroup; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c[0][i], p1 = uint64_t{0xCD9E8D57u} * c[2][i];
      c[0][i] = static_cast<uint32_t>(p1 >> 32) ^ c[1][i] ^ k0;
      c[2][i] = static_cast<uint32_t>(p0 >> 32) ^ c[3][i] ^ k1;
      c[1][i] = static_cast<uint32_t>(p1);
      c[3][i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// `bits` bits of a word as +-1: bit set means -1.
template <typename T>
void expand(uint32_t word, int64_t bits, T* sign) {
  for (int64_t j = 0; j < bits; ++j)
    sign[j] = static_cast<T>(1 - static_cast<int32_t>(word >> j << 31 >> 30));
}

template <typename T>
void signs(uint64_t seed, uint32_t row, uint32_t first, int64_t n, int64_t j0, int64_t width,
           T* sign) {
  uint32_t c[4][kGroup];
  for (int64_t i0 = 0; i0 < n; i0 += kGroup)
    for (int64_t j = 0; j < width; j += 128) {
      const uint32_t at = static_cast<uint32_t>(i0), block = static_cast<uint32_t>((j0 + j) / 128);
      philox(seed, row, first + at, u2a::kEntries + 8 * (1 + block), c);
      for (int64_t i = 0; i < kGroup && i0 + i < n; ++i)
        for (int64_t b = 0; b < 128 && j + b < width; b += 32) {
          T* to = sign + (i0 + i) * width + j + b;
          if (width - j - b >= 32)
            expand(c[b / 32][i], 32, to);
          else
            expand(c[b / 32][i], width - j - b, to);
        }
    }
}

// kGroup entries are summed before they join the others: a shorter chain of roundings.
template <typename T>
void add_row(const T* value, int64_t n, uint64_t seed, uint32_t row, int64_t k, T* out) {
  const int64_t width = k < 128 ? k : 128;
  T sign[kGroup * 128];
  for (int64_t i0 = 0; i0 < n; i0 += kGroup) {
    const int64_t some = n - i0 < kGroup ? n - i0 : kGroup;
    for (int64_t j0 = 0; j0 < k; j0 += width) {
      T sum[128] = {};
      signs(seed, row, static_cast<uint32_t>(i0), some, j0, width, sign);
      for (int64_t i = 0; i < some; ++i)
        for (int64_t j = 0; j < width; ++j) sum[j] += value[i0 + i] * sign[i * width + j];
      for (int64_t j = 0; j < width; ++j) out[j0 + j] += sum[j];
    }
  }
}

}  // namespace

namespace u2a::U2A_ISA {
void add_signed_row(const float* value, int64_t n, uint64_t seed, uint32_t row, int64_t k,
                    float* out) {
  add_row(value, n, seed, row, k, out);
}
void add_signed_row(const double* value, int64_t n, uint64_t seed, uint32_t row, int64_t k,
                    double* out) {
  add_row(value, n, seed, row, k, out);
}
void scatter_entries(const float* value, int64_t n, const uint32_t* word, uint32_t flip,
                     uint32_t mask, float* z) {
  scatter<float, uint32_t>(value, n, word, flip, mask, z);
}
void scatter_entries(const double* value, int64_t n, const uint32_t* word, uint32_t flip,
                     uint32_t mask, double* z) {
  scatter<double, uint64_t>(value, n, word, flip, mask, z);
}
void entry_words(uint64_t seed, uint32_t row, uint32_t first, int64_t n, uint32_t* word) {
  uint32_t c[4][kGroup];
  for (int64_t i0 = 0; i0 < n; i0 += kGroup) {
    philox(seed, row, first + static_cast<uint32_t>(i0), kEntries, c);
    for (int64_t i = 0; i < kGroup && i0 + i < n; ++i) word[i0 + i] = c[0][i];
  }
}
void entry_signs(uint64_t seed, uint32_t row, uint32_t first, int64_t n, int64_t j0, int64_t width,
                 float* sign) {
  signs(seed, row, first, n, j0, width, sign);
}
void entry_signs(uint64_t seed, uint32_t row, uint32_t first, int64_t n, int64_t j0, int64_t width,
                 double* sign) {
  signs(seed, row, first, n, j0, width, sign);
}
}  // namespace u2a::U2A_ISA
