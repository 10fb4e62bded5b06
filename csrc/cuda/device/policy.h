// From the op's codes, params and device scalars to what policy.cuh reads.
#pragma once

#include "policy.cuh"
#include "tokens.h"

namespace ppo::cuda {

// codes and params as in ppo_fast/_schema.py.
inline PolicyArg policy_arg(const std::vector<int64_t>& codes, const std::vector<double>& params,
                            const OptTensor& moments, const OptTensor& entropy_coef,
                            const OptTensor& kl_coef, bool has_ref, const char* op) {
  check_options(codes, 5, params, 10, op);
  PolicyOptions o = policy_options(codes, params);
  o.has_ref = has_ref;
  o.whiten = moments.has_value();
  if (moments) check_moments(*moments, op);
  return {o,
          PolicyConsts<float>(o),
          scalar_of(entropy_coef, o.entropy_coef),
          scalar_of(kl_coef, o.kl_coef),
          moments ? static_cast<const double*>(moments->const_data_ptr()) : nullptr,
          moments ? moments->strides()[0] : 0};
}

}  // namespace ppo::cuda
