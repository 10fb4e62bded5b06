// ppo_fast::gae.cuda: the outputs, the choice of kernel, and its launch.
#include "../../ops/gae.h"
#include "gae.cuh"
#include "plan.h"

namespace ppo::cuda {
namespace {

template <bool kExtras>
void run_as(GaeArgs& args, const Layout& layout) {
  const Device device(layout.main());
  const SequenceLayout& s = args.base.seqs;
  const Regime regime = regime_of(s, layout);
  if (regime != Regime::slabs) return run<GaeSource<kExtras>>(args, layout, regime, device);
  args.base.lanes = cover(s.length, kSlab, kSlabs);
  const int64_t blocks = ceil_div(s.count, kAbreast<kExtras> * (kSlabs / args.base.lanes));
  const Tensor workspace = workspace_for(args.base, layout.main(), blocks, 0, device);
  launch(layout.op(), gae_slabs_kernel<kExtras>,
         {dim3(unsigned(blocks)), dim3(kSlabThreads<kExtras>), sizeof(SlabShared<kExtras>), 1,
          device.stream()},
         args);
}

// Whether there is an optional input other than mask and bootstrap, or two lambdas.
bool has_extras(const GaeArgs& a) {
  return a.next_values.data || a.terminated.data || a.truncated.data || a.rho.data || a.c.data ||
         a.lam.data || a.lam_returns.data || a.base.decay != a.decay_returns;
}

struct GaeOnCuda {
  using Layout = cuda::Layout;
  using Args = GaeArgs;

  static std::tuple<Tensor, Tensor, Tensor> run(GaeArgs& a, const Layout& layout) {
    const Tensor advantages = layout.output(a.base.advantages);
    const Tensor returns = layout.output(a.base.returns);
    const Tensor moments = empty_on(layout.main(), {3}, ScalarType::Double);
    a.base.moments = data<double>(moments);
    if (a.base.seqs.count == 0) {
      without_sequences(layout.main(), advantages, returns, moments);
    } else if (has_extras(a)) {
      run_as<true>(a, layout);
    } else {
      run_as<false>(a, layout);
    }
    return {advantages, returns, moments};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("gae.cuda", TORCH_BOX(&gae<GaeOnCuda>));
}

}  // namespace ppo::cuda
