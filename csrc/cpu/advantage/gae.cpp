// gae.cpu: checks, layouts and threads around the kernel in gae_simd.h.
#include "args.h"

// A chunk is eight steps, one vector of fp32 lanes.
#define PPO_EIGHT_LANES
#define PPO_KERNEL "../advantage/gae_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

constexpr const char* kOp = "gae";

GaeArgs arguments(const Tensor& rewards, const Layout& layout, const std::vector<int64_t>& offsets,
                  const std::vector<int64_t>& codes, const std::vector<double>& params) {
  GaeArgs a{};
  a.rewards = layout.view(rewards);
  a.base.seqs = sequences_of(a.rewards, offsets);
  a.base.zero_masked = codes[0] == int(Masked::zero);
  a.lam_per_step = codes[2] != 0;
  a.lam_returns_per_step = codes[3] != 0;
  a.base.gamma = params[0];
  a.base.decay = params[0] * params[1];
  a.base.decay_returns = params[0] * params[2];
  return a;
}

// A lambda per packed sequence, (S,), is a view whose steps repeat.
View lambda_view(const OptTensor& lam, bool per_step, const Layout& layout, const Tensor& rewards,
                 int64_t sequences) {
  if (!lam) return {};
  if (layout.packed && !per_step) {
    return per_sequence(lam, sequences, kOp, "shape of lam").transposed();
  }
  check_like(rewards, lam, kOp, "lam");
  return layout.view(*lam);
}

// The same lambda for both outputs: one recurrence serves them.
bool differ(const GaeArgs& a) {
  const View &x = a.lam, &y = a.lam_returns;
  return x.data != y.data || x.row_stride != y.row_stride || x.col_stride != y.col_stride ||
         x.dtype != y.dtype || a.lam_per_step != a.lam_returns_per_step ||
         a.base.decay != a.base.decay_returns;
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
  check_like(rewards, values, kOp, "values");
  const std::pair<const OptTensor*, const char*> like[] = {
      {&mask, "mask"},
      {&next_values, "next_values"},
      {&terminated, "terminated"},
      {&truncated, "truncated"},
      {&rho, "rho"},
      {&c, "c"},
  };
  for (const auto& [x, name] : like) check_like(rewards, *x, kOp, name);
  const std::vector<int64_t> offsets = offsets_of(cu_seqlens, rewards, kOp);
  const Layout layout{cu_seqlens.has_value(), codes[1] != 0 && rewards.dim() == 2};
  GaeArgs a = arguments(rewards, layout, offsets, codes, params);
  const int64_t sequences = a.base.seqs.count;
  a.base.bootstrap = per_sequence(bootstrap, sequences, kOp, "shape of bootstrap");
  a.base.values = layout.view(values);
  a.base.mask = layout.view(mask);
  a.next_values = layout.view(next_values);
  a.terminated = layout.view(terminated);
  a.truncated = layout.view(truncated);
  a.rho = layout.view(rho);
  a.c = layout.view(c);
  a.lam = lambda_view(lam, a.lam_per_step, layout, rewards, sequences);
  a.lam_returns = lambda_view(lam_returns, a.lam_returns_per_step, layout, rewards, sequences);
  a.base.own_lambda = differ(a);

  const ScalarType dtype = compute_dtype(rewards);
  Tensor advantages = empty(rewards.sizes(), dtype), returns = empty(rewards.sizes(), dtype);
  a.base.advantages = layout.view(advantages);
  a.base.returns = layout.view(returns);
  const bool columns = layout.time_major && !is_double(rewards);
  const auto kernel = is_double(rewards) ? PPO_SELECT(gae_rows_double)
                      : columns          ? PPO_SELECT(gae_columns)
                                         : PPO_SELECT(gae_rows);
  Tensor moments = run_items(kernel, a, columns);
  return {advantages, returns, moments};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) { m.impl("gae.cpu", TORCH_BOX(&gae)); }

}  // namespace ppo
