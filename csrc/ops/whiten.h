// The arguments of moments and whiten, read once for every device.
#pragma once

#include "../tensor/views.h"

namespace ppo {

struct WhitenOptions {
  bool shift_mean, unbiased, eps_at_std;
  double eps;
};

// `On` is a device: its check(op, x, mask) compares shapes, its moments(...) and whiten(...)
// compute.
template <class On>
Tensor moments(Tensor x, OptTensor mask) {
  On::check("whiten", x, mask);
  return On::moments(x, mask);
}

template <class On>
Tensor whiten(Tensor x, OptTensor mask, Tensor moments, bool shift_mean, bool unbiased,
              bool eps_at_std, double eps) {
  constexpr const char* op = "whiten";
  On::check(op, x, mask);
  check_moments(moments, op);
  return On::whiten(x, mask, moments, {shift_mean, unbiased, eps_at_std, eps});
}

}  // namespace ppo
