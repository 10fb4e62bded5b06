// What gae and rlhf_advantages share outside the kernels: layouts, units of work, merging moments.
#pragma once

#include <vector>

#include "advantage_args.h"
#include "moments.h"
#include "views.h"

namespace ppo {

constexpr int64_t kUnitSlots = 1 << 15;

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

inline Sequences sequences_of(const View& main, const std::vector<int64_t>& offsets) {
  if (offsets.empty()) return {nullptr, main.rows, main.cols};
  return {offsets.data(), int64_t(offsets.size()) - 1, 0};
}

// Units of work cut from the sequences' lengths alone: sums over a unit, then over the units in
// order, have the same bits on any number of threads.
class Units {
 public:
  // `lanes`: the kernel puts a sequence in each vector lane.
  Units(const Sequences& seqs, bool lanes) : seqs_(seqs), lanes_(lanes) {
    // Two threads can share a few long sequences; more of them fill whole vectors.
    const int64_t fewest = !lanes || seqs.count <= 3 ? 1
                           : seqs.count <= 32        ? (seqs.count + 1) / 2
                                                     : 16;
    int64_t start = 0;
    begin_.push_back(0);
    if (!seqs.offsets) {
      const int64_t rows = seqs.steps ? (kUnitSlots + seqs.steps - 1) / seqs.steps : seqs.count;
      const int64_t each = rows <= fewest ? fewest : (rows + 15) / 16 * 16;
      for (; start + each < seqs.count; start += each) begin_.push_back(start + each);
    }
    for (int64_t s = start + 1; seqs.offsets && s < seqs.count; ++s) {
      if (s - start < fewest || slots(start, s) < kUnitSlots) continue;
      begin_.push_back(start = s);
    }
    begin_.push_back(seqs.count);
    moments_.resize(3 * size_t(count()));
  }

  int64_t count() const { return int64_t(begin_.size()) - 1; }

  Unit at(int64_t i) {
    const int64_t b = begin_[size_t(i)], e = begin_[size_t(i) + 1];
    // Short packed sequences would end at every other step of some lane.
    const bool brief = seqs_.offsets && slots(b, e) < 16 * (e - b);
    return {b, e, !lanes_ || e - b <= 3 || brief, &moments_[3 * size_t(i)]};
  }

  const std::vector<double>& moments() const { return moments_; }

 private:
  int64_t slots(int64_t b, int64_t e) const {
    return seqs_.offsets ? seqs_.offsets[e] - seqs_.offsets[b] : (e - b) * seqs_.steps;
  }

  Sequences seqs_;
  std::vector<int64_t> begin_;
  std::vector<double> moments_;
  bool lanes_;
};

// Runs the kernel over every sequence and gives the moments (3,).
template <class Kernel, class Args>
Tensor run_units(Kernel kernel, const Args& args, bool lanes) {
  Units units(args.base.seqs, lanes);
  parallel_for(units.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(args, units.at(i));
  });
  const int64_t three = 3;
  Tensor moments = empty(Sizes(&three, 1), ScalarType::Double);
  merge_moments(units.moments(), data<double>(moments));
  return moments;
}

}  // namespace ppo
