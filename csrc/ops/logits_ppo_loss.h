// logits_ppo_loss's arguments, read once for every device and for each place of the gradient.
#pragma once

#include "../loss_options.h"

namespace ppo {

// `On` is a device and a place of the gradient: its rows(...) and values(...) view the logits and
// the tokens' tensors, its policy(...) adds to the options what may be a tensor, its Args is what
// the kernels take, and its run(logits, tokens, args) computes.
template <class On>
typename On::Result logits_ppo_loss(Tensor logits, Tensor tokens, OptTensor mask,
                                    OptTensor temperature_tensor, OptTensor old_logprobs,
                                    Tensor advantages, OptTensor is_weights, OptTensor moments,
                                    OptTensor ref_logprobs, Tensor weights, OptTensor entropy_coef,
                                    OptTensor kl_coef, double temperature, int64_t ignore_index,
                                    std::vector<int64_t> codes, std::vector<double> params) {
  constexpr const char* op = "logits_ppo_loss";
  const PolicyOptions options =
      policy_options(codes, params, ref_logprobs.has_value(), moments, op);
  PPO_CHECK(!options.by_sequence && options.variant != Variant::given, op,
            "gspo and given need whole sequences");
  typename On::Args a{
      On::rows(op, logits, tokens, mask, temperature_tensor, ignore_index, temperature),
      On::policy(options, moments, entropy_coef, kl_coef)};
  a.old_logprobs = On::values(op, tokens, old_logprobs, "old_logprobs");
  a.advantages = On::values(op, tokens, advantages, "advantages");
  a.is_weights = On::values(op, tokens, is_weights, "is_weights");
  a.ref_logprobs = On::values(op, tokens, ref_logprobs, "ref_logprobs");
  // One weight for all tokens is 0-d.
  a.weights = On::values(op, weights.dim() == 0 ? weights : tokens, weights, "weights");
  return On::run(logits, tokens, a);
}

}  // namespace ppo
