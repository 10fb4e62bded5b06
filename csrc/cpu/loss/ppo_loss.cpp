// ppo_fast::ppo_loss.cpu: loss, statistics and gradients of every variant.
#include "../../ops/ppo_loss.h"

#include "driver.h"

#define PPO_KERNEL "../loss/ppo_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

// Mean log-ratio of every sequence, where the ratio is the sequence's, before the pass that needs
// it.
std::vector<double> mean_log_ratios(const PolicyLossArgs& args, const LossSequences& seqs,
                                    bool fp64) {
  if (!args.policy.by_sequence) return {};
  const auto mean = fp64 ? &scalar::mean_log_ratio<double> : PPO_SELECT(mean_log_ratio_f);
  const int64_t count = seqs.map().count, tokens = std::max<int64_t>(seqs.tokens(), 1);
  std::vector<double> out(static_cast<size_t>(count));
  parallel_for(count, std::max<int64_t>(1, kGrain * count / tokens),
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s)
                   out[size_t(s)] = mean(args, s, seqs.live(s));
               });
  return out;
}

struct PolicyOnCpu {
  using Call = LossCall;
  using Args = PolicyLossArgs;

  static PolicyOptions policy(const PolicyOptions& options, const OptTensor& moments,
                              const OptTensor& entropy_coef, const OptTensor& kl_coef) {
    return with_tensors(options, moments, entropy_coef, kl_coef);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> run(const LossCall& call, PolicyLossArgs& a) {
    a.base = call.args();
    a.grad_logprobs = call.grad(0);
    a.grad_entropy = call.grad(1);
    const LossSequences& seqs = call.seqs();
    std::vector<double> means = mean_log_ratios(a, seqs, call.fp64());
    if (!means.empty()) a.mean_log_ratio = means.data();
    const auto block = call.fp64() ? &scalar::policy_block<double> : PPO_SELECT(policy_block_f);
    LossStats stats = sum_blocks(seqs.tokens(), [&](int64_t first, int64_t last, double* out) {
      block(a, first, last, out);
    });
    stats[kNTokens] = seqs.n_tokens();
    stats[kNSeqs] = seqs.n_seqs();
    stats[kLossDenom] = call.own_denom();
    return call.results(stats, stats[kLoss]);
  }
};

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("ppo_loss.cpu", TORCH_BOX(&ppo::ppo_loss<ppo::PolicyOnCpu>));
}
