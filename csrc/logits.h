#pragma once
#include <cstdint>

namespace u2a {

// z = (cap tanh((h w + bias) / cap)) / temperature; cap 0: no softcap, bias null: none.
template <typename T>
struct LogitMap {
  const T* bias;
  T cap, temperature;
};

}  // namespace u2a
