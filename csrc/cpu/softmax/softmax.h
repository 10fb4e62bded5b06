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

// Logits (..., V) by rows, with every row's token (label), mask and temperature.
struct LogitsRows {
  const char* logits;
  DType dtype;
  int64_t item, vocab, segments;  // item: bytes of a logit
  RowIndex rows;
  RowValues tokens, mask, temperature;
  int64_t ignore_index;
  double number_temperature;

  LogitsRows(const char* op, const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
             const OptTensor& temperature, int64_t ignore_index, double number_temperature)
      : logits(static_cast<const char*>(logits.const_data_ptr())),
        dtype(dtype_of(logits)),
        item(int64_t(logits.element_size())),
        vocab(checked_vocab(op, logits, tokens, mask, temperature)),
        segments((vocab + kSegment - 1) / kSegment),
        rows(logits.sizes(), logits.strides(), logits.sizes().size() - 1),
        tokens(tokens),
        mask(mask),
        temperature(temperature),
        ignore_index(ignore_index),
        number_temperature(number_temperature) {}

  static int64_t checked_vocab(const char* op, const Tensor& logits, const Tensor& tokens,
                               const OptTensor& mask, const OptTensor& temperature) {
    PPO_CHECK(logits.is_cpu() && tokens.is_cpu(), op, "logits must be (..., V)");
    check_logits(logits, tokens, mask, op);
    check_like(tokens, mask, op, "mask");
    check_like(tokens, temperature, op, "temperature");
    return logits.sizes()[tokens.sizes().size()];
  }

  const char* row(int64_t i) const { return logits + rows.offset(i) * item; }
  bool live(int64_t i) const {
    return (!mask || mask.is_set(i)) && tokens.integer(i) != ignore_index;
  }
  double inv_temperature(int64_t i) const {
    return narrowed(1.0 / (temperature ? temperature.number(i) : number_temperature));
  }
  // x rounded to the precision of the kernels, so that forward and backward see the same value.
  double narrowed(double x) const { return dtype == DType::f64 ? x : double(float(x)); }
  double logit(const char* row, int64_t j) const {
    return read_at({row, dtype, 1, vocab, 0, 1}, 0, j);
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

template <class S>
void finish_row(const LogitsRows& p, int64_t row, const SoftmaxState* states,
                const Outputs<S>& out) {
  if (!p.live(row)) return out.set(row, 0, 0, 0, 0);
  const SoftmaxState all = merge(states, p.segments);
  if (!(all.sum > 0)) return out.set(row, kNaN, kNaN, kNaN, kNaN);
  const double own = std::log(all.sum), entropy = own - all.dot / all.sum;
  const int64_t label = p.tokens.integer(row);
  if (label < 0 || label >= p.vocab) return out.set(row, kNaN, kNaN, all.max, own);
  const double z = p.logit(p.row(row), label) * p.inv_temperature(row) - all.max;
  // The label's own share of the sum is e^z. Rounding lowers the sum below it and the entropy
  // below 0 where the label is certain and z, then the rounding of the maximum, is not 0.
  const double log_sum = z > own ? z : own;
  out.set(row, z - log_sum, entropy < 0 ? 0 : entropy, all.max, log_sum);
}

// Inputs of a row's gradient: incoming gradients and the forward's results.
struct RowNumbers {
  double grad_logprobs, grad_entropy, entropy, row_max, log_sum;
};

// Gradient of a row. With the incoming gradients g and h, l = ln p and the label y: d loss / d z_j
// = g (1[j = y] - p_j) - h p_j (l_j + H).
inline RowGradient row_gradient(const LogitsRows& p, int64_t row, const RowNumbers& x) {
  RowGradient out{};
  double g = x.grad_logprobs;
  const double h = x.grad_entropy;
  if (g == 0 && h == 0) return out;
  out.label = p.tokens.integer(row);
  if (out.label < 0 || out.label >= p.vocab) {
    out.kind = RowGradient::nan;
    return out;
  }
  const double H = x.entropy, inv = p.inv_temperature(row);
  out.row_max = x.row_max;
  out.log_sum = x.log_sum;
  const double label_logit = p.logit(p.row(row), out.label);
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

// Writes columns [first, first + n) of row `row` of the gradient at `out`, which may be the
// logits.
template <class Kernel>
void write_gradient(const LogitsRows& p, Kernel kernel, const RowGradient& gradient, int64_t row,
                    int64_t first, int64_t n, char* out, const RowIndex& out_rows) {
  char* to = out + (out_rows.offset(row) + first) * p.item;
  switch (gradient.kind) {
    case RowGradient::zero:
      std::memset(to, 0, size_t(n * p.item));
      break;
    case RowGradient::nan:
      for (int64_t j = 0; j < n; ++j) store_as(p.dtype, to + j * p.item, kNaN);
      break;
    case RowGradient::live:
      kernel(p.dtype, p.row(row) + first * p.item, to, n, gradient);
      if (gradient.label >= first && gradient.label < first + n) {
        store_as(p.dtype, to + (gradient.label - first) * p.item, gradient.label_term);
      }
      break;
  }
}

}  // namespace ppo
