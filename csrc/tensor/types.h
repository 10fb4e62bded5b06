// Storage types and the strided 2-D view that kernels read through. No torch headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ppo {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

enum class DType { f32, bf16, f16, f64, byte, i32, i64 };

// Element (r, c) of a (rows, cols) tensor is at data + (r * row_stride + c * col_stride) elements.
// A stride of 0 repeats an element; an absent tensor is a constant with both strides 0.
struct View {
  const void* data;
  DType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;

  View transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  int64_t offset(int64_t row, int64_t col) const { return row * row_stride + col * col_stride; }
};

template <class Storage>
inline const Storage* at(const View& v, int64_t row, int64_t col) {
  return static_cast<const Storage*>(v.data) + v.offset(row, col);
}

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return as_float(uint32_t(x.bits) << 16); }

// Shift the fp16 exponent into place and rescale by 2^112, which also normalises subnormals.
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = uint32_t(x.bits & 0x7fffu) << 13;
  if (rest >= (0x7c00u << 13)) return as_float(sign | rest | 0x7f800000u);
  return as_float(sign | as_bits(as_float(rest) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t b = as_bits(x);
  out->bits = x != x ? 0x7fc0u : uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

// Round to nearest even. Adding 2^(e+13-23)-sized units lets the fp32 adder round subnormals.
inline void from_float(float x, fp16* out) {
  const uint32_t b = as_bits(x), sign = (b >> 16) & 0x8000u, mag = b & 0x7fffffffu;
  uint32_t h;
  if (mag > 0x7f800000u) {
    h = 0x7e00u;
  } else if (mag >= 0x477ff000u) {
    h = 0x7c00u;
  } else if (mag < 0x38800000u) {
    h = as_bits(as_float(mag) + 0.5f) - 0x3f000000u;
  } else {
    h = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

}  // namespace ppo
