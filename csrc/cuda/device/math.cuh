// The vocabulary of cpu/simd/simd.h for one float on host and device, so that csrc/math.h runs
// here: ppo::cuda::policy_terms and the rest. Multiply-add is fused where it says vfma and nowhere
// else
// (-fmad=false, -ffp-contract=off).
#pragma once

#include <cmath>

#include "../../loss_options.h"
#include "runtime.cuh"

#define PPO_ISA cuda
#define PPO_INLINE PPO_HOST_DEVICE

namespace ppo::cuda {

template <class T>
using scalar_t = T;
template <class T>
using mask_t = bool;
template <class T>
constexpr int lanes = 1;

template <class T>
PPO_INLINE T set1(T x) {
  return x;
}
template <class T>
PPO_INLINE bool first_n(int64_t n) {
  return n > 0;
}
PPO_INLINE float vfma(float a, float b, float c) { return ::fmaf(a, b, c); }
PPO_INLINE float select(bool m, float a, float b) { return m ? a : b; }
PPO_INLINE float vmin(float a, float b) { return a < b ? a : b; }
PPO_INLINE float vmax(float a, float b) { return a > b ? a : b; }
PPO_INLINE float vabs(float a) { return ::fabsf(a); }
PPO_INLINE float vsqrt(float a) { return ::sqrtf(a); }
PPO_INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
// The integer n is read from the low bits of n + 1.5 * 2^23.
PPO_INLINE float pow2(float n) {
  union {
    float x;
    uint32_t bits;
  } at{n + 0x1.8p23f};
  at.bits = (at.bits << 23) + 0x3f800000u;
  return at.x;
}

}  // namespace ppo::cuda

#include "../../math.h"
