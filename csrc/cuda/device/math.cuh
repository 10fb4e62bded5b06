// Token maths on host and device: the vocabulary of cpu/simd/simd.h for one float, csrc/math.h
// over it as ppo::cuda::policy_terms and the rest, and a policy loss's options. Multiply-add is
// fused where it says vfma and nowhere else (-fmad=false, -ffp-contract=off).
#pragma once

#include <cmath>

#include "../../loss_options.h"
#include "tensor.cuh"

#define PPO_ISA cuda
#define PPO_INLINE PPO_HOST_DEVICE

namespace ppo::cuda {

template <class T>
using scalar_t = T;
template <class T>
using mask_t = bool;
template <class T>
constexpr int lanes = 1;

template <class T>
PPO_INLINE T set1(T x) {
  return x;
}
template <class T>
PPO_INLINE bool first_n(int64_t n) {
  return n > 0;
}
PPO_INLINE float vfma(float a, float b, float c) { return ::fmaf(a, b, c); }
PPO_INLINE float select(bool m, float a, float b) { return m ? a : b; }
PPO_INLINE float vmin(float a, float b) { return a < b ? a : b; }
PPO_INLINE float vmax(float a, float b) { return a > b ? a : b; }
PPO_INLINE float vabs(float a) { return ::fabsf(a); }
PPO_INLINE float vsqrt(float a) { return ::sqrtf(a); }
PPO_INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
// The integer n is read from the low bits of n + 1.5 * 2^23.
PPO_INLINE float pow2(float n) {
  union {
    float x;
    uint32_t bits;
  } at{n + 0x1.8p23f};
  at.bits = (at.bits << 23) + 0x3f800000u;
  return at.x;
}

}  // namespace ppo::cuda

#include "../../math.h"

namespace ppo::cuda {

// Options of a policy loss, by value in a kernel's parameters. `consts` are formed on the host,
// except for the numbers that `resolve` reads.
struct PolicyArg {
  PolicyOptions options;
  PolicyConsts<float> consts;
  ScalarArg entropy_coef, kl_coef;
  const double* moments;  // null: no whitening; count, mean, M2 are `moments_stride` apart
  int64_t moments_stride;
};

// Constants with the coefficients and the whitening from device memory filled in.
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

// Terms of the variant chosen at run time; never gspo, whose ratio belongs to the
// sequence, nor given.
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

inline PolicyArg policy_arg(const PolicyOptions& o, const OptTensor& moments,
                            const OptTensor& entropy_coef, const OptTensor& kl_coef) {
  return {o,
          PolicyConsts<float>(o),
          scalar_of(entropy_coef, o.entropy_coef),
          scalar_of(kl_coef, o.kl_coef),
          moments ? static_cast<const double*>(moments->const_data_ptr()) : nullptr,
          moments ? moments->strides()[0] : 0};
}

}  // namespace ppo::cuda
