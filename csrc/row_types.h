// The element types that the row code of lanes.h takes, chosen by a tensor's.
#pragma once
#include "common.h"
#include "lanes.h"

namespace u2a {

// f(S{}) with S float, double, BFloat16 or Float16.
template <typename F>
auto by_row_type(const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float,
                      "dual ops take float32, bfloat16, float16 or float64");
      return f(float{});
  }
}

}  // namespace u2a
