// ppo_fast::rlhf_advantages.cpu: the outputs, the choice of kernel, and threads.
#include "../../ops/rlhf_advantages.h"

#include "../../loss_options.h"
#include "args.h"

// A chunk is eight steps, one vector of fp32 lanes.
#define PPO_EIGHT_LANES
#define PPO_KERNEL "../advantage/rlhf_advantages_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

struct RlhfOnCpu {
  using Layout = ppo::Layout;
  using Args = RlhfArgs;

  static double scalar(const OptTensor& x, double number) { return scalar_or(x, number); }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run(RlhfArgs& a,
                                                                const Layout& layout) {
    Tensor advantages = layout.output(a.base.advantages);
    Tensor returns = layout.output(a.base.returns);
    Tensor rewards = layout.output(a.rewards), kl = layout.output(a.kl);
    const auto kernel =
        is_double(layout.main()) ? PPO_SELECT(rlhf_rows_double) : PPO_SELECT(rlhf_rows);
    Tensor moments = run_items(kernel, a, false);
    return {advantages, returns, rewards, kl, moments};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("rlhf_advantages.cpu", TORCH_BOX(&rlhf_advantages<RlhfOnCpu>));
}

}  // namespace ppo
