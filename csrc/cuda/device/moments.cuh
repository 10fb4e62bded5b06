// Count, mean and sum of squared deviations of a stream, merged in one fixed order.
#pragma once

#include "reduce.cuh"

namespace ppo::cuda {

struct Moments {
  double n, mean, m2;
};

// As Chan, Golub and LeVeque (1979); exact where a side is empty.
PPO_DEVICE Moments merge(const Moments& a, const Moments& b) {
  if (a.n == 0.0) return b;
  if (b.n == 0.0) return a;
  const double n = a.n + b.n, share = b.n / n, delta = b.mean - a.mean;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.n * share};
}

// One thread's stream. Sums are of x - pivot, in double; the pivot is the first element, so that
// equal elements give exactly zero deviation and a large common mean costs no digits.
struct MomentSum {
  double pivot = 0.0, sum = 0.0, squares = 0.0;
  int64_t n = 0;

  PPO_DEVICE void add(float x, bool live) {
    pivot = live && n == 0 ? double(x) : pivot;
    const double d = live ? double(x) - pivot : 0.0;
    sum += d;
    squares = fma(d, d, squares);
    n += live;
  }
  PPO_DEVICE Moments result() const {
    if (n == 0) return {0.0, 0.0, 0.0};
    const double mean = sum / double(n), m2 = squares - sum * mean;
    return {double(n), pivot + mean, m2 < 0.0 ? 0.0 : m2};
  }
};

// Of all threads of the block, in thread order, the same bits in every thread. `scratch`, in
// shared memory, has room for one per warp; it may be used again after a barrier.
PPO_DEVICE Moments block_moments(Moments x, Moments* scratch) {
#pragma unroll 1
  for (int by = 1; by < kWarp; by *= 2) {
    const Moments other = {__shfl_xor_sync(kAllLanes, x.n, by),
                           __shfl_xor_sync(kAllLanes, x.mean, by),
                           __shfl_xor_sync(kAllLanes, x.m2, by)};
    x = lane_id() & by ? merge(other, x) : merge(x, other);
  }
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < int(blockDim.x) / kWarp; ++w) x = merge(x, scratch[w]);
  return x;
}

// Leaves this block's moments (the same in all threads) in parts[block]; the last of `blocks`
// blocks merges them in index order into out (3,). Whether this was the last block.
PPO_DEVICE bool leave_moments(const Moments& mine, int64_t block, int64_t blocks, Moments* parts,
                              double* out, unsigned* counter, Moments* scratch) {
  if (threadIdx.x == 0) parts[block] = mine;
  if (!arrives_last(counter, unsigned(blocks))) return false;
  const int64_t each = (blocks + blockDim.x - 1) / blockDim.x, first = threadIdx.x * each;
  const int64_t end = first + each < blocks ? first + each : blocks;
  Moments x{0.0, 0.0, 0.0};
  for (int64_t i = first; i < end; ++i) x = merge(x, parts[i]);
  x = block_moments(x, scratch);
  if (threadIdx.x == 0) {
    out[0] = x.n;
    out[1] = x.mean;
    out[2] = x.m2;
  }
  return true;
}

}  // namespace ppo::cuda
