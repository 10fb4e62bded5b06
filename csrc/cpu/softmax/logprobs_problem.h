// The arguments that forward and backward share, row by row.
#pragma once

#include "../../tensor/rows.h"
#include "../../tensor/views.h"
#include "logprobs.h"

namespace ppo {

// Rows of fewer logits than this together are not worth another thread.
constexpr int64_t kLogitGrain = 16384;

struct LogprobsProblem {
  const char* logits;
  DType dtype;
  int64_t item, vocab, segments;
  RowIndex rows;
  RowValues tokens, mask, temperature;
  int64_t ignore_index;
  double number_temperature;

  LogprobsProblem(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                  const OptTensor& temperature, const std::vector<int64_t>& codes,
                  const std::vector<double>& params, const char* op)
      : logits(static_cast<const char*>(logits.const_data_ptr())),
        dtype(dtype_of(logits)),
        item(int64_t(logits.element_size())),
        vocab(checked_vocab(logits, tokens, mask, temperature, op)),
        segments((vocab + kSegment - 1) / kSegment),
        rows(logits.sizes(), logits.strides(), logits.sizes().size() - 1),
        tokens(tokens),
        mask(mask),
        temperature(temperature) {
    check_options(codes, 1, params, 1, op);
    ignore_index = codes[0];
    number_temperature = params[0];
  }

  static int64_t checked_vocab(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                               const OptTensor& temperature, const char* op) {
    const auto sizes = logits.sizes(), strides = logits.strides(), lead = tokens.sizes();
    const size_t rank = lead.size();
    PPO_CHECK(logits.is_cpu() && tokens.is_cpu() && sizes.size() == rank + 1, op,
              "logits must be (..., V)");
    for (size_t i = 0; i < rank; ++i) PPO_CHECK(sizes[i] == lead[i], op, "shape of tokens");
    PPO_CHECK(sizes[rank] == 1 || (sizes[rank] > 1 && strides[rank] == 1), op,
              "the last dimension must be contiguous");
    check_like(tokens, mask, op, "mask");
    const DType index = dtype_of(tokens);
    PPO_CHECK(index == DType::i64 || index == DType::i32, op, "tokens must be int32 or int64");
    PPO_CHECK(!mask || dtype_of(*mask) == DType::byte, op, "mask must be a 1-byte type");
    check_like(tokens, temperature, op, "temperature");
    return sizes[rank];
  }

  const char* row(int64_t i) const { return logits + rows.offset(i) * item; }
  bool live(int64_t i) const {
    return (!mask || mask.is_set(i)) && tokens.integer(i) != ignore_index;
  }
  double inv_temperature(int64_t i) const {
    return narrowed(1.0 / (temperature ? temperature.number(i) : number_temperature));
  }
  // To the precision that the kernels compute in, so that forward and backward see the same value.
  double narrowed(double x) const { return dtype == DType::f64 ? x : double(float(x)); }
  double logit(const char* row, int64_t j) const {
    return read_at({row, dtype, 1, vocab, 0, 1}, 0, j);
  }
  // f(row, first, n) for every segment of every row, in parallel.
  template <class Fn>
  void for_segments(const Fn& f) const {
    const int64_t length = vocab < kSegment ? vocab : kSegment;
    parallel_for(
        rows.rows() * segments, 1 + kLogitGrain / (length + 64), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task % segments * kSegment;
            f(task, task / segments, first, vocab - first < kSegment ? vocab - first : kSegment);
          }
        });
  }
};

}  // namespace ppo
