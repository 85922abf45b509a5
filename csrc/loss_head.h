// What the loss heads share on the CPU: rows that have a target, gathers and scatters of rows.
#pragma once
#include <cstring>

#include "common.h"

namespace u2a {

constexpr int64_t kIgnore = -100;

inline Tensor index_rows(const Tensor& t, const std::vector<int64_t>& index) {
  Tensor i = new_tensor(t, {static_cast<int64_t>(index.size())}, ScalarType::Long);
  std::copy(index.begin(), index.end(), i.mutable_data_ptr<int64_t>());
  std::array<StableIValue, 3> stack{torch::stable::detail::from(t),
                                    torch::stable::detail::from(int64_t{0}),
                                    torch::stable::detail::from(i)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows with a target, and the targets; one that is no token is refused, it would be read.
inline void used_rows(const char* op, const Tensor& targets, int64_t v, std::vector<int64_t>& row,
                      std::vector<int64_t>& target) {
  Tensor t = torch::stable::contiguous(targets);
  const int64_t* p = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < t.size(0); ++i) {
    if (p[i] == kIgnore) continue;
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < v, op, ": targets must be -100 or in [0, V = ", v,
                    "), got ", p[i], " at row ", i);
    row.push_back(i);
    target.push_back(p[i]);
  }
}

// Local target columns of rows [lo, hi), for a tile that starts at column c0.
inline std::vector<int64_t> local(const std::vector<int64_t>& target, int64_t lo, int64_t hi,
                                  int64_t c0) {
  std::vector<int64_t> out(target.begin() + lo, target.begin() + hi);
  for (int64_t& t : out) t -= c0;
  return out;
}

}  // namespace u2a
