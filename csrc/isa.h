// One kernel source, three objects: X_simd.cpp is compiled with -DU2A_ISA=base|avx2|avx512, each in
// a namespace of that name. Everything else in such a file is in an anonymous namespace and uses no
// inline library code, so that the linker can't hand one instruction set's code to another.
#pragma once

namespace u2a {
enum class Isa { base, avx2, avx512 };
Isa isa();  // best of this machine; U2A_CPU_CAPABILITY=base|avx2|avx512 lowers it
const char* isa_name();
}  // namespace u2a

#define U2A_DECLARE_SIMD(signature) \
  namespace u2a {                   \
  namespace base {                  \
  signature;                        \
  }                                 \
  namespace avx2 {                  \
  signature;                        \
  }                                 \
  namespace avx512 {                \
  signature;                        \
  }                                 \
  }

#define U2A_SIMD(call)         \
  do {                         \
    switch (::u2a::isa()) {    \
      case ::u2a::Isa::avx512: \
        ::u2a::avx512::call;   \
        break;                 \
      case ::u2a::Isa::avx2:   \
        ::u2a::avx2::call;     \
        break;                 \
      default:                 \
        ::u2a::base::call;     \
    }                          \
  } while (0)
