// ppo_fast::logprobs_fwd.cpu and logprobs_bwd.cpu: log-probability and entropy of one label per
// row of logits, and the gradient by the logits.
#include "../../ops/logprobs.h"

#include <memory>

#include "softmax.h"

#define PPO_KERNEL "../softmax/logprobs_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const LogitsRows& p, const Tensor& tokens,
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
    for (int64_t row = begin; row < end; ++row) {
      if (p.live(row)) {
        finish_row(p.at(row), &states[size_t(row * p.segments)], row, out);
      } else {
        out.set(row, 0, 0, 0, 0);
      }
    }
  });
  return result;
}

// Writes row i at out + out_rows.offset(i); `out` may be the logits themselves.
void backward(const LogitsRows& p, const Upstream& up, char* out, const RowIndex& out_rows) {
  const int64_t rows = p.rows.rows();
  std::unique_ptr<RowGradient[]> gradients(new RowGradient[size_t(rows)]);
  // All row gradients come first, before any logit is overwritten: a row's segments may run on
  // several threads.
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gradients[size_t(row)] = p.live(row) ? row_gradient(p.at(row), up.at(row)) : RowGradient{};
    }
  });
  const auto kernel = PPO_SELECT(softmax_gradient);
  p.for_segments([&](int64_t, int64_t row, int64_t first, int64_t n) {
    write_gradient(kernel, gradients[size_t(row)], p.dtype, p.row(row) + first * p.item, first, n,
                   out + (out_rows.offset(row) + first) * p.item, p.dtype);
  });
}

struct LogprobsOnCpu {
  static LogitsRows rows(const char* op, const Tensor& logits, const Tensor& tokens,
                         const OptTensor& mask, const OptTensor& temperature, int64_t ignore_index,
                         double number_temperature) {
    return {op, logits, tokens, mask, temperature, ignore_index, number_temperature};
  }
  static RowValues values(const char* op, const Tensor& tokens, const OptTensor& x,
                          const char* name) {
    return row_values(op, tokens, x, name);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits,
                                                            const Tensor& tokens,
                                                            const LogitsRows& rows) {
    return is_double(logits) ? ppo::forward<double>(rows, tokens, ScalarType::Double)
                             : ppo::forward<float>(rows, tokens, ScalarType::Float);
  }

  static Tensor like(const Tensor& logits) {
    Tensor out = empty(logits.sizes(), logits.scalar_type());
    advise_huge_pages(data<char>(out), size_t(out.numel()) * out.element_size());
    return out;
  }
  static void backward(const Tensor&, const LogitsRows& rows, const Upstream& up,
                       const Tensor& out) {
    ppo::backward(rows, up, data<char>(out),
                  RowIndex(out.sizes(), out.strides(), out.sizes().size() - 1));
  }
};

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("logprobs_fwd.cpu", TORCH_BOX(&ppo::logprobs_fwd<ppo::LogprobsOnCpu>));
  m.impl("logprobs_bwd.cpu", TORCH_BOX(&ppo::logprobs_bwd<ppo::LogprobsOnCpu>));
  m.impl("logprobs_bwd_.cpu", TORCH_BOX(&ppo::logprobs_bwd_inplace<ppo::LogprobsOnCpu>));
}
