// Views of torch tensors, checks of arguments, and the CPU's outputs, threads and merged partial
// results. Include it before foreach_isa.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "types.h"

namespace ppo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

#define PPO_CHECK(cond, op, what) STD_TORCH_CHECK(cond, "ppo_fast::", op, ": ", what)

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] != y[i]) return false;
  }
  return true;
}

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
      return DType::byte;
    case ScalarType::Int:
      return DType::i32;
    case ScalarType::Long:
      return DType::i64;
    default:
      STD_TORCH_CHECK(false, "ppo_fast: unsupported dtype");
      return DType::f32;
  }
}

// 2-D view of a CPU tensor: (B, T) as it is, (N,) as one row, 0-d as 1 x 1.
inline View view_of(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  STD_TORCH_CHECK(x.is_cpu() && sizes.size() <= 2, "ppo_fast: expected a CPU tensor of rank <= 2");
  View v{x.const_data_ptr(), dtype_of(x), 1, 1, 0, 0};
  if (sizes.size() >= 1) {
    v.cols = sizes[sizes.size() - 1];
    v.col_stride = strides[sizes.size() - 1];
  }
  if (sizes.size() == 2) {
    v.rows = sizes[0];
    v.row_stride = strides[0];
  }
  return v;
}

inline double read_at(const View& v, int64_t row, int64_t col) {
  switch (v.dtype) {
    case DType::f32:
      return *at<float>(v, row, col);
    case DType::bf16:
      return to_float(*at<bf16>(v, row, col));
    case DType::f16:
      return to_float(*at<fp16>(v, row, col));
    case DType::f64:
      return *at<double>(v, row, col);
    case DType::byte:
      return *at<uint8_t>(v, row, col);
    case DType::i32:
      return *at<int32_t>(v, row, col);
    default:
      return double(*at<int64_t>(v, row, col));
  }
}
inline void store_as(DType dtype, void* at, double x) {
  switch (dtype) {
    case DType::f32:
      return from_float(float(x), static_cast<float*>(at));
    case DType::bf16:
      return from_float(float(x), static_cast<bf16*>(at));
    case DType::f16:
      return from_float(float(x), static_cast<fp16*>(at));
    default:
      *static_cast<double*>(at) = x;
  }
}
inline int64_t read_int(const View& v, int64_t row, int64_t col) {
  return v.dtype == DType::i64 ? *at<int64_t>(v, row, col) : *at<int32_t>(v, row, col);
}
// Value of an optional 0-d tensor of any float dtype; `number` if absent.
inline double scalar_or(const OptTensor& x, double number) {
  return x ? read_at(view_of(*x), 0, 0) : number;
}

// cu_seqlens (S+1,), int32 or int64, converted to int64.
inline std::vector<int64_t> read_cu_seqlens(const Tensor& x) {
  const View v = view_of(x);
  std::vector<int64_t> out(static_cast<size_t>(v.cols));
  for (int64_t i = 0; i < v.cols; ++i) out[static_cast<size_t>(i)] = read_int(v, 0, i);
  return out;
}

// Check: x is a CPU tensor of the main tensor's shape.
inline void check_like(const Tensor& main, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && same_sizes(main, x), "ppo_fast::", op, ": shape of ", name);
}
inline void check_like(const Tensor& main, const OptTensor& x, const char* op, const char* name) {
  if (x) check_like(main, *x, op, name);
}

// Check: logits (..., V) with a contiguous last dimension, integer tokens (...), a 1-byte mask.
inline void check_logits(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                         const char* op) {
  const auto sizes = logits.sizes(), strides = logits.strides(), lead = tokens.sizes();
  const size_t rank = lead.size();
  PPO_CHECK(sizes.size() == rank + 1, op, "logits must be (..., V)");
  for (size_t i = 0; i < rank; ++i) PPO_CHECK(sizes[i] == lead[i], op, "shape of tokens");
  PPO_CHECK(sizes[rank] == 1 || (sizes[rank] > 1 && strides[rank] == 1), op,
            "the last dimension must be contiguous");
  const DType index = dtype_of(tokens);
  PPO_CHECK(index == DType::i64 || index == DType::i32, op, "tokens must be int32 or int64");
  PPO_CHECK(!mask || dtype_of(*mask) == DType::byte, op, "mask must be a 1-byte type");
}

// Check: offsets start at 0, never decrease and end at n.
inline void check_cu_seqlens(const std::vector<int64_t>& cu, int64_t n, const char* op) {
  bool good = !cu.empty() && cu.front() == 0 && cu.back() == n;
  for (size_t i = 1; good && i < cu.size(); ++i) good = cu[i - 1] <= cu[i];
  PPO_CHECK(good, op, "cu_seqlens must rise from 0 to the number of tokens");
}

// A fresh contiguous CPU tensor.
inline Tensor empty(Sizes sizes, ScalarType dtype) {
  std::array<int64_t, 16> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "ppo_fast: rank above 16");
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
inline ScalarType compute_dtype(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

template <class T>
inline T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Check: moments are float64 (3,), any stride.
inline void check_moments(const Tensor& moments, const char* op) {
  PPO_CHECK(moments.sizes().size() == 1 && moments.sizes()[0] == 3 && is_double(moments), op,
            "moments must be float64 (3,)");
}

// Calls f(begin, end) over [0, n) on torch's threads, at least `grain` items per call. f must not
// throw, and its result for an item must not depend on where the range was cut.
template <class Fn>
inline void parallel_for(int64_t n, int64_t grain, const Fn& f) {
  if (n <= grain) {
    if (n > 0) f(0, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain, f);
}

// Requests huge pages for untouched memory: one page fault per 2 MB instead of 4 KB. The request
// is a hint: it changes no content, and failure is harmless.
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Merges (count, mean, M2) partial results in order (Chan, Golub and LeVeque 1979).
inline void merge_moments(const std::vector<double>& partials, double* out) {
  double n = 0, mean = 0, m2 = 0;
  for (size_t i = 0; i + 2 < partials.size(); i += 3) {
    const double more = partials[i];
    if (more == 0) continue;
    const double delta = partials[i + 1] - mean, share = more / (n + more);
    mean = n == 0 ? partials[i + 1] : mean + delta * share;
    m2 += partials[i + 2] + (n == 0 ? 0.0 : delta * delta * n * share);
    n += more;
  }
  out[0] = n;
  out[1] = mean;
  out[2] = m2;
}

}  // namespace ppo
