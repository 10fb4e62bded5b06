// ppo_fast::rlhf_advantages.cuda: the outputs, the choice of kernel, and its launch.
#include "../../ops/rlhf_advantages.h"
#include "plan.h"
#include "rlhf_advantages.cuh"

namespace ppo::cuda {
namespace {

struct RlhfOnCuda {
  using Layout = cuda::Layout;
  using Args = RlhfArgs;

  static ScalarArg scalar(const OptTensor& x, double number) { return scalar_of(x, number); }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run(RlhfArgs& a,
                                                                const Layout& layout) {
    AdvantageArgs& base = a.base;
    const Tensor advantages = layout.output(base.advantages);
    const Tensor returns = layout.output(base.returns);
    const Tensor rewards = layout.output(base.rewards), kl = layout.output(base.kl);
    const Tensor moments = empty_on(layout.main(), {3}, ScalarType::Double);
    base.moments = data<double>(moments);
    if (base.seqs.count == 0) {
      without_sequences(layout.main(), advantages, returns, rewards, kl, moments);
    } else {
      cuda::run<RlhfSource>(a, layout, regime_of(base.seqs, layout), Device(layout.main()));
    }
    return {advantages, returns, rewards, kl, moments};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("rlhf_advantages.cuda", TORCH_BOX(&rlhf_advantages<RlhfOnCuda>));
}

}  // namespace ppo::cuda
