// The losses' options, from the codes and params of their schemas (ppo_fast/_boundary).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "codes.h"
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
  KlWeight kl_weight;
  bool straight_through, has_dual, has_kl_ratio_clip, has_ref, whiten;
  bool by_sequence;  // the ratio is the sequence's
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

// Check: the schema fixes the number of codes and params.
inline void check_options(const std::vector<int64_t>& codes, int n_codes,
                          const std::vector<double>& params, int n_params, const char* op) {
  PPO_CHECK(codes.size() == size_t(n_codes) && params.size() == size_t(n_params), op,
            "wrong number of codes or params");
}

inline PolicyOptions policy_options(const std::vector<int64_t>& codes,
                                    const std::vector<double>& params, bool has_ref,
                                    const OptTensor& moments, const char* op) {
  using C = PolicyCodes;
  using P = PolicyParams;
  check_options(codes, C::count, params, P::count, op);
  PolicyOptions o{};
  o.variant = Variant(codes[C::variant]);
  o.estimator = Estimator(codes[C::estimator]);
  o.straight_through = codes[C::straight_through] != 0;
  o.kl_weight = KlWeight(codes[C::kl_weight]);
  o.by_sequence = o.variant == Variant::gspo || codes[C::by_sequence] != 0;
  o.clip_low = params[P::clip_low];
  o.clip_high = params[P::clip_high];
  o.dual_clip = params[P::dual_clip];
  o.log_ratio_min = params[P::log_ratio_min];
  o.log_ratio_max = params[P::log_ratio_max];
  o.entropy_coef = params[P::entropy_coef];
  o.kl_coef = params[P::kl_coef];
  o.kl_clamp = params[P::kl_clamp];
  o.kl_ratio_clip = params[P::kl_ratio_clip];
  o.has_dual = std::isfinite(o.dual_clip);
  o.has_kl_ratio_clip = std::isfinite(o.kl_ratio_clip);
  o.has_ref = has_ref;
  o.whiten = moments.has_value() && o.variant != Variant::given;
  if (moments) check_moments(*moments, op);
  return o;
}

inline ValueOptions value_options(const std::vector<int64_t>& codes,
                                  const std::vector<double>& params, const char* op) {
  using C = ValueCodes;
  using P = ValueParams;
  check_options(codes, C::count, params, P::count, op);
  return {Form(codes[C::form]), params[P::clip], params[P::scale],
          reduce_options(codes[C::reduction], params[P::denom])};
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
