// A number of an op that may be a 0-d tensor on the device.
#pragma once

#include "lane.cuh"

namespace ppo::cuda {

struct ScalarArg {
  const void* data;  // null: `number`
  DType dtype;
  double number;
};

PPO_DEVICE double read(const ScalarArg& s) {
  if (!s.data) return s.number;
  switch (s.dtype) {
    case DType::f64:
      return *static_cast<const double*>(s.data);
    case DType::bf16:
      return double(from_bf16(*static_cast<const uint16_t*>(s.data)));
    case DType::f16:
      return double(from_fp16(*static_cast<const uint16_t*>(s.data)));
    default:
      return double(*static_cast<const float*>(s.data));
  }
}

}  // namespace ppo::cuda
