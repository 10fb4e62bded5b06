// Driver of the policy and value losses around their kernels: sequences, weights, D, blocks,
// results.
#pragma once

#include <cmath>

#include "../../tensor/views.h"
#include "args.h"

namespace ppo {

using LossStats = std::array<double, kNStats>;

// Sequences of a loss call, their counts of unmasked tokens, and the weights that follow from
// those.
class LossSequences {
 public:
  LossSequences(const Tensor& main, const OptTensor& mask, const OptTensor& cu_seqlens,
                const OptTensor& weights, Reduction reduction, const char* op);
  LossArgs args(const ReduceOptions& reduce) const {
    return {map_, mask_, weight_.empty() ? nullptr : weight_.data(), inverse_denom(reduce)};
  }
  const SequenceMap& map() const { return map_; }
  int64_t tokens() const { return map_.tokens(); }
  int64_t live(int64_t s) const { return live_[size_t(s)]; }
  double n_tokens() const { return double(n_tokens_); }
  double n_seqs() const { return double(n_seqs_); }
  // The reduction's own D; 0 for token_sum.
  double own_denom(Reduction reduction) const;
  // 1 / D; 0 without a positive D.
  double inverse_denom(const ReduceOptions& reduce) const;

 private:
  std::vector<int64_t> offsets_, live_;
  std::vector<double> weight_;
  SequenceMap map_;
  View mask_;
  int64_t width_ = 0, n_tokens_ = 0, n_seqs_ = 0;
};

// Least number of tokens per thread.
inline constexpr int64_t kGrain = 8 * kBlock;

// Calls block(first, last, stats) for all slots on torch's threads; returns the sum of all blocks'
// statistics, added in order.
template <class Block>
LossStats sum_blocks(int64_t tokens, const Block& block) {
  LossStats total{};
  total[kRatioMin] = std::numeric_limits<double>::infinity();
  total[kRatioMax] = -total[kRatioMin];
  std::vector<LossStats> parts(size_t((tokens + kBlock - 1) / kBlock), total);
  parallel_for(int64_t(parts.size()), kGrain / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      block(i * kBlock, std::min(tokens, (i + 1) * kBlock), parts[size_t(i)].data());
    }
  });
  for (const LossStats& part : parts) {
    for (int k = 0; k < kRatioMin; ++k) total[size_t(k)] += part[size_t(k)];
    total[kRatioMin] = std::min(total[kRatioMin], part[kRatioMin]);
    total[kRatioMax] = std::max(total[kRatioMax], part[kRatioMax]);
  }
  // Minima and maxima over lanes drop a NaN; sums keep it.
  if (std::isnan(total[kRatio])) total[kRatioMin] = total[kRatioMax] = total[kRatio];
  return total;
}

// The requested gradients in one tensor (count, *shape). Allocators keep one large block, but
// return two to the system, and the next call would fault them in again.
struct Gradients {
  Tensor all;
  Gradients(const Tensor& main, int64_t count);
  // Storage of gradient i; null if not requested.
  void* at(int64_t i) const;
};

// One loss call: views of its tensors, its sequences, D and gradients.
class LossCall {
 public:
  LossCall(const char* op, const Tensor& main, const OptTensor& mask, const OptTensor& cu_seqlens,
           const OptTensor& sequence_weights, ReduceOptions reduce, const OptTensor& denom,
           int64_t n_grads);

  // View of a tensor of the main tensor's shape.
  View view(const Tensor& x, const char* name) const {
    check_like(main_, x, op_, name);
    return view_of(x);
  }
  View view(const OptTensor& x, const char* name) const { return x ? view(*x, name) : View{}; }

  const LossSequences& seqs() const { return seqs_; }
  bool fp64() const { return is_double(main_); }
  double own_denom() const { return seqs_.own_denom(reduce_.reduction); }
  LossArgs args() const { return seqs_.args(reduce_); }
  void* grad(int64_t i) const { return grads_.at(i); }
  // (loss, stats, scale, grads) with loss = sum / D. The gradients are already divided: scale is
  // 1.
  std::tuple<Tensor, Tensor, Tensor, Tensor> results(const LossStats& stats, double sum) const;

 private:
  const OptTensor& checked(const OptTensor& mask) const {
    check_like(main_, mask, op_, "mask");
    return mask;
  }

  const char* op_;
  const Tensor main_;
  ReduceOptions reduce_;
  LossSequences seqs_;
  Gradients grads_;
};

}  // namespace ppo
