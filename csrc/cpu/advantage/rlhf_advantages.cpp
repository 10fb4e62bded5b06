// rlhf_advantages.cpu: checks, layouts and threads around the kernel in rlhf_advantages_simd.h.
#include "../../loss_options.h"
#include "args.h"

// A chunk is eight steps, one vector of fp32 lanes.
#define PPO_EIGHT_LANES
#define PPO_KERNEL "../advantage/rlhf_advantages_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

constexpr const char* kOp = "rlhf_advantages";

RlhfArgs options(const std::vector<int64_t>& codes, const std::vector<double>& params,
                 const OptTensor& kl_coef) {
  RlhfArgs a{};
  a.base.zero_masked = codes[0] == int(Masked::zero);
  a.estimator = Estimator(codes[1]);
  a.score_at = ScoreAt(codes[2]);
  a.base.gamma = params[0];
  a.base.decay = a.base.decay_returns = params[0] * params[1];
  a.kl_coef = scalar_or(kl_coef, params[2]);
  a.kl_clamp = params[3];
  a.reward_min = params[4];
  a.reward_max = params[5];
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rlhf_advantages(
    const Tensor scores, const Tensor logprobs, const Tensor ref_logprobs, const Tensor values,
    const Tensor mask, const OptTensor bootstrap, const OptTensor cu_seqlens,
    const OptTensor kl_coef, const std::vector<int64_t> codes, const std::vector<double> params) {
  check_options(codes, 3, params, 6, kOp);
  check_like(logprobs, ref_logprobs, kOp, "ref_logprobs");
  check_like(logprobs, values, kOp, "values");
  check_like(logprobs, mask, kOp, "mask");
  const std::vector<int64_t> offsets = offsets_of(cu_seqlens, logprobs, kOp);
  const Layout layout{cu_seqlens.has_value(), false};
  RlhfArgs a = options(codes, params, kl_coef);
  a.logprobs = layout.view(logprobs);
  a.ref_logprobs = layout.view(ref_logprobs);
  a.base.values = layout.view(values);
  a.base.mask = layout.view(mask);
  a.base.seqs = sequences_of(a.logprobs, offsets);
  a.base.bootstrap = per_sequence(bootstrap, a.base.seqs.count, kOp, "shape of bootstrap");
  if (a.score_at == ScoreAt::per_token) {
    check_like(logprobs, scores, kOp, "scores");
    a.scores = layout.view(scores);
  } else {
    a.scores = per_sequence(scores, a.base.seqs.count, kOp, "shape of scores");
  }
  const ScalarType dtype = compute_dtype(logprobs);
  Tensor out[4];
  View* const views[4] = {&a.base.advantages, &a.base.returns, &a.rewards, &a.kl};
  for (int i = 0; i < 4; ++i) {
    out[i] = empty(logprobs.sizes(), dtype);
    *views[i] = layout.view(out[i]);
  }
  const auto kernel = is_double(logprobs) ? PPO_SELECT(rlhf_rows_double) : PPO_SELECT(rlhf_rows);
  Tensor moments = run_items(kernel, a, false);
  return {out[0], out[1], out[2], out[3], moments};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("rlhf_advantages.cpu", TORCH_BOX(&rlhf_advantages));
}

}  // namespace ppo
