// Storage types as floats, one at a time and 16 bytes at a time.
#pragma once

#include "runtime.cuh"

#ifndef PPO_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace ppo::cuda {

#ifdef PPO_EMULATE
template <class P>
inline float widen(P x) {
  return to_float(x);
}
template <class P>
inline P narrow(float x) {
  P out;
  from_float(x, &out);
  return out;
}
#else
PPO_DEVICE float widen(float x) { return x; }
PPO_DEVICE float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
PPO_DEVICE float widen(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

// To nearest, ties to even; NaN stays NaN.
template <class P>
PPO_DEVICE P narrow(float x);
template <>
PPO_DEVICE float narrow<float>(float x) {
  return x;
}
template <>
PPO_DEVICE bf16 narrow<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
PPO_DEVICE fp16 narrow<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#endif

// Element `at` of a tensor whose dtype only the launch knows.
PPO_DEVICE float read_float(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  if (dtype == DType::bf16) return widen(static_cast<const bf16*>(data)[at]);
  return widen(static_cast<const fp16*>(data)[at]);
}
PPO_DEVICE int64_t read_index(const void* data, DType dtype, int64_t at) {
  return dtype == DType::i64 ? static_cast<const int64_t*>(data)[at]
                             : static_cast<const int32_t*>(data)[at];
}

// 16 bytes of P.
template <class P>
constexpr int kPerVector = 16 / int(sizeof(P));

template <class P>
PPO_DEVICE void unpack(const uint4& v, float (&x)[kPerVector<P>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(P) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      x[2 * i] = widen(P{uint16_t(words[i])});
      x[2 * i + 1] = widen(P{uint16_t(words[i] >> 16)});
    }
  }
}

template <class P>
PPO_DEVICE uint4 pack(const float (&x)[kPerVector<P>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(P) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = uint32_t(narrow<P>(x[2 * i]).bits) | uint32_t(narrow<P>(x[2 * i + 1]).bits) << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The 16 bytes that start `shift` bytes into the 32 of (low, high); shift a multiple of 2, < 16.
PPO_DEVICE uint4 shifted(const uint4& low, const uint4& high, int shift) {
  const uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  uint32_t pick[5];  // whole words first, then the bits within them
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const uint32_t far = shift & 4 ? w[i + 3 < 8 ? i + 3 : 7] : w[i + 2];
    const uint32_t near = shift & 4 ? w[i + 1] : w[i];
    pick[i] = shift & 8 ? far : near;
  }
  const unsigned bits = unsigned(shift & 3) * 8;
  return make_uint4(
      __funnelshift_r(pick[0], pick[1], bits), __funnelshift_r(pick[1], pick[2], bits),
      __funnelshift_r(pick[2], pick[3], bits), __funnelshift_r(pick[3], pick[4], bits));
}

}  // namespace ppo::cuda
