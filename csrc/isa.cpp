#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace u2a {

Isa isa() {
  static const Isa best = [] {
    const char* limit = std::getenv("U2A_CPU_CAPABILITY");
    auto allowed = [&](const char* name) { return !limit || !std::strcmp(limit, name); };
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && allowed("avx512")) return Isa::avx512;
    if (avx2 && (allowed("avx2") || allowed("avx512"))) return Isa::avx2;
#endif
    return Isa::base;
  }();
  return best;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace u2a
