// Row i of a tensor of any rank, on the device: the twin of csrc/tensor/rows.h, passed by value.
#pragma once

#include "../../tensor/views.h"
#include "tensor.cuh"

namespace ppo::cuda {

// Leading dimensions, collapsed where their strides allow.
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

  // In elements from the tensor's start.
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

// One value per row, of any dtype and strides; absent where the tensor is.
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
