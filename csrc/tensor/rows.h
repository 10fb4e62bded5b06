// Row index: element offset of row i of a tensor of any rank, on the CPU. Leading dimensions are
// collapsed where strides allow.
#pragma once

#include <array>
#include <cstdint>

#include "views.h"

namespace ppo {

class RowIndex {
 public:
  RowIndex() = default;  // no dimension: every row is row 0
  // The first `rank` dimensions of a tensor.
  RowIndex(Sizes sizes, Sizes strides, size_t rank) {
    STD_TORCH_CHECK(rank <= kMaxRank, "ppo_fast: rank above 16");
    for (size_t i = rank; i-- > 0;) {
      rows_ *= sizes[i];
      if (sizes[i] == 1) continue;
      if (depth_ > 0 && strides[i] == stride_[depth_ - 1] * size_[depth_ - 1]) {
        size_[depth_ - 1] *= sizes[i];
        continue;
      }
      size_[depth_] = sizes[i];
      stride_[depth_++] = strides[i];
    }
  }

  int64_t rows() const { return rows_; }

  // Offset in elements from the tensor's start.
  int64_t offset(int64_t row) const {
    if (depth_ == 1) return row * stride_[0];
    int64_t at = 0;
    for (size_t i = 0; i < depth_; ++i) {
      at += row % size_[i] * stride_[i];
      row /= size_[i];
    }
    return at;
  }

 private:
  static constexpr size_t kMaxRank = 16;
  int64_t rows_ = 1;
  size_t depth_ = 0;
  std::array<int64_t, kMaxRank> size_, stride_;  // innermost first
};

// Per-row values of an optional tensor, of any dtype and strides; false if there is no tensor.
class RowValues {
 public:
  RowValues() : RowValues(nullptr) {}
  explicit RowValues(const OptTensor& x) : RowValues(x ? &*x : nullptr) {}
  explicit RowValues(const Tensor& x) : RowValues(&x) {}

  explicit operator bool() const { return data_ != nullptr; }
  bool is_set(int64_t row) const {
    return static_cast<const uint8_t*>(data_)[index_.offset(row)] != 0;
  }
  int64_t integer(int64_t row) const { return read_int(view_, 0, index_.offset(row)); }
  double number(int64_t row) const { return read_at(view_, 0, index_.offset(row)); }

 private:
  explicit RowValues(const Tensor* x)
      : index_(x ? RowIndex(x->sizes(), x->strides(), x->sizes().size()) : RowIndex()),
        data_(x ? x->const_data_ptr() : nullptr),
        view_{data_, x ? dtype_of(*x) : DType::f64, 1, 1, 0, 1} {}

  RowIndex index_;
  const void* data_;
  View view_;
};

}  // namespace ppo
