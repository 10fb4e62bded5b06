// gae.cuda: checks, layouts and launches of the advantage kernels.
#include "gae.cuh"
#include "plan.h"

namespace ppo::cuda {
namespace {

constexpr const char* kOp = "gae";

template <bool kExtras>
void run_as(GaeArgs& args, const Tensor& main, const Layout& layout) {
  const Device device(main);
  const SequenceLayout& s = args.base.seqs;
  const Regime regime = regime_of(s, layout);
  if (regime != Regime::slabs)
    return run<GaeSource<kExtras>>(kOp, args, main, layout, regime, device);
  args.base.lanes = cover(s.length, kSlab, kSlabs);
  const int64_t blocks = ceil_div(s.count, kAbreast<kExtras> * (kSlabs / args.base.lanes));
  const Tensor workspace = workspace_for(args.base, main, blocks, 0, device);
  launch(kOp, gae_slabs_kernel<kExtras>,
         {dim3(unsigned(blocks)), dim3(kSlabThreads<kExtras>), sizeof(SlabShared<kExtras>), 1,
          device.stream()},
         args);
}

template <bool kExtras>
std::tuple<Tensor, Tensor, Tensor> outputs(GaeArgs& args, const Tensor& main,
                                           const Layout& layout) {
  const Tensor advantages = empty_on(main, main.sizes(), ScalarType::Float);
  const Tensor returns = empty_on(main, main.sizes(), ScalarType::Float);
  const Tensor moments = empty_on(main, {3}, ScalarType::Double);
  args.base.advantages = layout.output(advantages);
  args.base.returns = layout.output(returns);
  args.base.moments = data<double>(moments);
  if (args.base.seqs.count == 0) {
    without_sequences(main, advantages, returns, moments);
  } else {
    run_as<kExtras>(args, main, layout);
  }
  return {advantages, returns, moments};
}

// A lambda per packed sequence, (S,), has steps that repeat it.
Steps lambda_steps(const OptTensor& lam, bool per_step, const Layout& layout,
                   const Tensor& rewards, int64_t sequences) {
  if (lam && layout.packed && !per_step) {
    return per_sequence(lam, sequences, kOp, "shape of lam");
  }
  check_beside(rewards, lam, kOp, "lam");
  return layout.steps(lam);
}

std::tuple<Tensor, Tensor, Tensor> gae(const Tensor rewards, const Tensor values,
                                       const OptTensor mask, const OptTensor next_values,
                                       const OptTensor bootstrap, const OptTensor terminated,
                                       const OptTensor truncated, const OptTensor cu_seqlens,
                                       const OptTensor rho, const OptTensor c, const OptTensor lam,
                                       const OptTensor lam_returns,
                                       const std::vector<int64_t> codes,
                                       const std::vector<double> params) {
  check_options(codes, 4, params, 3, kOp);
  check_beside(rewards, values, kOp, "values");
  const std::pair<const OptTensor*, const char*> like[] = {
      {&mask, "mask"},
      {&next_values, "next_values"},
      {&terminated, "terminated"},
      {&truncated, "truncated"},
      {&rho, "rho"},
      {&c, "c"},
  };
  for (const auto& [x, name] : like) check_beside(rewards, *x, kOp, name);
  const Layout layout{cu_seqlens.has_value(), codes[1] != 0 && rewards.dim() == 2};
  GaeArgs a{};
  AdvantageArgs& base = a.base;
  base.seqs = sequences_of(rewards, cu_seqlens, layout);
  const int64_t sequences = base.seqs.count;
  base.values = layout.steps(values);
  base.mask = layout.steps(mask);
  base.bootstrap = per_sequence(bootstrap, sequences, kOp, "shape of bootstrap");
  base.carry = codes[0] == int(Masked::carry);
  base.gamma = float(params[0]);
  base.decay = float(params[0] * params[1]);
  a.rewards = layout.steps(rewards);
  a.next_values = layout.steps(next_values);
  a.terminated = layout.steps(terminated);
  a.truncated = layout.steps(truncated);
  a.rho = layout.steps(rho);
  a.c = layout.steps(c);
  a.lam_per_step = codes[2] != 0;
  a.lam_returns_per_step = codes[3] != 0;
  a.lam = lambda_steps(lam, a.lam_per_step, layout, rewards, sequences);
  a.lam_returns = lambda_steps(lam_returns, a.lam_returns_per_step, layout, rewards, sequences);
  a.gamma = params[0];
  a.decay_returns = float(params[0] * params[2]);

  const bool extras = next_values || terminated || truncated || rho || c || lam || lam_returns ||
                      params[1] != params[2];
  return extras ? outputs<true>(a, rewards, layout) : outputs<false>(a, rewards, layout);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) { m.impl("gae.cuda", TORCH_BOX(&gae)); }

}  // namespace ppo::cuda
