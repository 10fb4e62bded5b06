// From an op's number, or the 0-d tensor that replaces it, to what scalar.cuh reads.
#pragma once

#include "launch.h"
#include "scalar.cuh"

namespace ppo::cuda {

inline ScalarArg scalar_of(const OptTensor& x, double number) {
  return x ? ScalarArg{x->const_data_ptr(), dtype_of(*x), number}
           : ScalarArg{nullptr, DType::f32, number};
}

}  // namespace ppo::cuda
