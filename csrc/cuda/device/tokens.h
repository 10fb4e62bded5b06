// From tensors of (B, T) or flat (N,) tokens to what tokens.cuh reads.
#pragma once

#include <algorithm>

#include "scalar.h"
#include "tokens.cuh"

namespace ppo::cuda {

// Rows of `cols` slots; flat tokens are one row.
struct TokenShape {
  int64_t rows, cols;
  int64_t total() const { return rows * cols; }
  int64_t tiles() const { return (total() + kTile - 1) / kTile; }
};

inline TokenShape token_shape(const Tensor& x, const char* op) {
  const auto sizes = x.sizes();
  PPO_CHECK(sizes.size() == 1 || sizes.size() == 2, op, "expected (B, T) or (N,)");
  return sizes.size() == 2 ? TokenShape{sizes[0], sizes[1]} : TokenShape{1, sizes[0]};
}

inline Column column_of(const OptTensor& x, const TokenShape& shape) {
  if (!x) return Column{};
  const auto strides = x->strides();
  Column c{x->const_data_ptr(), dtype_of(*x), false, strides[strides.size() - 1], 0};
  if (shape.cols == 1 && strides.size() == 2) {
    c.stride = strides[0];
  } else if (shape.rows > 1) {
    c.skip = strides[0] - shape.cols * c.stride;
  }
  const size_t bytes = kItems * x->element_size();
  const bool in_step = c.skip == 0 || (shape.cols % kItems == 0 && c.skip % kItems == 0);
  c.wide = c.stride == 1 && in_step && reinterpret_cast<uintptr_t>(c.data) % bytes == 0;
  return c;
}

// float64 (3,), any stride.
inline void check_moments(const Tensor& moments, const char* op) {
  PPO_CHECK(moments.sizes().size() == 1 && moments.sizes()[0] == 3 && is_double(moments), op,
            "moments must be float64 (3,)");
}

}  // namespace ppo::cuda
