// ppo_loss's arguments, read once for every device.
#pragma once

#include "../loss_options.h"

namespace ppo {

// `On` is a device, as for value_loss; its policy(...) adds to the options what may be a tensor.
template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    Tensor logprobs, OptTensor old_logprobs, Tensor advantages, OptTensor mask,
    OptTensor is_weights, OptTensor moments, OptTensor entropy, OptTensor ref_logprobs,
    OptTensor cu_seqlens, OptTensor sequence_weights, OptTensor entropy_coef, OptTensor kl_coef,
    OptTensor denom, std::vector<int64_t> codes, std::vector<double> params) {
  constexpr const char* op = "ppo_loss";
  const PolicyOptions options =
      policy_options(codes, params, ref_logprobs.has_value(), moments, op);
  PPO_CHECK(options.variant != Variant::given || is_weights, op, "given needs is_weights");
  const ReduceOptions reduce =
      reduce_options(codes[PolicyCodes::reduction], params[PolicyParams::denom]);
  typename On::Call call(op, logprobs, mask, cu_seqlens, sequence_weights, reduce, denom,
                         codes[PolicyCodes::n_grads]);
  typename On::Args a{{}, On::policy(options, moments, entropy_coef, kl_coef)};
  a.logprobs = call.view(logprobs, "logprobs");
  a.old_logprobs = call.view(old_logprobs, "old_logprobs");
  a.advantages = call.view(advantages, "advantages");
  a.is_weights = call.view(is_weights, "is_weights");
  a.entropy = call.view(entropy, "entropy");
  a.ref_logprobs = call.view(ref_logprobs, "ref_logprobs");
  return On::run(call, a);
}

}  // namespace ppo
