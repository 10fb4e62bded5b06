// Arguments of the advantage kernels, the layouts of tensors behind them, and work items.
#pragma once

#include <algorithm>
#include <vector>

#include "../../codes.h"
#include "../../tensor/views.h"

namespace ppo {

// Starts and lengths of sequences: `steps` steps each or, with packed offsets, the flat slots
// [offsets[s], offsets[s + 1]). A View of a packed tensor has row stride 0, so that (s, slot)
// addresses the flat slot.
struct SequenceLayout {
  const int64_t* offsets;
  int64_t count, steps;

  int64_t first(int64_t s) const { return offsets ? offsets[s] : 0; }
  int64_t length(int64_t s) const { return offsets ? offsets[s + 1] - offsets[s] : steps; }
};

// Views are (sequence, step); an absent tensor has null data. gamma * lambda is formed in double.
struct Recursion {
  SequenceLayout seqs;
  View values, mask, bootstrap;
  View advantages, returns;
  bool carry;  // masked steps are as if absent, else they are zeros
  double gamma, decay;
};

struct GaeArgs {
  Recursion base;
  View rewards, next_values, terminated, truncated, rho, c, lam, lam_returns;
  bool lam_per_step, lam_returns_per_step;
  bool own_lambda;  // of the returns: a recurrence for each output
  double gamma, decay_returns;
};

struct RlhfArgs {
  Recursion base;
  View scores, logprobs, ref_logprobs;
  View rewards, kl;
  Estimator estimator;
  ScoreAt score_at;
  double kl_coef, kl_clamp, reward_min, reward_max;
};

// Width limits of time-major work items. Except for the last, an item is a multiple of
// kLineSequences wide (16 fp32 steps share a cache line); no item is wider than one sweep,
// kSlabSequences.
constexpr int64_t kLineSequences = 16, kSlabSequences = 512;

// Sequences [begin, end), processed by one thread; the kernel writes (count, mean, M2) of their
// live advantages to `moments`.
struct WorkItem {
  int64_t begin, end;
  double* moments;
};

constexpr int64_t kItemSlots = 1 << 15;

// A call's tensors as (sequence, step) views: (B, T), (T, B) where time-major, (N,) where packed.
class Layout {
 public:
  Layout(const char* op, const Tensor& main, const OptTensor& cu_seqlens, bool time_major)
      : op_(op),
        main_(main),
        packed_(cu_seqlens.has_value()),
        time_major_(time_major && main.dim() == 2) {
    if (!packed_) return;
    offsets_ = read_cu_seqlens(*cu_seqlens);
    check_cu_seqlens(offsets_, main.numel(), op);
  }

  const Tensor& main() const { return main_; }
  bool packed() const { return packed_; }
  bool time_major() const { return time_major_; }
  // Valid while this Layout lives.
  SequenceLayout sequences() const {
    if (packed_) return {offsets_.data(), int64_t(offsets_.size()) - 1, 0};
    const View v = steps(main_);
    return {nullptr, v.rows, v.cols};
  }

  // View of a tensor of the main tensor's shape.
  View view(const Tensor& x, const char* name) const {
    check_like(main_, x, op_, name);
    return steps(x);
  }
  View view(const OptTensor& x, const char* name) const { return x ? view(*x, name) : View{}; }
  // View of a number per sequence, repeated for every step.
  View per_sequence(const OptTensor& x, const char* name) const {
    if (!x) return {};
    const View v = view_of(*x);
    STD_TORCH_CHECK(v.rows == 1 && v.cols == sequences().count, "ppo_fast::", op_, ": shape of ",
                    name);
    return v.transposed();
  }
  // New output of the main tensor's shape; `view` becomes its view.
  Tensor output(View& view) const {
    Tensor out = empty(main_.sizes(), compute_dtype(main_));
    view = steps(out);
    return out;
  }

 private:
  View steps(const Tensor& x) const {
    View v = view_of(x);
    if (packed_) v.row_stride = 0;
    return time_major_ ? v.transposed() : v;
  }

  const char* op_;
  const Tensor main_;
  bool packed_, time_major_;
  std::vector<int64_t> offsets_;
};

// Work items, cut by the sequences' lengths alone: moments of each item, merged in order, have the
// same bits on any number of threads.
class WorkItems {
 public:
  WorkItems(const SequenceLayout& seqs, bool columns) {
    std::vector<int64_t> begin{0};
    if (seqs.offsets) {
      for (int64_t s = 1; s < seqs.count; ++s) {
        if (seqs.offsets[s] - seqs.offsets[begin.back()] >= kItemSlots) begin.push_back(s);
      }
    } else {
      const int64_t each = width(seqs.steps, columns);
      for (int64_t s = each; s < seqs.count; s += each) begin.push_back(s);
    }
    begin.push_back(seqs.count);
    const size_t count = begin.size() - 1;
    moments_.resize(3 * count);
    for (size_t i = 0; i < count; ++i) {
      items_.push_back({begin[i], begin[i + 1], &moments_[3 * i]});
    }
  }

  int64_t count() const { return int64_t(items_.size()); }
  const WorkItem* at(int64_t i) const { return items_.data() + i; }
  const std::vector<double>& moments() const { return moments_; }

 private:
  static int64_t width(int64_t steps, bool columns) {
    const int64_t rows = steps > 0 ? (kItemSlots + steps - 1) / steps : 1;
    if (!columns) return rows;
    const int64_t lines = (rows + kLineSequences - 1) / kLineSequences;
    return std::min(lines * kLineSequences, kSlabSequences);
  }

  std::vector<double> moments_;
  std::vector<WorkItem> items_;
};

// Runs the kernel over all sequences; returns the moments (3,).
template <class Kernel, class Args>
Tensor run_items(Kernel kernel, const Args& args, bool columns) {
  const WorkItems items(args.base.seqs, columns);
  parallel_for(items.count(), 1,
               [&](int64_t begin, int64_t end) { kernel(args, items.at(begin), items.at(end)); });
  const int64_t three = 3;
  Tensor moments = empty(Sizes(&three, 1), ScalarType::Double);
  merge_moments(items.moments(), data<double>(moments));
  return moments;
}

}  // namespace ppo
