// ppo_fast::ppo_loss.cpu: loss, statistics and gradients of every variant.
#include "driver.h"

#define PPO_KERNEL "../loss/ppo_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

constexpr char kOp[] = "ppo_loss";

View optional_view(const OptTensor& x) { return x ? view_of(*x) : View{}; }

PolicyOptions read_options(const std::vector<int64_t>& codes, const std::vector<double>& params,
                           const OptTensor& moments, const OptTensor& entropy_coef,
                           const OptTensor& kl_coef, const OptTensor& denom) {
  check_options(codes, 5, params, 10, kOp);
  PolicyOptions o = policy_options(codes, params);
  o.entropy_coef = scalar_or(entropy_coef, o.entropy_coef);
  o.kl_coef = scalar_or(kl_coef, o.kl_coef);
  o.reduce.denom = scalar_or(denom, o.reduce.denom);
  o.reduce.has_denom |= denom.has_value();
  if (moments) {
    const View v = view_of(*moments);
    PPO_CHECK(v.dtype == DType::f64 && v.cols == 3, kOp, "moments must be float64 (3,)");
    const double values[3] = {read_at(v, 0, 0), read_at(v, 0, 1), read_at(v, 0, 2)};
    set_whitening(o, values);
  }
  return o;
}

// gspo: every sequence's mean log-ratio, before the pass that needs it.
std::vector<double> mean_log_ratios(const PolicyArgs& args, const LossSequences& seqs, bool fp64) {
  if (args.options.variant != Variant::gspo) return {};
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

LossStats run(PolicyArgs& args, const LossSequences& seqs, bool fp64) {
  std::vector<double> means = mean_log_ratios(args, seqs, fp64);
  if (!means.empty()) args.mean_log_ratio = means.data();
  const auto block = fp64 ? &scalar::policy_block<double> : PPO_SELECT(policy_block_f);
  LossStats stats = sum_blocks(seqs.tokens(), [&](int64_t first, int64_t last, double* out) {
    block(args, first, last, out);
  });
  stats[kNTokens] = seqs.n_tokens();
  stats[kNSeqs] = seqs.n_seqs();
  stats[kLossDenom] = seqs.own_denom(args.options.reduce.reduction);
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss(
    Tensor logprobs, OptTensor old_logprobs, Tensor advantages, OptTensor mask,
    OptTensor is_weights, OptTensor moments, OptTensor entropy, OptTensor ref_logprobs,
    OptTensor cu_seqlens, OptTensor entropy_coef, OptTensor kl_coef, OptTensor denom,
    std::vector<int64_t> codes, std::vector<double> params) {
  check_like(logprobs, old_logprobs, kOp, "old_logprobs");
  check_like(logprobs, advantages, kOp, "advantages");
  check_like(logprobs, mask, kOp, "mask");
  check_like(logprobs, is_weights, kOp, "is_weights");
  check_like(logprobs, entropy, kOp, "entropy");
  check_like(logprobs, ref_logprobs, kOp, "ref_logprobs");
  PolicyArgs args{};
  args.options = read_options(codes, params, moments, entropy_coef, kl_coef, denom);
  args.options.has_ref = ref_logprobs.has_value();
  const ReduceOptions& reduce = args.options.reduce;
  const LossSequences seqs(logprobs, mask, cu_seqlens, reduce.reduction, kOp);
  args.base = seqs.args(reduce);
  args.logprobs = view_of(logprobs);
  args.old_logprobs = optional_view(old_logprobs);
  args.advantages = view_of(advantages);
  args.is_weights = optional_view(is_weights);
  args.entropy = optional_view(entropy);
  args.ref_logprobs = optional_view(ref_logprobs);

  const ScalarType dtype = compute_dtype(logprobs);
  const Gradients grads(logprobs, codes[4]);
  args.grad_logprobs = grads.at(0);
  args.grad_entropy = grads.at(1);
  const LossStats stats = run(args, seqs, is_double(logprobs));
  const LossOutputs out = loss_outputs(stats, stats[kLoss], args.base.inverse_denom, dtype);
  return {out.loss, out.stats, out.scale, grads.all};
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) { m.impl("ppo_loss.cpu", TORCH_BOX(&ppo::ppo_loss)); }
