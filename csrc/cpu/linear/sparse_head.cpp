// ppo_fast::sparse_logits.cpu, sparse_hidden_grad.cpu and sparse_weight_grad.cpu: the head's three
// products over pairs (row, id) alone. Rows of the weight are read where they lie, never gathered
// into a copy. There is no other device's C++ kernel, so the arguments are read here.
#include "../../tensor/pairs.h"

namespace ppo {

// A matrix whose rows are taken by index, contiguous each.
struct Gathered {
  const void* data;
  DType dtype;
  int64_t stride, rows, cols;  // stride in elements

  bool has(int64_t row) const { return row >= 0 && row < rows; }
};

constexpr int64_t kAbsent = -1;

}  // namespace ppo

#define PPO_KERNEL "../linear/sparse_head_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

Gathered gathered(const char* op, const Tensor& x, const char* name) {
  const View v = view_of(x);
  const bool floating = v.dtype == DType::f32 || v.dtype == DType::bf16 || v.dtype == DType::f16 ||
                        v.dtype == DType::f64;
  STD_TORCH_CHECK(floating && x.sizes().size() == 2 && (v.cols <= 1 || v.col_stride == 1),
                  "ppo_fast::", op, ": ", name, " must be a float matrix with contiguous rows");
  return {v.data, v.dtype, v.row_stride, v.rows, v.cols};
}

void check_pairs(const char* op, const Tensor& x, bool good, const char* what) {
  PPO_CHECK(x.is_cpu() && x.sizes().size() == 1 && (x.numel() <= 1 || x.strides()[0] == 1) && good,
            op, what);
}

const int32_t* checked_ids(const char* op, const Tensor& ids) {
  check_pairs(op, ids, dtype_of(ids) == DType::i32, "ids must be contiguous int32 (M,)");
  return static_cast<const int32_t*>(ids.const_data_ptr());
}

void check_grads(const char* op, const Tensor& grads, const Tensor& operand, int64_t pairs) {
  check_pairs(op, grads, grads.numel() == pairs && grads.scalar_type() == compute_dtype(operand),
              "grad_logits must be contiguous fp32 (fp64 for fp64) (M,)");
}

// Pairs per thread at least.
int64_t pair_grain(int64_t cols) { return 1 + 32768 / (cols + 64); }

const char* row_of(const Tensor& x, int64_t row) {
  return static_cast<const char*>(x.const_data_ptr()) +
         row * x.strides()[0] * int64_t(x.element_size());
}

Tensor sparse_logits(Tensor hidden, Tensor weight, Tensor ids, Tensor offsets, Tensor mask) {
  constexpr const char* op = "sparse_logits";
  const Gathered x = gathered(op, hidden, "hidden"), w = gathered(op, weight, "weight");
  const int32_t* const id = checked_ids(op, ids);
  const int64_t n = ids.numel();
  const PairRows pairs(op, offsets, mask, n);
  PPO_CHECK(x.dtype == w.dtype && x.cols == w.cols && x.rows == pairs.rows(), op,
            "hidden (N, H) and weight (V, H) must agree in dtype and H, and N with mask");
  Tensor out = empty(ids.sizes(), compute_dtype(hidden));
  char* const to = data<char>(out);
  const int64_t item = int64_t(out.element_size());
  const auto kernel = PPO_SELECT(sparse_row_logits);
  pairs.for_ranges(pair_grain(w.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!pairs.live(row)) continue;
      const int64_t first = pairs.first(row);
      kernel(row_of(hidden, row), w, id + first, pairs.count(row), n - first, to + first * item);
    }
  });
  return out;
}

Tensor matrix(int64_t rows, int64_t cols, ScalarType dtype) {
  const std::array<int64_t, 2> sizes = {rows, cols};
  Tensor out = empty(Sizes(sizes.data(), 2), dtype);
  advise_huge_pages(data<char>(out), size_t(out.numel()) * out.element_size());
  return out;
}

void fill_row(const Gathered& like, char* row, double value) {
  const int64_t item = like.dtype == DType::f64 ? 8 : like.dtype == DType::f32 ? 4 : 2;
  for (int64_t h = 0; h < like.cols; ++h) store_as(like.dtype, row + h * item, value);
}

bool any_wrong(const int32_t* ids, int64_t n, int64_t vocab) {
  bool wrong = false;
  for (int64_t i = 0; i < n; ++i) wrong |= ids[i] < kAbsent || ids[i] >= vocab;
  return wrong;
}

