// The gradient of log-probability and entropy with respect to the logits (csrc/cpu).
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "logprobs_problem.h"
#include "pages.h"

#define PPO_KERNEL "logprobs_backward_simd.h"
#include "foreach_isa.h"

namespace ppo {
namespace {

struct Upstream {
  RowValues grad_logprobs, grad_entropy, entropy, row_max, log_sum;
};

// With g and h the gradients that arrive and l = ln p: d loss / d z_j = g (1[j = y] - p_j) - h p_j
// (l_j + H).
RowGradient row_gradient(const LogprobsProblem& p, const Upstream& up, int64_t row) {
  RowGradient out{};
  if (!p.live(row)) return out;
  double g = up.grad_logprobs ? up.grad_logprobs.number(row) : 0.0;
  const double h = up.grad_entropy ? up.grad_entropy.number(row) : 0.0;
  if (g == 0 && h == 0) return out;
  out.token = p.tokens.integer(row);
  if (out.token < 0 || out.token >= p.vocab) {
    out.kind = RowGradient::nan;
    return out;
  }
  const double H = up.entropy.number(row), inv = p.inv_temperature(row);
  out.row_max = up.row_max.number(row);
  out.log_sum = up.log_sum.number(row);
  const double x = p.logit(p.row(row), out.token);
  // A label at -inf has the log-probability -inf whatever the other logits are. (A NaN row stays
  // NaN.)
  const bool impossible =
      x == -std::numeric_limits<double>::infinity() && out.log_sum == out.log_sum;
  if (impossible) g = 0;
  if (g == 0 && h == 0) return out;
  const double ln_p = x * inv - out.row_max - out.log_sum;
  out.kind = RowGradient::live;
  out.inv_temperature = inv;
  out.slope = -h * inv;
  out.offset = -(g + h * H) * inv;
  out.at_token =
      impossible ? 0.0 : (-g * std::expm1(ln_p) - h * std::exp(ln_p) * (ln_p + H)) * inv;
  return out;
}

void store_as(DType dtype, void* at, double x) {
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

// Writes row i at out + out_rows.offset(i); `out` may be the logits themselves.
void backward(const LogprobsProblem& p, const Upstream& up, char* out, const RowIndex& out_rows) {
  const int64_t rows = p.rows.rows();
  std::unique_ptr<RowGradient[]> gradients(new RowGradient[size_t(rows)]);
  // Before any logit is overwritten: a row's segments may run on several threads.
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) gradients[size_t(row)] = row_gradient(p, up, row);
  });
  const auto kernel = PPO_SELECT(softmax_gradient);
  p.for_segments([&](int64_t, int64_t row, int64_t first, int64_t n) {
    const RowGradient& gradient = gradients[size_t(row)];
    char* to = out + (out_rows.offset(row) + first) * p.item;
    switch (gradient.kind) {
      case RowGradient::zero:
        std::memset(to, 0, size_t(n * p.item));
        break;
      case RowGradient::nan:
        for (int64_t j = 0; j < n; ++j)
          store_as(p.dtype, to + j * p.item, std::numeric_limits<double>::quiet_NaN());
        break;
      case RowGradient::live:
        kernel(p.dtype, p.row(row) + first * p.item, to, n, gradient);
        if (gradient.token >= first && gradient.token < first + n) {
          store_as(p.dtype, to + (gradient.token - first) * p.item, gradient.at_token);
        }
        break;
    }
  });
}

Upstream checked_upstream(const OptTensor& grad_logprobs, const OptTensor& grad_entropy,
                          const Tensor& tokens, const Tensor& entropy, const Tensor& row_max,
                          const Tensor& log_sum, const char* op) {
  check_like(tokens, grad_logprobs, op, "grad_logprobs");
  check_like(tokens, grad_entropy, op, "grad_entropy");
  check_like(tokens, entropy, op, "entropy");
  check_like(tokens, row_max, op, "row_max");
  check_like(tokens, log_sum, op, "log_sum");
  return {RowValues(grad_logprobs), RowValues(grad_entropy), RowValues(entropy),
          RowValues(row_max), RowValues(log_sum)};
}

Tensor logprobs_bwd(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits, Tensor tokens,
                    OptTensor mask, OptTensor temperature, Tensor entropy, Tensor row_max,
                    Tensor log_sum, std::vector<int64_t> codes, std::vector<double> params) {
  const char* op = "logprobs_bwd";
  const LogprobsProblem p(logits, tokens, mask, temperature, codes, params, op);
  const Upstream up =
      checked_upstream(grad_logprobs, grad_entropy, tokens, entropy, row_max, log_sum, op);
  Tensor out = empty(logits.sizes(), logits.scalar_type());
  advise_huge_pages(data<char>(out), size_t(p.rows.rows() * p.vocab * p.item));
  backward(p, up, data<char>(out), RowIndex(out.sizes(), out.strides(), out.sizes().size() - 1));
  return out;
}

void logprobs_bwd_inplace(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits,
                          Tensor tokens, OptTensor mask, OptTensor temperature, Tensor entropy,
                          Tensor row_max, Tensor log_sum, std::vector<int64_t> codes,
                          std::vector<double> params) {
  const char* op = "logprobs_bwd_";
  const LogprobsProblem p(logits, tokens, mask, temperature, codes, params, op);
  const Upstream up =
      checked_upstream(grad_logprobs, grad_entropy, tokens, entropy, row_max, log_sum, op);
  backward(p, up, data<char>(logits), p.rows);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("logprobs_bwd.cpu", TORCH_BOX(&ppo::logprobs_bwd));
  m.impl("logprobs_bwd_.cpu", TORCH_BOX(&ppo::logprobs_bwd_inplace));
}
