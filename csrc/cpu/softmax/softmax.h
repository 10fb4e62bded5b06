// Rows of logits on the CPU: arguments, softmax from the states of segments, and gradient.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "../../tensor/rows.h"
#include "../../tensor/views.h"

namespace ppo {

// Logits per segment of a row. Segments are merged in order: the bits of a row depend on V alone,
// and a few long rows still occupy every thread.
constexpr int64_t kSegment = 32768;

// Softmax state of a segment. With z = logit * inv_temperature: max z, sum e^(z - max), sum (z -
// max) e^(z - max).
struct SoftmaxState {
  double max, sum, dot;
};

// Gradient of a row: d loss / d logit_j = p_j (slope * ln p_j + offset) for every column j but the
// label, which gets `label_term`.
struct RowGradient {
  enum Kind : int { zero, nan, live } kind;
  int64_t label;
  double inv_temperature, row_max, log_sum, slope, offset, label_term;
};

// Least number of logits per thread.
constexpr int64_t kLogitGrain = 16384;

inline double number_at(DType dtype, const void* row, int64_t j) {
  return read_at({row, dtype, 1, 0, 0, 1}, 0, j);
}

// 1 / temperature in the precision of the kernels, so that forward and backward see one value.
inline double inverse(DType dtype, double temperature) {
  return dtype == DType::f64 ? 1.0 / temperature : double(float(1.0 / temperature));
}

// One row of logits, contiguous.
struct LogitsRow {
  const char* logits;
  DType dtype;
  int64_t vocab, label;
  double inv_temperature;

  bool has_label() const { return label >= 0 && label < vocab; }
  double label_logit() const { return number_at(dtype, logits, label); }
  int64_t segments() const { return vocab > 0 ? (vocab + kSegment - 1) / kSegment : 1; }
};

// Logits (..., V) by rows, with every row's temperature.
struct RowsOfLogits {
  const char* logits;
  DType dtype;
  int64_t item, vocab, segments;  // item: bytes of a logit
  RowIndex rows;
  RowValues temperature;
  double number_temperature;

  RowsOfLogits(const Tensor& logits, const OptTensor& temperature, double number_temperature)
      : logits(static_cast<const char*>(logits.const_data_ptr())),
        dtype(dtype_of(logits)),
        item(int64_t(logits.element_size())),
        vocab(logits.sizes()[logits.sizes().size() - 1]),
        segments((vocab + kSegment - 1) / kSegment),
        rows(logits.sizes(), logits.strides(), logits.sizes().size() - 1),
        temperature(temperature),
        number_temperature(number_temperature) {}

  const char* row(int64_t i) const { return logits + rows.offset(i) * item; }
  double inv_temperature(int64_t i) const {
    return inverse(dtype, temperature ? temperature.number(i) : number_temperature);
  }
  // Calls f(task, row, first, n) for every segment of every row, in parallel.
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

// The same with every row's token (label) and mask.
struct LogitsRows : RowsOfLogits {
  RowValues tokens, mask;
  int64_t ignore_index;

  LogitsRows(const char* op, const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
             const OptTensor& temperature, int64_t ignore_index, double number_temperature)
      : RowsOfLogits(checked(op, logits, tokens, mask, temperature), temperature,
                     number_temperature),
        tokens(tokens),
        mask(mask),
        ignore_index(ignore_index) {}

  static const Tensor& checked(const char* op, const Tensor& logits, const Tensor& tokens,
                               const OptTensor& mask, const OptTensor& temperature) {
    PPO_CHECK(logits.is_cpu() && tokens.is_cpu(), op, "logits must be (..., V)");
    check_logits(logits, tokens, mask, op);
    check_like(tokens, mask, op, "mask");
    check_like(tokens, temperature, op, "temperature");
    return logits;
  }

