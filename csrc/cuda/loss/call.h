// Host side of the losses: one call's tensors, sequences, launches and outputs.
#pragma once

#include <algorithm>

#include "../device/launch.h"
#include "loss.cuh"

namespace ppo::cuda {

// (loss, stats, scale, grads) of ppo_fast/_boundary/schema.py; grads is (count, *shape).
struct LossOutputs {
  Tensor loss, stats, scale, grads;

  LossOutputs(const Tensor& main, int64_t count)
      : loss(empty_on(main, {}, ScalarType::Float)),
        stats(empty_on(main, {kNStats}, ScalarType::Double)),
        scale(empty_on(main, {}, ScalarType::Float)),
        grads(empty_on(main, stacked(main, count), ScalarType::Float)),
        count_(count) {}
  // Gradient i; null if not requested.
  float* grad(int64_t i) const {
    return i < count_ ? data<float>(grads) + i * (grads.numel() / count_) : nullptr;
  }

 private:
  static std::vector<int64_t> stacked(const Tensor& main, int64_t count) {
    std::vector<int64_t> sizes{count};
    for (int64_t n : main.sizes()) sizes.push_back(n);
    return sizes;
  }
  int64_t count_;
};

// One loss call: views of its tensors, its arguments, and the memory that its launches need.
class LossCall {
 public:
  LossCall(const char* op, const Tensor& main, const OptTensor& mask, const OptTensor& cu_seqlens,
           const OptTensor& sequence_weights, const ReduceOptions& reduce, const OptTensor& denom,
           int64_t n_grads);

  // View of a tensor of the main tensor's shape.
  Column view(const Tensor& x, const char* name) const {
    check_beside(main_, x, op_, name);
    return column_of(x, shape_);
  }
  Column view(const OptTensor& x, const char* name) const { return x ? view(*x, name) : Column{}; }

  float* grad(int64_t i) const { return out_.grad(i); }
  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const {
    return {out_.loss, out_.stats, out_.scale, out_.grads};
  }
  // Arguments of the kernel. `columns`: all but the mask. `sums`: the kernel's number of sums.
  LossArgs args(std::initializer_list<Column> columns, int sums);
  // Launches the kernel that finds the terms of sequences, if tokens need them; `ratios` are of
  // the columns' mean log-ratios within the bounds.
  void find_terms(bool ratios, const Column& now, const Column& old, float d_min, float d_max);
  LaunchConfig config(size_t shared_bytes) const {
    return {dim3(blocks_), dim3(kTokenThreads), shared_bytes, 1, device_.stream()};
  }

 private:
  const char* op_;
  Device device_;
  TokenShape shape_;
  LossArgs args_{};
  const Tensor main_;
  RowValues weights_;  // of sequences
  LossOutputs out_;
  OptTensor terms_, parts_;
  unsigned blocks_;
};

}  // namespace ppo::cuda
