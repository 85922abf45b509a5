// The hash of grad_sketch, one source for C++ and CUDA: word 0 of Philox4x32-10 with key = seed and
// counter = (coordinate low, coordinate high, stream, tag). Bucket: its low log2(k) bits; sign: bit
// 31.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define U2A_HD __host__ __device__
#else
#define U2A_HD
#endif

namespace u2a {

constexpr uint32_t kSketchTag = 0x55324153u;  // "U2AS"
constexpr uint32_t kOutputs = 0, kInputs = 1, kEntries = 4;

U2A_HD inline uint32_t sketch_hash(uint64_t seed, uint32_t stream, uint64_t coordinate) {
  uint32_t c0 = static_cast<uint32_t>(coordinate), c1 = static_cast<uint32_t>(coordinate >> 32);
  uint32_t c2 = stream, c3 = kSketchTag;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace u2a
