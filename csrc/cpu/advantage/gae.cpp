// ppo_fast::gae.cpu: the outputs, the choice of kernel, and threads.
#include "../../ops/gae.h"

#include "args.h"

// A chunk is eight steps, one vector of fp32 lanes.
#define PPO_EIGHT_LANES
#define PPO_KERNEL "../advantage/gae_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

// Whether the outputs have lambdas of their own; if not, one recurrence serves both.
bool differ(const GaeArgs& a) {
  const View &x = a.lam, &y = a.lam_returns;
  return x.data != y.data || x.row_stride != y.row_stride || x.col_stride != y.col_stride ||
         x.dtype != y.dtype || a.lam_per_step != a.lam_returns_per_step ||
         a.base.decay != a.decay_returns;
}

struct GaeOnCpu {
  using Layout = ppo::Layout;
  using Args = GaeArgs;

  static std::tuple<Tensor, Tensor, Tensor> run(GaeArgs& a, const Layout& layout) {
    a.own_lambda = differ(a);
    Tensor advantages = layout.output(a.base.advantages);
    Tensor returns = layout.output(a.base.returns);
    const bool fp64 = is_double(layout.main()), columns = layout.time_major() && !fp64;
    const auto kernel = fp64      ? PPO_SELECT(gae_rows_double)
                        : columns ? PPO_SELECT(gae_columns)
                                  : PPO_SELECT(gae_rows);
    Tensor moments = run_items(kernel, a, columns);
    return {advantages, returns, moments};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) { m.impl("gae.cpu", TORCH_BOX(&gae<GaeOnCpu>)); }

}  // namespace ppo
