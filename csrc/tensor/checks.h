// What memory safety needs: Python has already checked shapes and dtypes with the user's names.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace ppo {

#define PPO_CHECK(cond, op, what) STD_TORCH_CHECK(cond, "ppo_fast::", op, ": ", what)

inline bool same_sizes(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

// x, if given, is a CPU tensor of the main tensor's shape.
inline void check_like(const torch::stable::Tensor& main,
                       const std::optional<torch::stable::Tensor>& x, const char* op,
                       const char* name) {
  if (x)
    STD_TORCH_CHECK(x->is_cpu() && same_sizes(main, *x), "ppo_fast::", op, ": shape of ", name);
}

// The number of codes and params is part of the schema.
inline void check_options(const std::vector<int64_t>& codes, size_t n_codes,
                          const std::vector<double>& params, size_t n_params, const char* op) {
  PPO_CHECK(codes.size() == n_codes && params.size() == n_params, op,
            "wrong number of codes or params");
}

// Offsets start at 0, never decrease and end at n.
inline void check_cu_seqlens(const std::vector<int64_t>& cu, int64_t n, const char* op) {
  bool good = !cu.empty() && cu.front() == 0 && cu.back() == n;
  for (size_t i = 1; good && i < cu.size(); ++i) good = cu[i - 1] <= cu[i];
  PPO_CHECK(good, op, "cu_seqlens must rise from 0 to the number of tokens");
}

}  // namespace ppo
