// rlhf_advantages' arguments, read once for every device.
#pragma once

#include "../options.h"
#include "../tensor/views.h"

namespace ppo {

// `On` is a device, as for gae; its scalar(tensor, number) is a number that may be a tensor.
template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rlhf_advantages(
    Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask,
    OptTensor bootstrap, OptTensor cu_seqlens, OptTensor kl_coef, std::vector<int64_t> codes,
    std::vector<double> params) {
  constexpr const char* op = "rlhf_advantages";
  check_options(codes, 3, params, 6, op);
  const typename On::Layout layout(op, logprobs, cu_seqlens, false);
  typename On::Args a{};
  a.base.seqs = layout.sequences();
  a.base.values = layout.view(values, "values");
  a.base.mask = layout.view(mask, "mask");
  a.base.bootstrap = layout.per_sequence(bootstrap, "bootstrap");
  a.base.carry = Masked(codes[0]) == Masked::carry;
  a.base.gamma = params[0];
  a.base.decay = params[0] * params[1];
  a.logprobs = layout.view(logprobs, "logprobs");
  a.ref_logprobs = layout.view(ref_logprobs, "ref_logprobs");
  a.estimator = Estimator(codes[1]);
  a.score_at = ScoreAt(codes[2]);
  a.scores = a.score_at == ScoreAt::per_token ? layout.view(scores, "scores")
                                              : layout.per_sequence(scores, "scores");
  a.kl_coef = On::scalar(kl_coef, params[2]);
  a.kl_clamp = params[3];
  a.reward_min = params[4];
  a.reward_max = params[5];
  return On::run(a, layout);
}

}  // namespace ppo
