// Kernel over a segment of a row of logits: its softmax state, squared exponentials, mean and
// largest column (no include guard, see foreach_isa.h).
#include "logprobs_simd.h"

namespace ppo::PPO_ISA {

// Sums of a block: of e^d, d e^d and e^2d as softmax_state has the first two, and the logits'
// share of the mean.
template <class T>
struct StatsSums {
  T sum, dot, squares, mean;
  PPO_INLINE void add(T x, T inv_temperature, T neg_max) {
    const T d = vmax(set1<T>(kLowest<T>), vfma(x, inv_temperature, neg_max));
    const T e = vexp_neg(d);
    sum = sum + e;
    dot = vfma(d, e, dot);
    squares = vfma(e, e, squares);
  }
};

template <class T, class P>
PPO_INLINE StatsSums<T> stats_block(const P* x, int64_t n, T inv_temperature, T neg_max, T share) {
  const T zero = set1<T>(0);
  StatsSums<T> a{zero, zero, zero, zero}, b = a;
  int64_t i = 0;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    prefetch<T>(x + i);
    const T first = load<T>(x + i), second = load<T>(x + i + lanes<T>);
    a.add(first, inv_temperature, neg_max);
    b.add(second, inv_temperature, neg_max);
    a.mean = vfma(first, share, a.mean);
    b.mean = vfma(second, share, b.mean);
  }
  for (; i < n; i += lanes<T>) {
    a.add(load_n<T>(x + i, n - i, -__builtin_inff()), inv_temperature, neg_max);
    a.mean = vfma(load_n<T>(x + i, n - i, 0), share, a.mean);
  }
  return {a.sum + b.sum, a.dot + b.dot, a.squares + b.squares, a.mean + b.mean};
}

template <class T>
struct RunningStats : Running<T> {
  T squares = set1<T>(0);
  Acc<T> mean;
  int64_t peak_block = 0;  // where the first block that holds `peak` begins

  PPO_INLINE explicit RunningStats(scalar_t<T> inv) : Running<T>(inv) {}

  template <class P>
  PPO_INLINE void add_block(const P* x, int64_t first, int64_t n, T share) {
    const T block_peak = block_max<T>(x + first, n);
    if (any(block_peak > set1<T>(this->peak))) {
      const scalar_t<T> before = this->max;
      this->raise(block_peak);
      const T scale = vexp_neg(set1<T>(vmax(kLowest<T>, before - this->max)));
      squares = squares * scale * scale;
      peak_block = first;
    }
    const StatsSums<T> block =
        stats_block(x + first, n, set1<T>(this->inv_temperature), set1<T>(-this->max), share);
    this->sum = this->sum + block.sum;
    this->dot = this->dot + block.dot;
    squares = squares + block.squares;
    mean.add(block.mean);
  }
};

template <class T, class P>
inline SoftmaxState segment_stats(const P* x, int64_t n, double inv_temperature, double share,
                                  SegmentStats& out) {
  using S = scalar_t<T>;
  RunningStats<T> state{S(inv_temperature)};
  const T each = set1<T>(S(share));
  int64_t i = 0;
  for (; i + kSumBlock <= n; i += kSumBlock) state.add_block(x, i, kSumBlock, each);
  if (i < n) state.add_block(x, i, n - i, each);
  Acc<T> sum, dot, squares;
  sum.add(state.sum);
  dot.add(state.dot);
  squares.add(state.squares);
  int64_t top = state.peak_block;
  const int64_t end = n - top < kSumBlock ? n : top + kSumBlock;
  while (top + 1 < end && !(x[top] == state.peak)) ++top;
  out = {squares.total(), state.mean.total(), double(state.peak), top};
  return {double(state.max), sum.total(), dot.total()};
}

inline SoftmaxState token_stats(DType dtype, const void* x, int64_t n, double inv_temperature,
                                double share, SegmentStats& out) {
  if (dtype == DType::f32) {
    return segment_stats<F>(static_cast<const float*>(x), n, inv_temperature, share, out);
  }
  return segment_stats<double>(static_cast<const double*>(x), n, inv_temperature, share, out);
}

}  // namespace ppo::PPO_ISA
