// rlhf_advantages.cuda: checks, layouts and launches of the advantage kernels.
#include "plan.h"
#include "rlhf_advantages.cuh"

namespace ppo::cuda {
namespace {

constexpr const char* kOp = "rlhf_advantages";

RlhfArgs options(const std::vector<int64_t>& codes, const std::vector<double>& params,
                 const OptTensor& kl_coef) {
  RlhfArgs a{};
  a.base.carry = codes[0] == int(Masked::carry);
  a.estimator = Estimator(codes[1]);
  a.score_at = ScoreAt(codes[2]);
  a.base.gamma = float(params[0]);
  a.base.decay = float(params[0] * params[1]);
  a.kl_coef = scalar_of(kl_coef, params[2]);
  a.kl_clamp = float(params[3]);
  a.reward_min = float(params[4]);
  a.reward_max = float(params[5]);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rlhf_advantages(
    const Tensor scores, const Tensor logprobs, const Tensor ref_logprobs, const Tensor values,
    const Tensor mask, const OptTensor bootstrap, const OptTensor cu_seqlens,
    const OptTensor kl_coef, const std::vector<int64_t> codes, const std::vector<double> params) {
  check_options(codes, 3, params, 6, kOp);
  check_beside(logprobs, ref_logprobs, kOp, "ref_logprobs");
  check_beside(logprobs, values, kOp, "values");
  check_beside(logprobs, mask, kOp, "mask");
  const Layout layout{cu_seqlens.has_value(), false};
  RlhfArgs a = options(codes, params, kl_coef);
  AdvantageArgs& base = a.base;
  base.seqs = sequences_of(logprobs, cu_seqlens, layout);
  a.logprobs = layout.steps(logprobs);
  a.ref_logprobs = layout.steps(ref_logprobs);
  base.values = layout.steps(values);
  base.mask = layout.steps(mask);
  base.bootstrap = per_sequence(bootstrap, base.seqs.count, kOp, "shape of bootstrap");
  if (a.score_at == ScoreAt::per_token) {
    check_beside(logprobs, scores, kOp, "scores");
    a.scores = layout.steps(scores);
  } else {
    a.scores = per_sequence(scores, base.seqs.count, kOp, "shape of scores");
  }
  std::vector<Tensor> out;
  for (Output* x : {&base.advantages, &base.returns, &base.rewards, &base.kl}) {
    out.push_back(empty_on(logprobs, logprobs.sizes(), ScalarType::Float));
    *x = layout.output(out.back());
  }
  const Tensor moments = empty_on(logprobs, {3}, ScalarType::Double);
  base.moments = data<double>(moments);
  if (base.seqs.count == 0) {
    without_sequences(logprobs, out[0], out[1], out[2], out[3], moments);
  } else {
    run<RlhfSource>(kOp, a, logprobs, layout, regime_of(base.seqs, layout), Device(logprobs));
  }
  return {out[0], out[1], out[2], out[3], moments};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("rlhf_advantages.cuda", TORCH_BOX(&rlhf_advantages));
}

}  // namespace ppo::cuda
