// Log-probability and entropy of one token per row of logits, and the gradient (csrc/cpu).
#include <cmath>
#include <limits>
#include <memory>

#include "logprobs_problem.h"

#define PPO_KERNEL "logprobs_simd.h"
#include "foreach_isa.h"

namespace ppo {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// Everything in units of the largest maximum, in the order of the segments.
SoftmaxPart merge(const SoftmaxPart* parts, int64_t n) {
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

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const LogprobsProblem& p, const Tensor& tokens,
                                                   ScalarType dtype) {
  auto result = std::make_tuple(empty(tokens.sizes(), dtype), empty(tokens.sizes(), dtype),
                                empty(tokens.sizes(), dtype), empty(tokens.sizes(), dtype));
  const Outputs<S> out{data<S>(std::get<0>(result)), data<S>(std::get<1>(result)),
                       data<S>(std::get<2>(result)), data<S>(std::get<3>(result))};
  const int64_t rows = p.rows.rows();
  std::unique_ptr<SoftmaxPart[]> parts(new SoftmaxPart[size_t(rows * p.segments)]);
  const auto kernel = PPO_SELECT(softmax_part);
  p.for_segments([&](int64_t task, int64_t row, int64_t first, int64_t n) {
    if (!p.live(row)) return;
    parts[size_t(task)] = kernel(p.dtype, p.row(row) + first * p.item, n, p.inv_temperature(row));
  });
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      finish_row(p, row, &parts[size_t(row * p.segments)], out);
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

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("logprobs_fwd.cpu", TORCH_BOX(&ppo::logprobs_fwd));
}
