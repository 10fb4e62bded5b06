// From tensors over rows to RowTensors: a launch per block of rows that two strides describe.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "../checks.h"
#include "rows.cuh"

namespace ppo::cuda {

// Rows [start, start + outer * inner) of the leading shape, in order; `tensors` as given.
struct RowBlock {
  int64_t start, outer, inner;
  std::vector<RowTensor> tensors;
};

// A tensor whose first dimensions are the leading shape; null: absent.
using RowSource = const torch::stable::Tensor*;

// Dimensions are merged where every tensor allows it: one block, unless more than two remain.
std::vector<RowBlock> row_blocks(const torch::stable::Tensor& lead,
                                 std::initializer_list<RowSource> tensors);

}  // namespace ppo::cuda
