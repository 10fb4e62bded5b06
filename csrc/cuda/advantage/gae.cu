// ppo_fast::gae.cuda: the outputs, the choice of kernel, and its launch.
#include <algorithm>

#include "../../ops/gae.h"
#include "gae.cuh"
#include "plan.h"

namespace ppo::cuda {
namespace {

constexpr int kLeastSlabThreads = 128;

// Whether the steps are dense: in rows, at addresses that vectors of four may have; in columns,
// with offsets of 32 bits.
bool are_dense(GaeArgs& args, Dense how) {
  AdvantageArgs& a = args.base;
  const bool rows = how == Dense::rows;
  a.seqs.pitch = rows ? a.values.seq : a.values.step;
  if (!rows && a.seqs.count + a.seqs.length * a.seqs.pitch > INT32_MAX) return false;
  const auto aligned = [&](const void* p, size_t bytes) {
    return !rows || reinterpret_cast<uintptr_t>(p) % bytes == 0;
  };
  const auto alike = [&](const auto& x) {
    return x.seq == (rows ? a.seqs.pitch : 1) && x.step == (rows ? 1 : a.seqs.pitch);
  };
  const auto input = [&](const Steps& x) {
    return alike(x) && x.dtype == DType::f32 && aligned(x.data, sizeof(Quad));
  };
  const auto output = [&](const Output& x) { return alike(x) && aligned(x.data, sizeof(Quad)); };
  return input(a.values) && input(args.rewards) && output(a.advantages) && output(a.returns) &&
         (!a.mask.data || (alike(a.mask) && aligned(a.mask.data, kGroupSteps)));
}

template <bool kExtras, Dense kDense>
void run_slabs(GaeArgs& args, const Layout& layout, const Device& device) {
  const SequenceLayout& s = args.base.seqs;
  args.base.lanes = cover(s.length, kSlab, kSlabs);
  const int rows = std::max(args.base.lanes, kLeastSlabThreads / kAbreast<kExtras>);
  const int64_t blocks = ceil_div(s.count, kAbreast<kExtras> * (rows / args.base.lanes));
  const Tensor workspace = workspace_for(args.base, layout.main(), blocks, 0, device);
  launch(layout.op(), gae_slabs_kernel<kExtras, kDense>,
         {dim3(unsigned(blocks)), dim3(unsigned(rows * kAbreast<kExtras>)),
          sizeof(SlabShared<kExtras>), 1, device.stream()},
         args);
}

template <bool kExtras>
void run_as(GaeArgs& args, const Layout& layout) {
  const Device device(layout.main());
  const Regime regime = regime_of(args.base.seqs, layout);
  if (regime == Regime::slabs) {
    return !kExtras && are_dense(args, Dense::columns)
               ? run_slabs<false, Dense::columns>(args, layout, device)
               : run_slabs<kExtras, Dense::no>(args, layout, device);
  }
  return !kExtras && are_dense(args, Dense::rows)
             ? run<GaeSource<false, Dense::rows>>(args, layout, regime, device)
             : run<GaeSource<kExtras, Dense::no>>(args, layout, regime, device);
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
