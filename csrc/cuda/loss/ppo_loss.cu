// ppo_fast::ppo_loss.cuda: loss, statistics and gradients of every variant.
#include "call.h"
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

constexpr char kOp[] = "ppo_loss";

// What most trainers ask for is compiled apart, with fewer live registers.
bool usual(const PolicyLossArgs& a) {
  const PolicyOptions& o = a.policy.options;
  return o.estimator == Estimator::k3 && !o.straight_through && !o.has_dual &&
         !a.is_weights.data && o.log_ratio_min >= -kExpInside && o.log_ratio_max <= kExpInside;
}

using Kernel = void (*)(PolicyLossArgs);

Kernel kernel_for(const PolicyLossArgs& a) {
  switch (a.policy.options.variant) {
    case Variant::gspo:
      return ppo_loss_kernel<Variant::gspo, false>;
    case Variant::cispo:
      return ppo_loss_kernel<Variant::cispo, false>;
    case Variant::penalty:
      return ppo_loss_kernel<Variant::penalty, false>;
    case Variant::linear:
      return ppo_loss_kernel<Variant::linear, false>;
    default:
      return usual(a) ? ppo_loss_kernel<Variant::clip, true>
                      : ppo_loss_kernel<Variant::clip, false>;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    Tensor logprobs, OptTensor old_logprobs, Tensor advantages, OptTensor mask,
    OptTensor is_weights, OptTensor moments, OptTensor entropy, OptTensor ref_logprobs,
    OptTensor cu_seqlens, OptTensor entropy_coef, OptTensor kl_coef, OptTensor denom,
    std::vector<int64_t> codes, std::vector<double> params) {
  check_beside(logprobs, old_logprobs, kOp, "old_logprobs");
  check_beside(logprobs, advantages, kOp, "advantages");
  check_beside(logprobs, mask, kOp, "mask");
  check_beside(logprobs, is_weights, kOp, "is_weights");
  check_beside(logprobs, entropy, kOp, "entropy");
  check_beside(logprobs, ref_logprobs, kOp, "ref_logprobs");
  PolicyLossArgs a{
      {},
      policy_arg(codes, params, moments, entropy_coef, kl_coef, ref_logprobs.has_value(), kOp)};
  const PolicyOptions& options = a.policy.options;
  const LossOutputs out(logprobs, codes[4]);
  LossCall call(logprobs, mask, cu_seqlens, options.reduce, denom, out, kOp);
  const TokenShape& shape = call.shape();
  a.logprobs = column_of(logprobs, shape);
  a.old_logprobs = column_of(old_logprobs, shape);
  a.advantages = column_of(advantages, shape);
  a.is_weights = column_of(is_weights, shape);
  a.entropy = column_of(entropy, shape);
  a.ref_logprobs = column_of(ref_logprobs, shape);
  call.find_terms(options.variant == Variant::gspo, a.logprobs, a.old_logprobs,
                  float(options.log_ratio_min), float(options.log_ratio_max));
  a.base = call.args(
      {a.logprobs, a.old_logprobs, a.advantages, a.is_weights, a.entropy, a.ref_logprobs}, 16);
  a.grad_logprobs = out.grad(0);
  a.grad_entropy = out.grad(1);
  launch("ppo_loss_kernel", kernel_for(a), call.config(sizeof(LossShared<16>)), a);
  return {out.loss, out.stats, out.scale, out.grads};
}

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("ppo_loss.cuda", TORCH_BOX(&ppo::cuda::ppo_loss));
}
