// Log-probability and entropy of one token per row of logits, and the gradient (csrc/cpu).
#include <memory>

#include "logprobs_rows.h"

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
