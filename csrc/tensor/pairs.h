// Pairs (row, id) of a call over supports, row after row, on the CPU, and their shares of threads.
#pragma once

#include <vector>

#include "rows.h"
#include "views.h"

namespace ppo {

// Cuts items [0, n) where their work reaches equal shares and calls f(begin, end) on torch's
// threads. before(i), the work of the items ahead of item i, rises with every i up to n; no share
// but the last has less work than `grain`. What f does for an item must not depend on the cuts.
template <class Before, class Fn>
void share_work(int64_t n, int64_t grain, const Before& before, const Fn& f) {
  // The first item that begins at `work` or later.
  const auto item_at = [&](int64_t work) {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (before(middle) < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  parallel_for(before(n), grain, [&](int64_t begin, int64_t end) {
    const int64_t first = item_at(begin), last = item_at(end);
    if (first < last) f(first, last);
  });
}

// Check: x is int64 (n + 1,) and contiguous, rises and stays within [0, limit].
inline const int64_t* checked_ends(const char* op, const Tensor& x, int64_t limit,
                                   const char* name) {
  const View v = view_of(x);
  STD_TORCH_CHECK(x.sizes().size() == 1 && v.cols >= 1 && v.dtype == DType::i64 &&
                      (v.cols == 1 || v.col_stride == 1),
                  "ppo_fast::", op, ": ", name,
                  " must be contiguous int64, one more than the items");
  const int64_t* ends = at<int64_t>(v, 0, 0);
  bool good = ends[0] >= 0 && ends[v.cols - 1] <= limit;
  for (int64_t i = 1; i < v.cols; ++i) good &= ends[i - 1] <= ends[i];
  STD_TORCH_CHECK(good, "ppo_fast::", op, ": ", name, " must rise within the pairs");
  return ends;
}

// Row r's pairs are [first(r), first(r) + count(r)).
class PairRows {
 public:
  PairRows(const char* op, const Tensor& offsets, const Tensor& mask, int64_t pairs)
      : mask_(mask), offsets_(checked_ends(op, offsets, pairs, "offsets")) {
    rows_ = offsets.sizes()[0] - 1;
    PPO_CHECK(mask.is_cpu() && mask.sizes().size() == 1 && mask.sizes()[0] == rows_ &&
                  dtype_of(mask) == DType::byte,
              op, "mask must be (N,) of a 1-byte type");
    work_.resize(size_t(rows_) + 1);
    for (int64_t r = 0; r < rows_; ++r) {
      work_[size_t(r) + 1] = work_[size_t(r)] + 1 + (live(r) ? count(r) : 0);
    }
  }

  int64_t rows() const { return rows_; }
  bool live(int64_t row) const { return mask_.is_set(row); }
  int64_t first(int64_t row) const { return offsets_[row]; }
  int64_t count(int64_t row) const { return offsets_[row + 1] - offsets_[row]; }

  // Calls f(begin, end) for ranges of rows with about as many pairs each, in parallel.
  template <class Fn>
  void for_ranges(int64_t grain, const Fn& f) const {
    share_work(rows_, grain, [&](int64_t r) { return work_[size_t(r)]; }, f);
  }

 private:
  RowValues mask_;
  const int64_t* offsets_;
  int64_t rows_;
  std::vector<int64_t> work_;
};

}  // namespace ppo