Tensor sparse_hidden_grad(Tensor grad_logits, Tensor weight, Tensor ids, Tensor offsets,
                          Tensor mask) {
  constexpr const char* op = "sparse_hidden_grad";
  const Gathered w = gathered(op, weight, "weight");
  const int32_t* const id = checked_ids(op, ids);
  const int64_t n = ids.numel();
  const PairRows pairs(op, offsets, mask, n);
  check_grads(op, grad_logits, weight, n);
  Tensor out = matrix(pairs.rows(), w.cols, weight.scalar_type());
  const char* const grads = static_cast<const char*>(grad_logits.const_data_ptr());
  char* const to = data<char>(out);
  const int64_t item = int64_t(grad_logits.element_size());
  const int64_t row_bytes = w.cols * int64_t(out.element_size());
  const auto sum = PPO_SELECT(sparse_row_sum<int32_t>);
  pairs.for_ranges(pair_grain(w.cols), [&](int64_t begin, int64_t end) {
    std::vector<char> buffer(size_t(w.cols * item));
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = pairs.first(row), count = pairs.live(row) ? pairs.count(row) : 0;
      if (any_wrong(id + first, count, w.rows)) {
        fill_row(w, to + row * row_bytes, std::numeric_limits<double>::quiet_NaN());
      } else {
        sum(w, id + first, grads + first * item, count, n - first, buffer.data(),
            to + row * row_bytes);
      }
    }
  });
  return out;
}

// An id's pairs are [starts[id], starts[id + 1]).
template <class S, class I>
void weight_grad(const Gathered& x, const Tensor& grad_logits, const I* rows,
                 const int64_t* starts, int64_t vocab, const Tensor& grad_weight,
                 const Tensor& grad_bias) {
  const S* const grads = static_cast<const S*>(grad_logits.const_data_ptr());
  const int64_t n = grad_logits.numel();
  S* const bias = data<S>(grad_bias);
  char* const to = data<char>(grad_weight);
  const int64_t row_bytes = x.cols * int64_t(grad_weight.element_size());
  const auto sum = PPO_SELECT(sparse_row_sum<I>);
  // An id costs the writing of its row, a pair the reading of one.
  const auto work = [&](int64_t id) { return id + starts[id] - starts[0]; };
  share_work(vocab, pair_grain(x.cols), work, [&](int64_t begin, int64_t end) {
    std::vector<S> buffer(size_t(x.cols));
    for (int64_t id = begin; id < end; ++id) {
      const int64_t first = starts[id], count = starts[id + 1] - first;
      double total = 0;
      for (int64_t i = first; i < first + count; ++i) total += double(grads[i]);
      bias[id] = S(total);
      sum(x, rows + first, grads + first, count, n - first, buffer.data(), to + id * row_bytes);
    }
  });
}

std::tuple<Tensor, Tensor> sparse_weight_grad(Tensor grad_logits, Tensor rows, Tensor starts,
                                              Tensor hidden) {
  constexpr const char* op = "sparse_weight_grad";
  const Gathered x = gathered(op, hidden, "hidden");
  const int64_t n = rows.numel();
  check_grads(op, grad_logits, hidden, n);
  const DType index = dtype_of(rows);
  check_pairs(op, rows, index == DType::i32 || index == DType::i64,
              "rows must be contiguous int32 or int64 (M,)");
  const int64_t* const ends = checked_ends(op, starts, n, "starts");
  const int64_t vocab = starts.numel() - 1;
  const std::array<int64_t, 1> sizes = {vocab};
  auto out = std::make_tuple(matrix(vocab, x.cols, hidden.scalar_type()),
                             empty(Sizes(sizes.data(), 1), compute_dtype(hidden)));
  const auto fill = [&](auto one, const auto* row) {
    weight_grad<decltype(one)>(x, grad_logits, row, ends, vocab, std::get<0>(out),
                               std::get<1>(out));
  };
  const auto typed = [&](const auto* row) {
    return is_double(hidden) ? fill(double(), row) : fill(float(), row);
  };
  if (index == DType::i32) {
    typed(static_cast<const int32_t*>(rows.const_data_ptr()));
  } else {
    typed(static_cast<const int64_t*>(rows.const_data_ptr()));
  }
  return out;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("sparse_logits.cpu", TORCH_BOX(&ppo::sparse_logits));
  m.impl("sparse_hidden_grad.cpu", TORCH_BOX(&ppo::sparse_hidden_grad));
  m.impl("sparse_weight_grad.cpu", TORCH_BOX(&ppo::sparse_weight_grad));
}
