// From a row's softmax parts to its results, and from its results to its gradient. Include it
// before foreach_isa.h.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "logprobs_problem.h"

namespace ppo {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Everything in units of the largest maximum, in the order of the segments.
inline SoftmaxPart merge(const SoftmaxPart* parts, int64_t n) {
  SoftmaxPart all{parts[0].max, 0, 0};
  for (int64_t i = 1; i < n; ++i) all.max = parts[i].max > all.max ? parts[i].max : all.max;
  for (int64_t i = 0; i < n; ++i) {
    const double delta = parts[i].max - all.max, scale = std::exp(delta);
    all.sum += parts[i].sum * scale;
    if (scale > 0 || scale != scale) all.dot += (parts[i].dot + delta * parts[i].sum) * scale;
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
void finish_row(const LogprobsProblem& p, int64_t row, const SoftmaxPart* parts,
                const Outputs<S>& out) {
  if (!p.live(row)) return out.set(row, 0, 0, 0, 0);
  const SoftmaxPart all = merge(parts, p.segments);
  if (!(all.sum > 0)) return out.set(row, kNaN, kNaN, kNaN, kNaN);
  const double log_sum = std::log(all.sum);
  const int64_t token = p.tokens.integer(row);
  if (token < 0 || token >= p.vocab) return out.set(row, kNaN, kNaN, all.max, log_sum);
  const double z = p.logit(p.row(row), token) * p.inv_temperature(row) - all.max;
  out.set(row, z - log_sum, log_sum - all.dot / all.sum, all.max, log_sum);
}

// What a row's gradient is made of: what arrives, and the forward's results.
struct RowNumbers {
  double grad_logprobs, grad_entropy, entropy, row_max, log_sum;
};

// With g and h the gradients that arrive and l = ln p: d loss / d z_j = g (1[j = y] - p_j) - h p_j
// (l_j + H).
inline RowGradient row_gradient(const LogprobsProblem& p, int64_t row, const RowNumbers& x) {
  RowGradient out{};
  double g = x.grad_logprobs;
  const double h = x.grad_entropy;
  if (g == 0 && h == 0) return out;
  out.token = p.tokens.integer(row);
  if (out.token < 0 || out.token >= p.vocab) {
    out.kind = RowGradient::nan;
    return out;
  }
  const double H = x.entropy, inv = p.inv_temperature(row);
  out.row_max = x.row_max;
  out.log_sum = x.log_sum;
  const double label = p.logit(p.row(row), out.token);
  // A label at -inf has the log-probability -inf whatever the other logits are. (A NaN row stays
  // NaN.)
  const bool impossible =
      label == -std::numeric_limits<double>::infinity() && out.log_sum == out.log_sum;
  if (impossible) g = 0;
  if (g == 0 && h == 0) return out;
  const double ln_p = label * inv - out.row_max - out.log_sum;
  out.kind = RowGradient::live;
  out.inv_temperature = inv;
  out.slope = -h * inv;
  out.offset = -(g + h * H) * inv;
  out.at_token =
      impossible ? 0.0 : (-g * std::expm1(ln_p) - h * std::exp(ln_p) * (ln_p + H)) * inv;
  return out;
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

// Logits [first, first + n) of row `row` of the gradient at `out`, which may be the logits.
template <class Kernel>
void write_gradient(const LogprobsProblem& p, Kernel kernel, const RowGradient& gradient,
                    int64_t row, int64_t first, int64_t n, char* out, const RowIndex& out_rows) {
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
      if (gradient.token >= first && gradient.token < first + n) {
        store_as(p.dtype, to + (gradient.token - first) * p.item, gradient.at_token);
      }
      break;
  }
}

}  // namespace ppo
