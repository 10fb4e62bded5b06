// What a policy loss needs on the device besides its tokens: options, and numbers that may live in
// device memory. The token maths is csrc/math.h, shared with the CPU.
#pragma once

#include "math.cuh"
#include "scalar.cuh"

namespace ppo::cuda {

// By value in a kernel's parameters; `consts` are formed on the host, but for what `resolve`
// reads.
struct PolicyArg {
  PolicyOptions options;
  PolicyConsts<float> consts;
  ScalarArg entropy_coef, kl_coef;
  const double* moments;  // null: no whitening; count, mean, M2 are `moments_stride` apart
  int64_t moments_stride;
};

// The constants, with the coefficients and the whitening that live on the device.
PPO_DEVICE PolicyConsts<float> resolve(const PolicyArg& a) {
  PolicyConsts<float> c = a.consts;
  if (a.entropy_coef.data) c.entropy_coef = float(read(a.entropy_coef));
  if (a.kl_coef.data) c.kl_coef = float(read(a.kl_coef));
  if (a.moments) {
    const double n = a.moments[0], mean = a.moments[a.moments_stride];
    const double m2 = a.moments[2 * a.moments_stride];
    const double var = n > 1.0 ? m2 / (n - 1.0) : 0.0;
    c.adv_mean_hi = float(mean);
    c.adv_mean_lo = float(mean - double(c.adv_mean_hi));
    c.adv_rstd = var == 0.0 ? 0.f : float(1.0 / sqrt(var + 1e-8));
  }
  return c;
}

// The variant chosen at run time; never gspo, whose ratio is its sequence's.
PPO_DEVICE PolicyTerms<float> policy_terms_of(const PolicyOptions& o, const PolicyConsts<float>& c,
                                              const PolicyToken<float>& t) {
  switch (o.variant) {
    case Variant::cispo:
      return policy_terms<Variant::cispo, false>(o, c, t);
    case Variant::penalty:
      return policy_terms<Variant::penalty, false>(o, c, t);
    case Variant::linear:
      return policy_terms<Variant::linear, false>(o, c, t);
    default:
      return policy_terms<Variant::clip, false>(o, c, t);
  }
}

}  // namespace ppo::cuda
