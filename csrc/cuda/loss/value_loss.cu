// ppo_fast::value_loss.cuda: loss, statistics and gradients of every form.
#include "call.h"
#include "value_loss.cuh"

namespace ppo::cuda {
namespace {

constexpr char kOp[] = "value_loss";

std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(Tensor values, OptTensor old_values,
                                                      Tensor returns, OptTensor mask,
                                                      OptTensor cu_seqlens, OptTensor denom,
                                                      std::vector<int64_t> codes,
                                                      std::vector<double> params) {
  check_beside(values, old_values, kOp, "old_values");
  check_beside(values, returns, kOp, "returns");
  check_beside(values, mask, kOp, "mask");
  check_options(codes, 3, params, 3, kOp);
  const ValueOptions options = value_options(codes, params);
  const LossOutputs out(values, codes[2]);
  LossCall call(values, mask, cu_seqlens, options.reduce, denom, out, kOp);
  call.find_terms(false, Column{}, Column{}, 0.f, 0.f);
  ValueLossArgs a{};
  a.values = column_of(values, call.shape());
  a.old_values = column_of(old_values, call.shape());
  a.returns = column_of(returns, call.shape());
  a.base = call.args({a.values, a.old_values, a.returns}, 8);
  a.grad = out.grad(0);
  a.form = options.form;
  a.clip = float(options.clip);
  a.scale = float(options.scale);
  launch("value_loss_kernel", value_loss_kernel<>, call.config(sizeof(LossShared<8>)), a);
  return {out.loss, out.stats, out.scale, out.grads};
}

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("value_loss.cuda", TORCH_BOX(&ppo::cuda::value_loss));
}
