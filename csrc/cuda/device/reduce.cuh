// Reductions in one fixed order, and the block that arrives last.
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

// Of all lanes of the warp, the same bits in every lane (op must commute).
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

// Of all threads of the block (1-D, at most 1024), the same bits in every thread. `scratch`, in
// shared memory, has room for one T per warp; it may be used again after a barrier.
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

// Whether `expected - 1` blocks have passed this counter before; all threads call it and get the
// same answer. What every block wrote to global memory before can be read after by the last one
// (with plain loads, not __ldg). The last one leaves the counter at 0 for the next launch.
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

}  // namespace ppo::cuda
