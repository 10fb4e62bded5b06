// gae's arguments, read once for every device.
#pragma once

#include "../codes.h"
#include "../tensor/views.h"

namespace ppo {

// `On` is a device: its Layout views tensors, its Args is what the kernels take, and its
// run(args, layout) computes.
template <class On>
std::tuple<Tensor, Tensor, Tensor> gae(
    Tensor rewards, Tensor values, OptTensor mask, OptTensor next_values, OptTensor bootstrap,
    OptTensor terminated, OptTensor truncated, OptTensor cu_seqlens, OptTensor rho, OptTensor c,
    OptTensor lam_adv_tensor, OptTensor lam_ret_tensor, int64_t masked, bool time_major,
    bool lam_adv_per_step, bool lam_ret_per_step, double gamma, double lam_adv, double lam_ret) {
  const typename On::Layout layout("gae", rewards, cu_seqlens, time_major);
  typename On::Args a{};
  a.base.seqs = layout.sequences();
  a.base.values = layout.view(values, "values");
  a.base.mask = layout.view(mask, "mask");
  a.base.bootstrap = layout.per_sequence(bootstrap, "bootstrap");
  a.base.carry = Masked(masked) == Masked::carry;
  a.base.gamma = gamma;
  a.base.decay = gamma * lam_adv;
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
  a.lam_per_step = lam_adv_per_step;
  a.lam_returns_per_step = lam_ret_per_step;
  a.lam = lambda(lam_adv_tensor, lam_adv_per_step, "lam");
  a.lam_returns = lambda(lam_ret_tensor, lam_ret_per_step, "lam_returns");
  a.gamma = gamma;
  a.decay_returns = gamma * lam_ret;
  return On::run(a, layout);
}

}  // namespace ppo
