// Tensors in device code: elements and 16-byte vectors as floats, numbers that may be tensors, and
// rows of any rank.
#pragma once

#include "../../tensor/views.h"
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

// Rounds to nearest, ties to even; NaN stays NaN.
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

// Element `at` of a tensor whose dtype is known only at run time.
PPO_DEVICE float read_float(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  if (dtype == DType::bf16) return widen(static_cast<const bf16*>(data)[at]);
  return widen(static_cast<const fp16*>(data)[at]);
}
PPO_DEVICE int64_t read_index(const void* data, DType dtype, int64_t at) {
  return dtype == DType::i64 ? static_cast<const int64_t*>(data)[at]
                             : static_cast<const int32_t*>(data)[at];
}

// Elements of P in 16 bytes.
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

// 16 bytes from byte `shift` of the 32 bytes (low, high); shift is a multiple of 2 below 16.
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

struct ScalarArg {
  const void* data;  // null: `number`
  DType dtype;
  double number;
};

PPO_DEVICE double read(const ScalarArg& s) {
  if (!s.data) return s.number;
  if (s.dtype == DType::f64) return *static_cast<const double*>(s.data);
  return double(read_float(s.data, s.dtype, 0));
}

inline ScalarArg scalar_of(const OptTensor& x, double number) {
  STD_TORCH_CHECK(!x || dtype_of(*x) <= DType::f64,
                  "ppo_fast: a number on the device is floating");
  return x ? ScalarArg{x->const_data_ptr(), dtype_of(*x), number}
           : ScalarArg{nullptr, DType::f32, number};
}

// Row index: element offset of row i of a tensor of any rank, passed by value (on the CPU:
// csrc/tensor/rows.h). Leading dimensions are collapsed where strides allow.
class RowIndex {
 public:
  RowIndex() = default;
  // The first `rank` dimensions of a tensor. Throws beyond 2^31 - 1 rows.
  RowIndex(Sizes sizes, Sizes strides, size_t rank) {
    for (size_t i = rank; i-- > 0;) {
      rows_ *= sizes[i];
      if (sizes[i] == 1) continue;
      if (depth_ > 0 && strides[i] == stride_[depth_ - 1] * int64_t(size_[depth_ - 1])) {
        size_[depth_ - 1] *= uint32_t(sizes[i]);
        continue;
      }
      STD_TORCH_CHECK(depth_ < kMaxDepth, "ppo_fast: more than 8 dimensions that do not collapse");
      size_[depth_] = uint32_t(sizes[i]);
      stride_[depth_++] = strides[i];
    }
    STD_TORCH_CHECK(rows_ < int64_t(1) << 31, "ppo_fast: more than 2^31 - 1 rows");
  }

  int64_t rows() const { return rows_; }

  // Offset in elements from the tensor's start.
  PPO_HOST_DEVICE int64_t offset(int64_t row) const {
    if (depth_ == 1) return row * stride_[0];
    uint32_t rest = uint32_t(row);
    int64_t at = 0;
#pragma unroll 1  // it is inlined many times, and rarely runs
    for (int i = 0; i < depth_; ++i) {
      const uint32_t outer = rest / size_[i];
      at += int64_t(rest - outer * size_[i]) * stride_[i];
      rest = outer;
    }
    return at;
  }

 private:
  static constexpr int kMaxDepth = 8;
  int64_t rows_ = 1;
  int depth_ = 0;
  uint32_t size_[kMaxDepth] = {};  // innermost first
  int64_t stride_[kMaxDepth] = {};
};

// Per-row values of an optional tensor, of any dtype and strides; false if there is no tensor.
class RowValues {
 public:
  RowValues() = default;
  explicit RowValues(const Tensor& x)
      : index_(x.sizes(), x.strides(), x.sizes().size()),
        data_(x.const_data_ptr()),
        dtype_(dtype_of(x)) {}
  explicit RowValues(const OptTensor& x) : RowValues(x ? RowValues(*x) : RowValues()) {}

  PPO_HOST_DEVICE explicit operator bool() const { return data_ != nullptr; }
  PPO_DEVICE bool is_set(int64_t row) const {
    return static_cast<const uint8_t*>(data_)[index_.offset(row)] != 0;
  }
  PPO_DEVICE int64_t integer(int64_t row) const {
    return read_index(data_, dtype_, index_.offset(row));
  }
  PPO_DEVICE float number(int64_t row) const {
    return read_float(data_, dtype_, index_.offset(row));
  }

 private:
  RowIndex index_;
  const void* data_ = nullptr;
  DType dtype_ = DType::f32;
};

}  // namespace ppo::cuda
