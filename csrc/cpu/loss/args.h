// Arguments of the loss kernels: plain data, the same for every instruction set.
#pragma once

#include <algorithm>

#include "../../loss_options.h"
#include "../../tensor/types.h"

namespace ppo {

// Tokens of one block of work, a multiple of every kRun. Blocks are cut by the flat token order
// alone, so that no sum depends on the number of threads.
inline constexpr int64_t kBlock = 1024;

// Flat slots of every sequence: rows of `steps` slots, or [offsets[s], offsets[s + 1]).
struct SequenceMap {
  const int64_t* offsets;
  int64_t count, steps;

  int64_t begin(int64_t s) const { return offsets ? offsets[s] : s * steps; }
  int64_t end(int64_t s) const { return offsets ? offsets[s + 1] : (s + 1) * steps; }
  int64_t tokens() const { return end(count - 1); }
  // Sequence of a slot: the last one that starts at `slot` or before, the only one of those that
  // is not empty.
  int64_t find(int64_t slot) const {
    if (!offsets) return slot / steps;
    return std::upper_bound(offsets, offsets + count + 1, slot) - offsets - 1;
  }
  // Column of a slot in a View: its step in a view of rows; the slot itself in a flat view, whose
  // row stride is 0.
  int64_t column(int64_t s, int64_t slot) const { return offsets ? slot : slot - s * steps; }
};

// Arguments that all losses share. weight: per sequence, null if every token weighs 1. Gradients
// are divided by D.
struct LossArgs {
  SequenceMap seqs;
  View mask;
  const double* weight;
  double inverse_denom;
};

// Absent tensors have null data. Gradients are contiguous, null if not requested.
struct PolicyLossArgs {
  LossArgs base;
  PolicyOptions policy;
  View logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs;
  double* mean_log_ratio;  // per sequence, null if the ratio is the token's
  void *grad_logprobs, *grad_entropy;
};

struct ValueLossArgs {
  LossArgs base;
  View values, old_values, returns;
  void* grad_values;
  ValueOptions options;
};

}  // namespace ppo
