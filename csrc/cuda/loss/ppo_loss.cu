// ppo_fast::ppo_loss.cuda: loss, statistics and gradients of every variant.
#include "../../ops/ppo_loss.h"
#include "call.h"
#include "ppo_loss.cuh"

namespace ppo::cuda {
namespace {

// The usual options of most trainers, compiled apart with fewer live registers.
bool usual(const PolicyLossArgs& a) {
  const PolicyOptions& o = a.policy.options;
  return o.estimator == Estimator::k3 && !o.straight_through && !o.has_dual &&
         o.kl_weight == KlWeight::none && !a.is_weights.data && o.log_ratio_min >= -kExpInside &&
         o.log_ratio_max <= kExpInside;
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
    case Variant::given:
      return ppo_loss_kernel<Variant::given, false>;
    default:
      return usual(a) ? ppo_loss_kernel<Variant::clip, true>
                      : ppo_loss_kernel<Variant::clip, false>;
  }
}

struct PolicyOnCuda {
  using Call = LossCall;
  using Args = PolicyLossArgs;

  static PolicyArg policy(const PolicyOptions& options, const OptTensor& moments,
                          const OptTensor& entropy_coef, const OptTensor& kl_coef) {
    return policy_arg(options, moments, entropy_coef, kl_coef);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> run(LossCall& call, PolicyLossArgs& a) {
    const PolicyOptions& o = a.policy.options;
    call.find_terms(o.by_sequence, a.logprobs, a.old_logprobs, float(o.log_ratio_min),
                    float(o.log_ratio_max));
    a.base = call.args(
        {a.logprobs, a.old_logprobs, a.advantages, a.is_weights, a.entropy, a.ref_logprobs}, 16);
    a.grad_logprobs = call.grad(0);
    a.grad_entropy = call.grad(1);
    launch("ppo_loss_kernel", kernel_for(a), call.config(sizeof(LossShared<16>)), a);
    return call.results();
  }
};

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("ppo_loss.cuda", TORCH_BOX(&ppo::ppo_loss<ppo::cuda::PolicyOnCuda>));
}
