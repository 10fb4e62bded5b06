// ppo_fast::value_loss.cpu: loss, statistics and gradients of every form.
#include "driver.h"

#define PPO_KERNEL "../loss/value_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

constexpr char kOp[] = "value_loss";

LossStats run(const ValueArgs& args, const LossSequences& seqs, bool fp64) {
  const auto block = fp64 ? &scalar::value_block<double> : PPO_SELECT(value_block_f);
  LossStats stats = sum_blocks(seqs.tokens(), [&](int64_t first, int64_t last, double* out) {
    block(args, first, last, out);
  });
  stats[kVfNTokens] = seqs.n_tokens();
  stats[kVfLossDenom] = seqs.own_denom(args.options.reduce.reduction);
  return stats;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(Tensor values, OptTensor old_values,
                                                      Tensor returns, OptTensor mask,
                                                      OptTensor cu_seqlens, OptTensor denom,
                                                      std::vector<int64_t> codes,
                                                      std::vector<double> params) {
  check_like(values, old_values, kOp, "old_values");
  check_like(values, returns, kOp, "returns");
  check_like(values, mask, kOp, "mask");
  check_options(codes, 3, params, 3, kOp);
  ValueArgs args{};
  args.options = value_options(codes, params);
  ReduceOptions& reduce = args.options.reduce;
  reduce.denom = scalar_or(denom, reduce.denom);
  reduce.has_denom |= denom.has_value();
  const LossSequences seqs(values, mask, cu_seqlens, reduce.reduction, kOp);
  args.base = seqs.args(reduce);
  args.values = view_of(values);
  if (old_values) args.old_values = view_of(*old_values);
  args.returns = view_of(returns);

  const ScalarType dtype = compute_dtype(values);
  const Gradients grads(values, codes[2]);
  args.grad_values = grads.at(0);
  const LossStats stats = run(args, seqs, is_double(values));
  const LossOutputs out = loss_outputs(stats, stats[kVfLoss], args.base.inverse_denom, dtype);
  return {out.loss, out.stats, out.scale, grads.all};
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("value_loss.cpu", TORCH_BOX(&ppo::value_loss));
}
