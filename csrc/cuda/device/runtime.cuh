// The language of this folder's device code: CUDA C++, or its emulation on a CPU (csrc/emulate).
// No torch headers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef PPO_EMULATE
#include "../../emulate/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include "../../tensor/types.h"

#define PPO_DEVICE __device__ __forceinline__
#define PPO_HOST_DEVICE __host__ __device__ __forceinline__

namespace ppo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

PPO_DEVICE int lane_id() { return int(threadIdx.x) % kWarp; }
PPO_DEVICE int warp_id() { return int(threadIdx.x) / kWarp; }

// The block's dynamic shared memory (LaunchConfig::shared_bytes of it), 128-byte aligned.
template <class T>
PPO_DEVICE T* shared_memory() {
#ifdef PPO_EMULATE
  return reinterpret_cast<T*>(emulate::self().block->shared);
#else
  extern __shared__ __align__(128) unsigned char ppo_shared[];
  return reinterpret_cast<T*>(ppo_shared);
#endif
}

// 2^x to 2 ulp, flushing subnormals; -inf gives 0.
PPO_DEVICE float fast_exp2(float x) {
#ifdef PPO_EMULATE
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace ppo::cuda
