// The arguments of moments and whiten, read once for every device.
#pragma once

#include "../tensor/views.h"

namespace ppo {

struct WhitenOptions {
  bool shift_mean, unbiased, eps_at_std;
  double eps;
};

// `On` is a device: its check(op, x, mask) compares shapes, its moments(...) and whiten(...)
// compute. Codes and params are those of ppo_fast/_schema.py.
template <class On>
Tensor moments(Tensor x, OptTensor mask) {
  On::check("whiten", x, mask);
  return On::moments(x, mask);
}

template <class On>
Tensor whiten(Tensor x, OptTensor mask, Tensor moments, std::vector<int64_t> codes,
              std::vector<double> params) {
  constexpr const char* op = "whiten";
  check_options(codes, 3, params, 1, op);
  On::check(op, x, mask);
  check_moments(moments, op);
  return On::whiten(x, mask, moments,
                    {codes[0] != 0, codes[1] != 0, codes[2] != 0, params[0]});
}

}  // namespace ppo
