// The losses' options, from the schema's codes and params (ppo_fast/_schema.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "options.h"

namespace ppo {

// D = 0 stands for "the reduction's own".
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
  ReduceOptions reduce;
};

struct ValueOptions {
  Form form;
  double clip, scale;
  ReduceOptions reduce;
};

// Coefficients and D given as tensors are put in afterwards.
inline PolicyOptions policy_options(const std::vector<int64_t>& codes,
                                    const std::vector<double>& p) {
  PolicyOptions o{};
  o.variant = Variant(codes[0]);
  o.estimator = Estimator(codes[1]);
  o.straight_through = codes[2] != 0;
  o.clip_low = p[0], o.clip_high = p[1], o.dual_clip = p[2];
  o.log_ratio_min = p[3], o.log_ratio_max = p[4];
  o.entropy_coef = p[5], o.kl_coef = p[6], o.kl_clamp = p[7], o.kl_ratio_clip = p[8];
  o.has_dual = std::isfinite(p[2]);
  o.has_kl_ratio_clip = std::isfinite(p[8]);
  o.reduce = {Reduction(codes[3]), p[9], p[9] > 0.0};
  return o;
}

inline ValueOptions value_options(const std::vector<int64_t>& codes,
                                  const std::vector<double>& p) {
  return {Form(codes[0]), p[0], p[1], {Reduction(codes[1]), p[2], p[2] > 0.0}};
}

// Whitening from (count, mean, M2): shifted, unbiased, 1e-8 added to the variance; without a
// variance everything whitens to 0.
inline void set_whitening(PolicyOptions& o, const double* moments) {
  const double var = moments[0] > 1.0 ? moments[2] / (moments[0] - 1.0) : 0.0;
  o.whiten = true;
  o.adv_mean = moments[1];
  o.adv_rstd = var == 0.0 ? 0.0 : 1.0 / std::sqrt(var + 1e-8);
}

}  // namespace ppo
