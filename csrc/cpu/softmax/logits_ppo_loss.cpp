// ppo_fast::logits_ppo_loss.cpu: log-probabilities and the policy loss's gradient, row by row,
// while a row's logits are in the cache.
#include "../../ops/logits_ppo_loss.h"

#include <memory>

#include "softmax.h"

namespace ppo {

// Inputs of one token. Absent old_logprobs are the current ones, an absent is_weight is 1,
// ref_logprobs 0.
struct TokenValues {
  double logprobs, old_logprobs, advantage, is_weight, ref_logprobs;
};

}  // namespace ppo

#define PPO_KERNEL "../softmax/logits_ppo_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

struct LogitsPpoArgs {
  LogitsRows rows;
  PolicyOptions policy;
  RowValues old_logprobs, advantages, is_weights, ref_logprobs, weights;

  TokenValues at(int64_t row, double logprobs) const {
    return {logprobs, old_logprobs ? old_logprobs.number(row) : logprobs, advantages.number(row),
            is_weights ? is_weights.number(row) : 1.0,
            ref_logprobs ? ref_logprobs.number(row) : 0.0};
  }
};

template <class S>
void row_pass(const LogitsPpoArgs& p, int64_t row, SoftmaxState* states, const Outputs<S>& out,
              char* to, const RowIndex& to_rows) {
  const LogitsRows& r = p.rows;
  const int64_t length = r.vocab < kSegment ? r.vocab : kSegment;
  const auto segments = [&](const auto& f) {
    for (int64_t first = 0; first < r.vocab; first += length) {
      f(first, r.vocab - first < length ? r.vocab - first : length);
    }
  };
  RowGradient gradient{};
  const bool live = r.live(row);
  if (live) {
    const auto kernel = PPO_SELECT(softmax_state);
    segments([&](int64_t first, int64_t n) {
      states[first / length] =
          kernel(r.dtype, r.row(row) + first * r.item, n, r.inv_temperature(row));
    });
  }
  if (live) {
    finish_row(r.at(row), states, row, out);
    const double logprobs = out.logprobs[row], weight = p.weights.number(row);
    const double slope = scalar::policy_slope<S>(p.policy, p.at(row, logprobs));
    gradient = row_gradient(r.at(row),
                            {double(S(weight * slope)), double(S(-weight * p.policy.entropy_coef)),
                             out.entropy[row], out.row_max[row], out.log_sum[row]});
  } else {
    out.set(row, 0, 0, 0, 0);
  }
  // A row without a distribution, or a label outside it, gives a NaN gradient whatever its slopes.
  if (live && out.logprobs[row] != out.logprobs[row]) gradient.kind = RowGradient::nan;
  const auto kernel = PPO_SELECT(softmax_gradient);
  segments([&](int64_t first, int64_t n) {
    write_gradient(kernel, gradient, r.dtype, r.row(row) + first * r.item, first, n,
                   to + (to_rows.offset(row) + first) * r.item, r.dtype);
  });
}

template <class S>
std::tuple<Tensor, Tensor> all_rows(const LogitsPpoArgs& p, const Tensor& like, ScalarType dtype,
                                    char* to, const RowIndex& to_rows) {
  Tensor logprobs = empty(like.sizes(), dtype), entropy = empty(like.sizes(), dtype);
  const int64_t rows = p.rows.rows.rows();
  std::unique_ptr<S[]> numbers(new S[size_t(2 * rows)]);
  const Outputs<S> out{data<S>(logprobs), data<S>(entropy), numbers.get(), numbers.get() + rows};
  parallel_for(rows, 1 + kLogitGrain / (p.rows.vocab + 64), [&](int64_t begin, int64_t end) {
    std::unique_ptr<SoftmaxState[]> states(new SoftmaxState[size_t(p.rows.segments)]);
    for (int64_t row = begin; row < end; ++row) row_pass(p, row, states.get(), out, to, to_rows);
  });
  return {logprobs, entropy};
}

struct LogitsPpoOnCpu {
  using Args = LogitsPpoArgs;

  static LogitsRows rows(const char* op, const Tensor& logits, const Tensor& tokens,
                         const OptTensor& mask, const OptTensor& temperature, int64_t ignore_index,
                         double number_temperature) {
    return {op, logits, tokens, mask, temperature, ignore_index, number_temperature};
  }
  static RowValues values(const char* op, const Tensor& tokens, const OptTensor& x,
                          const char* name) {
    return row_values(op, tokens, x, name);
  }
  static PolicyOptions policy(const PolicyOptions& options, const OptTensor& moments,
                              const OptTensor& entropy_coef, const OptTensor& kl_coef) {
    return with_tensors(options, moments, entropy_coef, kl_coef);
  }
  // Writes the gradient to `out`; returns log-probabilities and entropies.
  static std::tuple<Tensor, Tensor> into(const Tensor& out, const Tensor& tokens,
                                         const LogitsPpoArgs& a) {
    char* const to = data<char>(out);
    const RowIndex rows(out.sizes(), out.strides(), out.sizes().size() - 1);
    return is_double(out) ? all_rows<double>(a, tokens, ScalarType::Double, to, rows)
                          : all_rows<float>(a, tokens, ScalarType::Float, to, rows);
  }
};

struct OutOfPlace : LogitsPpoOnCpu {
  using Result = std::tuple<Tensor, Tensor, Tensor>;
  static Result run(const Tensor& logits, const Tensor& tokens, const LogitsPpoArgs& a) {
    Tensor grad = empty(logits.sizes(), logits.scalar_type());
    advise_huge_pages(data<char>(grad), size_t(grad.numel()) * grad.element_size());
    auto [logprobs, entropy] = into(grad, tokens, a);
    return {logprobs, entropy, grad};
  }
};

struct InPlace : LogitsPpoOnCpu {
  using Result = std::tuple<Tensor, Tensor>;
  static Result run(const Tensor& logits, const Tensor& tokens, const LogitsPpoArgs& a) {
    return into(logits, tokens, a);
  }
};

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("logits_ppo_loss.cpu", TORCH_BOX(&ppo::logits_ppo_loss<ppo::OutOfPlace>));
  m.impl("logits_ppo_loss_.cpu", TORCH_BOX(&ppo::logits_ppo_loss<ppo::InPlace>));
}
