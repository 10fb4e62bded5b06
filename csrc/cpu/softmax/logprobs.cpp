// ppo_fast::logprobs_fwd.cpu and logprobs_bwd.cpu: log-probability and entropy of one label per
// row of logits, and the gradient with respect to the logits.
#include <memory>

#include "softmax.h"

#define PPO_KERNEL "../softmax/logprobs_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const LogprobsProblem& p, const Tensor& tokens,
                                                   ScalarType dtype) {
  auto result = std::make_tuple(empty(tokens.sizes(), dtype), empty(tokens.sizes(), dtype),
                                empty(tokens.sizes(), dtype), empty(tokens.sizes(), dtype));
  const Outputs<S> out{data<S>(std::get<0>(result)), data<S>(std::get<1>(result)),
                       data<S>(std::get<2>(result)), data<S>(std::get<3>(result))};
  const int64_t rows = p.rows.rows();
  std::unique_ptr<SoftmaxState[]> states(new SoftmaxState[size_t(rows * p.segments)]);
  const auto kernel = PPO_SELECT(softmax_state);
  p.for_segments([&](int64_t task, int64_t row, int64_t first, int64_t n) {
    if (!p.live(row)) return;
    states[size_t(task)] = kernel(p.dtype, p.row(row) + first * p.item, n, p.inv_temperature(row));
  });
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      finish_row(p, row, &states[size_t(row * p.segments)], out);
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_fwd(Tensor logits, Tensor tokens,
                                                        OptTensor mask, OptTensor temperature,
                                                        std::vector<int64_t> codes,
                                                        std::vector<double> params) {
  const LogprobsProblem p(logits, tokens, mask, temperature, codes, params, "logprobs_fwd");
  return is_double(logits) ? forward<double>(p, tokens, ScalarType::Double)
                           : forward<float>(p, tokens, ScalarType::Float);
}

struct Upstream {
  RowValues grad_logprobs, grad_entropy, entropy, row_max, log_sum;

  RowNumbers at(int64_t row) const {
    return {grad_logprobs ? grad_logprobs.number(row) : 0.0,
            grad_entropy ? grad_entropy.number(row) : 0.0, entropy.number(row),
            row_max.number(row), log_sum.number(row)};
  }
};

// Writes row i at out + out_rows.offset(i); `out` may be the logits themselves.
void backward(const LogprobsProblem& p, const Upstream& up, char* out, const RowIndex& out_rows) {
  const int64_t rows = p.rows.rows();
  std::unique_ptr<RowGradient[]> gradients(new RowGradient[size_t(rows)]);
  // Before any logit is overwritten: a row's segments may run on several threads.
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gradients[size_t(row)] = p.live(row) ? row_gradient(p, row, up.at(row)) : RowGradient{};
    }
  });
  const auto kernel = PPO_SELECT(softmax_gradient);
  p.for_segments([&](int64_t, int64_t row, int64_t first, int64_t n) {
    write_gradient(p, kernel, gradients[size_t(row)], row, first, n, out, out_rows);
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
  m.impl("logprobs_fwd.cpu", TORCH_BOX(&ppo::logprobs_fwd));
  m.impl("logprobs_bwd.cpu", TORCH_BOX(&ppo::logprobs_bwd));
  m.impl("logprobs_bwd_.cpu", TORCH_BOX(&ppo::logprobs_bwd_inplace));
}
