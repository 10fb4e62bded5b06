// rlhf_advantages' arguments, read once for every device.
#pragma once

#include "../codes.h"
#include "../tensor/views.h"

namespace ppo {

// `On` is a device, as for gae; its scalar(tensor, number) is a number that may be a tensor.
template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rlhf_advantages(
    Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask,
    OptTensor bootstrap, OptTensor cu_seqlens, OptTensor kl_coef_tensor, int64_t masked,
    int64_t estimator, int64_t score_at, double gamma, double lam, double kl_coef, double kl_clamp,
    double reward_min, double reward_max) {
  const typename On::Layout layout("rlhf_advantages", logprobs, cu_seqlens, false);
  typename On::Args a{};
  a.base.seqs = layout.sequences();
  a.base.values = layout.view(values, "values");
  a.base.mask = layout.view(mask, "mask");
  a.base.bootstrap = layout.per_sequence(bootstrap, "bootstrap");
  a.base.carry = Masked(masked) == Masked::carry;
  a.base.gamma = gamma;
  a.base.decay = gamma * lam;
  a.logprobs = layout.view(logprobs, "logprobs");
  a.ref_logprobs = layout.view(ref_logprobs, "ref_logprobs");
  a.estimator = Estimator(estimator);
  a.score_at = ScoreAt(score_at);
  a.scores = a.score_at == ScoreAt::per_token ? layout.view(scores, "scores")
                                              : layout.per_sequence(scores, "scores");
  a.kl_coef = On::scalar(kl_coef_tensor, kl_coef);
  a.kl_clamp = kl_clamp;
  a.reward_min = reward_min;
  a.reward_max = reward_max;
  return On::run(a, layout);
}

}  // namespace ppo
