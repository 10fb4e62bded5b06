// A number of an op that may be a 0-d tensor on the device.
#pragma once

#include "tensor.cuh"

namespace ppo::cuda {

struct ScalarArg {
  const void* data;  // null: `number`
  DType dtype;
  double number;
};

PPO_DEVICE double read(const ScalarArg& s) {
  if (!s.data) return s.number;
  if (s.dtype == DType::f64) return *static_cast<const double*>(s.data);
  return double(read_float(s.data, s.dtype, 0));
}

}  // namespace ppo::cuda
