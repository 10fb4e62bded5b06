// The arguments of the advantage kernels, the layouts they come from, and the units of work.
#pragma once

#include <algorithm>
#include <vector>

#include "../../options.h"
#include "../../tensor/views.h"

namespace ppo {

// Sequence s has `steps` steps, or with packed offsets the flat slots [offsets[s], offsets[s +
// 1]). A View of a packed tensor has row stride 0, so that (s, slot) addresses the flat slot.
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
  bool zero_masked, own_lambda;
  double gamma, decay, decay_returns;
};

struct GaeArgs {
  Recursion base;
  View rewards, next_values, terminated, truncated, rho, c, lam, lam_returns;
  bool lam_per_step, lam_returns_per_step;
};

struct RlhfArgs {
  Recursion base;
  View scores, logprobs, ref_logprobs;
  View rewards, kl;
  Estimator estimator;
  ScoreAt score_at;
  double kl_coef, kl_clamp, reward_min, reward_max;
};

// Time-major, an item is a multiple of kLineSequences wide (their steps share a cache line) but
// for the last one, and no wider than what is swept together.
constexpr int64_t kLineSequences = 16, kSlabSequences = 512;

// Sequences [begin, end), for one thread; (count, mean, M2) of their live advantages goes to
// `moments`.
struct WorkItem {
  int64_t begin, end;
  double* moments;
};

constexpr int64_t kItemSlots = 1 << 15;

// The (sequence, step) view of a tensor; null data where absent.
struct Layout {
  bool packed, time_major;

  View view(const Tensor& x) const {
    View v = view_of(x);
    if (packed) v.row_stride = 0;
    return time_major ? v.transposed() : v;
  }
  View view(const OptTensor& x) const { return x ? view(*x) : View{}; }
};

// cu_seqlens in 64 bits; empty where absent.
inline std::vector<int64_t> offsets_of(const OptTensor& cu_seqlens, const Tensor& main,
                                       const char* op) {
  if (!cu_seqlens) return {};
  std::vector<int64_t> offsets = read_cu_seqlens(*cu_seqlens);
  check_cu_seqlens(offsets, main.numel(), op);
  return offsets;
}

// A value per sequence, as a view of one row.
inline View per_sequence(const OptTensor& x, int64_t count, const char* op, const char* what) {
  if (!x) return {};
  const View v = view_of(*x);
  PPO_CHECK(v.rows == 1 && v.cols == count, op, what);
  return v;
}

inline SequenceLayout sequences_of(const View& main, const std::vector<int64_t>& offsets) {
  if (offsets.empty()) return {nullptr, main.rows, main.cols};
  return {offsets.data(), int64_t(offsets.size()) - 1, 0};
}

// Work items cut from the sequences' lengths alone: sums over an item, then over the items in
// order, have the same bits on any number of threads.
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

// Runs the kernel over every sequence and gives the moments (3,).
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
