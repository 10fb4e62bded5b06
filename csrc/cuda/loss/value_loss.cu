// ppo_fast::value_loss.cuda: loss, statistics and gradients of every form.
#include "../../ops/value_loss.h"
#include "call.h"
#include "value_loss.cuh"

namespace ppo::cuda {
namespace {

struct ValueOnCuda {
  using Call = LossCall;
  using Args = ValueLossArgs;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> run(LossCall& call, ValueLossArgs& a,
                                                        const ValueOptions& options) {
    call.find_terms(false, Column{}, Column{}, 0.f, 0.f);
    a.base = call.args({a.values, a.old_values, a.returns}, 8);
    a.grad = call.grad(0);
    a.form = options.form;
    a.clip = float(options.clip);
    a.scale = float(options.scale);
    launch("value_loss_kernel", value_loss_kernel<>, call.config(sizeof(LossShared<8>)), a);
    return call.results();
  }
};

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("value_loss.cuda", TORCH_BOX(&ppo::value_loss<ppo::cuda::ValueOnCuda>));
}
