// gae's arguments, read once for every device.
#pragma once

#include "../options.h"
#include "../tensor/views.h"

namespace ppo {

// `On` is a device: its Layout views tensors, its Args is what the kernels take, and its
// run(args, layout) computes. Codes and params are those of ppo_fast/_schema.py.
template <class On>
std::tuple<Tensor, Tensor, Tensor> gae(Tensor rewards, Tensor values, OptTensor mask,
                                       OptTensor next_values, OptTensor bootstrap,
                                       OptTensor terminated, OptTensor truncated,
                                       OptTensor cu_seqlens, OptTensor rho, OptTensor c,
                                       OptTensor lam, OptTensor lam_returns,
                                       std::vector<int64_t> codes, std::vector<double> params) {
  constexpr const char* op = "gae";
  check_options(codes, 4, params, 3, op);
  const typename On::Layout layout(op, rewards, cu_seqlens, codes[1] != 0);
  typename On::Args a{};
  a.base.seqs = layout.sequences();
  a.base.values = layout.view(values, "values");
  a.base.mask = layout.view(mask, "mask");
  a.base.bootstrap = layout.per_sequence(bootstrap, "bootstrap");
  a.base.carry = Masked(codes[0]) == Masked::carry;
  a.base.gamma = params[0];
  a.base.decay = params[0] * params[1];
  a.rewards = layout.view(rewards, "rewards");
  a.next_values = layout.view(next_values, "next_values");
  a.terminated = layout.view(terminated, "terminated");
  a.truncated = layout.view(truncated, "truncated");
  a.rho = layout.view(rho, "rho");
  a.c = layout.view(c, "c");
  // A lambda that is not one per step has the rewards' shape already, or is (S,) where packed.
  const auto lambda = [&](const OptTensor& x, bool per_step, const char* name) {
    return layout.packed() && !per_step ? layout.per_sequence(x, name) : layout.view(x, name);
  };
  a.lam_per_step = codes[2] != 0;
  a.lam_returns_per_step = codes[3] != 0;
  a.lam = lambda(lam, a.lam_per_step, "lam");
  a.lam_returns = lambda(lam_returns, a.lam_returns_per_step, "lam_returns");
  a.gamma = params[0];
  a.decay_returns = params[0] * params[2];
  return On::run(a, layout);
}

}  // namespace ppo
