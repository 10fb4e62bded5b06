// Reductions in one fixed order, the last-block pattern, and moments of a stream.
#pragma once

#include "runtime.cuh"

namespace ppo::cuda {

struct Add {
  template <class T>
  PPO_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  PPO_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  PPO_DEVICE T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// Reduction over the lanes of a warp, the same bits in every lane (op must commute).
template <class T, class Op>
PPO_DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, by));
  return x;
}
template <class T>
PPO_DEVICE T warp_sum(T x) {
  return warp_reduce(x, Add{});
}

// Reduction over the threads of a block (1-D, at most 1024), the same bits in every thread.
// `scratch`, in shared memory, has room for one T per warp; it may be used again after a barrier.
template <class T, class Op>
PPO_DEVICE T block_reduce(T x, Op op, T* scratch) {
  x = warp_reduce(x, op);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  T all = scratch[0];
  for (int w = 1; w < int(blockDim.x) / kWarp; ++w) all = op(all, scratch[w]);
  return all;
}
template <class T>
PPO_DEVICE T block_sum(T x, T* scratch) {
  return block_reduce(x, Add{}, scratch);
}

// Last-block test: true in the last of `expected` blocks to call it. All threads call it and get
// the same answer. The last block may then read what every block wrote to global memory before
// (with plain loads, not __ldg), and has reset the counter to 0 for the next launch.
PPO_DEVICE bool arrives_last(unsigned* counter, unsigned expected) {
  __syncthreads();  // every thread's writes precede thread 0's arrival
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1u) == expected - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

struct Moments {
  double n, mean, m2;
};

// Sums of x - pivot and of its square over n elements, in double. The pivot is an element or the
// mean of some, so that equal elements give exactly zero deviation and a large common mean costs
// no digits. (It lies at most sqrt(n) standard deviations from the mean.)
struct ShiftedSums {
  double n = 0.0, pivot = 0.0, sum = 0.0, squares = 0.0;

  PPO_DEVICE ShiftedSums about(double other) const {
    const double by = pivot - other;
    return {n, other, fma(n, by, sum), fma(by, fma(n, by, 2.0 * sum), squares)};
  }
  // Adds those of other elements.
  PPO_DEVICE void add(const ShiftedSums& other) {
    if (other.n == 0.0) return;
    if (n == 0.0) {
      *this = other;
      return;
    }
    const ShiftedSums x = other.about(pivot);
    n += x.n;
    sum += x.sum;
    squares += x.squares;
  }
  PPO_DEVICE Moments moments() const {
    if (n == 0.0) return {0.0, 0.0, 0.0};
    const double mean = sum / n, m2 = squares - sum * mean;
    return {n, pivot + mean, m2 < 0.0 ? 0.0 : m2};
  }
};

// Shifted sums of one thread's stream.
struct MomentSum {
  double pivot = 0.0, sum = 0.0, squares = 0.0;
  int n = 0;

  PPO_DEVICE void add(float x, bool live) {
    pivot = live && n == 0 ? double(x) : pivot;
    const double d = live ? double(x) - pivot : 0.0;
    sum += d;
    squares = fma(d, d, squares);
    n += live;
  }
  PPO_DEVICE ShiftedSums result() const { return {double(n), pivot, sum, squares}; }
};

// Shifted sums over the lanes of a warp, about the pivot of the first lane that has elements; the
// same bits in every lane.
PPO_DEVICE ShiftedSums warp_sums(const ShiftedSums& mine) {
  const unsigned some = __ballot_sync(kAllLanes, mine.n != 0.0);
  const int first = some ? __ffs(int(some)) - 1 : 0;
  const ShiftedSums x = mine.about(__shfl_sync(kAllLanes, mine.pivot, first));
  return {warp_sum(x.n), x.pivot, warp_sum(x.sum), warp_sum(x.squares)};
}

// Moments over the threads of a block (1-D, at most 1024), in the first warp; undefined in the
// others. `scratch`, in shared memory, has room for one ShiftedSums per warp; it may be used again
// after a barrier.
PPO_DEVICE Moments block_moments(const ShiftedSums& mine, ShiftedSums* scratch) {
  ShiftedSums x = warp_sums(mine);
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  if (warp_id() > 0) return x.moments();
  x = {};
  if (lane_id() < int(blockDim.x) / kWarp) x = scratch[lane_id()];
  return warp_sums(x).moments();
}

// Stores this block's moments (the first thread's) to parts[block]; the last of `blocks`
// blocks merges all parts in one fixed order into out (3,). Returns whether this was the last
// block.
PPO_DEVICE bool leave_moments(const Moments& mine, unsigned block, unsigned blocks, Moments* parts,
                              double* out, unsigned* counter, ShiftedSums* scratch) {
  if (threadIdx.x == 0) parts[block] = mine;
  if (!arrives_last(counter, blocks)) return false;
  ShiftedSums sums;
  for (unsigned i = threadIdx.x; i < blocks; i += blockDim.x) {
    const Moments part = parts[i];
    sums.add({part.n, part.mean, 0.0, part.m2});
  }
  const Moments x = block_moments(sums, scratch);
  if (threadIdx.x == 0) {
    out[0] = x.n;
    out[1] = x.mean;
    out[2] = x.m2;
  }
  return true;
}

}  // namespace ppo::cuda