  bool live(int64_t i) const {
    return (!mask || mask.is_set(i)) && tokens.integer(i) != ignore_index;
  }
  LogitsRow at(int64_t i) const {
    return {row(i), dtype, vocab, tokens.integer(i), inv_temperature(i)};
  }
};

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// State of a row from those of its segments, in order, relative to the largest maximum.
inline SoftmaxState merge(const SoftmaxState* states, int64_t n) {
  SoftmaxState all{states[0].max, 0, 0};
  for (int64_t i = 1; i < n; ++i) all.max = states[i].max > all.max ? states[i].max : all.max;
  for (int64_t i = 0; i < n; ++i) {
    const double delta = states[i].max - all.max, scale = std::exp(delta);
    all.sum += states[i].sum * scale;
    if (scale > 0 || scale != scale) all.dot += (states[i].dot + delta * states[i].sum) * scale;
  }
  return all;
}

template <class S>
struct Outputs {
  S *logprobs, *entropy, *row_max, *log_sum;
  void set(int64_t row, double lp, double h, double max, double ls) const {
    logprobs[row] = S(lp);
    entropy[row] = S(h);
    row_max[row] = S(max);
    log_sum[row] = S(ls);
  }
};

// Results of a row that is computed, from the states of its segments.
template <class S>
void finish_row(const LogitsRow& r, const SoftmaxState* states, int64_t row,
                const Outputs<S>& out) {
  const SoftmaxState all = merge(states, r.segments());
  if (!(all.sum > 0)) return out.set(row, kNaN, kNaN, kNaN, kNaN);
  const double own = std::log(all.sum), entropy = own - all.dot / all.sum;
  if (!r.has_label()) return out.set(row, kNaN, kNaN, all.max, own);
  const double z = r.label_logit() * r.inv_temperature - all.max;
  // The label's own share of the sum is e^z. Rounding lowers the sum below it and the entropy
  // below 0 where the label is certain and z, then the rounding of the maximum, is not 0.
  const double log_sum = z > own ? z : own;
  out.set(row, z - log_sum, entropy < 0 ? 0 : entropy, all.max, log_sum);
}

// Inputs of a row's gradient: incoming gradients and the forward's results.
struct RowNumbers {
  double grad_logprobs, grad_entropy, entropy, row_max, log_sum;
};

// The rows' tensors of numbers; absent gradients are 0.
struct Upstream {
  RowValues grad_logprobs, grad_entropy, entropy, row_max, log_sum;

  RowNumbers at(int64_t row) const {
    return {grad_logprobs ? grad_logprobs.number(row) : 0.0,
            grad_entropy ? grad_entropy.number(row) : 0.0, entropy.number(row),
            row_max.number(row), log_sum.number(row)};
  }
};

// Gradient of a row. With the incoming gradients g and h, l = ln p and the label y: d loss / d z_j
// = g (1[j = y] - p_j) - h p_j (l_j + H).
inline RowGradient row_gradient(const LogitsRow& r, const RowNumbers& x) {
  RowGradient out{};
  double g = x.grad_logprobs;
  const double h = x.grad_entropy;
  if (g == 0 && h == 0) return out;
  out.label = r.label;
  if (!r.has_label()) {
    out.kind = RowGradient::nan;
    return out;
  }
  const double H = x.entropy, inv = r.inv_temperature;
  out.row_max = x.row_max;
  out.log_sum = x.log_sum;
  const double label_logit = r.label_logit();
  // A label at -inf has the log-probability -inf whatever the other logits are. (A NaN row stays
  // NaN.)
  const bool impossible =
      label_logit == -std::numeric_limits<double>::infinity() && out.log_sum == out.log_sum;
  if (impossible) g = 0;
  if (g == 0 && h == 0) return out;
  const double ln_p = label_logit * inv - out.row_max - out.log_sum;
  out.kind = RowGradient::live;
  out.inv_temperature = inv;
  out.slope = -h * inv;
  out.offset = -(g + h * H) * inv;
  out.label_term =
      impossible ? 0.0 : (-g * std::expm1(ln_p) - h * std::exp(ln_p) * (ln_p + H)) * inv;
  return out;
}

// Checked view of a tensor with a number per row.
inline RowValues row_values(const char* op, const Tensor& tokens, const OptTensor& x,
                            const char* name) {
  check_like(tokens, x, op, name);
  return RowValues(x);
}

// Writes columns [first, first + n) of a row's gradient from `to` on, as `wanted`, which is what
// the kernel writes; `from`, logit `first`, may be at the same place.
template <class Kernel>
void write_gradient(Kernel kernel, const RowGradient& gradient, DType dtype, const char* from,
                    int64_t first, int64_t n, char* to, DType wanted) {
  const int64_t item = wanted == DType::f64 ? 8 : wanted == DType::f32 ? 4 : 2;
  switch (gradient.kind) {
    case RowGradient::zero:
      std::memset(to, 0, size_t(n * item));
      break;
    case RowGradient::nan:
      for (int64_t j = 0; j < n; ++j) store_as(wanted, to + j * item, kNaN);
      break;
    case RowGradient::live:
      kernel(dtype, from, to, n, gradient);
      if (gradient.label >= first && gradient.label < first + n) {
        store_as(wanted, to + (gradient.label - first) * item, gradient.label_term);
      }
      break;
  }
}

}  // namespace ppo
