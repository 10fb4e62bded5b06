// ppo_fast::value_loss.cpu: loss, statistics and gradients of every form.
#include "../../ops/value_loss.h"

#include "driver.h"

#define PPO_KERNEL "../loss/value_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

struct ValueOnCpu {
  using Call = LossCall;
  using Args = ValueLossArgs;

  static std::tuple<Tensor, Tensor, Tensor, Tensor> run(const LossCall& call, ValueLossArgs& a,
                                                        const ValueOptions& options) {
    a.base = call.args();
    a.options = options;
    a.grad_values = call.grad(0);
    const auto block = call.fp64() ? &scalar::value_block<double> : PPO_SELECT(value_block_f);
    LossStats stats =
        sum_blocks(call.seqs().tokens(),
                   [&](int64_t first, int64_t last, double* out) { block(a, first, last, out); });
    stats[kVfNTokens] = call.seqs().n_tokens();
    stats[kVfLossDenom] = call.own_denom();
    return call.results(stats, stats[kVfLoss]);
  }
};

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("value_loss.cpu", TORCH_BOX(&ppo::value_loss<ppo::ValueOnCpu>));
}
