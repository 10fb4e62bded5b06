// The losses' options, from the schema's codes and params (ppo_fast/_schema.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "options.h"
#include "tensor/views.h"

namespace ppo {

// The divisor D of a loss; without `has_denom` it is the reduction's own.
struct ReduceOptions {
  Reduction reduction;
  double denom;
  bool has_denom;
};

struct PolicyOptions {
  Variant variant;
  Estimator estimator;
  bool straight_through, has_dual, has_kl_ratio_clip, has_ref, whiten;
  double clip_low, clip_high, dual_clip, log_ratio_min, log_ratio_max;
  double entropy_coef, kl_coef, kl_clamp, kl_ratio_clip;
  double adv_mean, adv_rstd;
};

struct ValueOptions {
  Form form;
  double clip, scale;
  ReduceOptions reduce;
};

inline ReduceOptions reduce_options(int64_t reduction, double denom) {
  return {Reduction(reduction), denom, denom > 0.0};
}

// codes: [variant, estimator, straight_through]; p: [clip_low, clip_high, dual_clip,
// log_ratio_min, log_ratio_max, entropy_coef, kl_coef, kl_clamp, kl_ratio_clip].
inline PolicyOptions policy_options(const int64_t* codes, const double* p, bool has_ref,
                                    const OptTensor& moments, const char* op) {
  PolicyOptions o{};
  o.variant = Variant(codes[0]);
  o.estimator = Estimator(codes[1]);
  o.straight_through = codes[2] != 0;
  o.clip_low = p[0], o.clip_high = p[1], o.dual_clip = p[2];
  o.log_ratio_min = p[3], o.log_ratio_max = p[4];
  o.entropy_coef = p[5], o.kl_coef = p[6], o.kl_clamp = p[7], o.kl_ratio_clip = p[8];
  o.has_dual = std::isfinite(p[2]);
  o.has_kl_ratio_clip = std::isfinite(p[8]);
  o.has_ref = has_ref;
  o.whiten = moments.has_value();
  if (moments) check_moments(*moments, op);
  return o;
}

inline ValueOptions value_options(const std::vector<int64_t>& codes,
                                  const std::vector<double>& p) {
  return {Form(codes[0]), p[0], p[1], reduce_options(codes[1], p[2])};
}

// The options, with the values of CPU tensors filled in. Whitening is shifted and unbiased, 1e-8
// added to the variance; without a variance everything whitens to 0.
inline PolicyOptions with_tensors(PolicyOptions o, const OptTensor& moments,
                                  const OptTensor& entropy_coef, const OptTensor& kl_coef) {
  o.entropy_coef = scalar_or(entropy_coef, o.entropy_coef);
  o.kl_coef = scalar_or(kl_coef, o.kl_coef);
  if (moments) {
    const View v = view_of(*moments);
    const double n = read_at(v, 0, 0), m2 = read_at(v, 0, 2), var = n > 1.0 ? m2 / (n - 1.0) : 0.0;
    o.adv_mean = read_at(v, 0, 1);
    o.adv_rstd = var == 0.0 ? 0.0 : 1.0 / std::sqrt(var + 1e-8);
  }
  return o;
}

}  // namespace ppo
