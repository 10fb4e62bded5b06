// ppo_fast::logits_ppo_loss.cpu: a row stays in the cache between its softmax and its gradient.
#include <memory>

#include "../../loss_options.h"
#include "softmax.h"

namespace ppo {

// One token's constants; what is absent: old_logprobs the current ones, is_weight 1, the rest 0.
struct TokenValues {
  double logprobs, old_logprobs, advantage, is_weight, ref_logprobs;
};

}  // namespace ppo

#define PPO_KERNEL "../softmax/logits_ppo_loss_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

struct Tokens {
  RowValues old_logprobs, advantages, is_weights, ref_logprobs, weights;
  bool one_weight;

  double weight(int64_t row) const { return weights.number(one_weight ? 0 : row); }
  TokenValues at(int64_t row, double logprobs) const {
    return {logprobs, old_logprobs ? old_logprobs.number(row) : logprobs, advantages.number(row),
            is_weights ? is_weights.number(row) : 1.0,
            ref_logprobs ? ref_logprobs.number(row) : 0.0};
  }
};

struct Problem {
  LogprobsProblem rows;
  PolicyOptions options;
  Tokens tokens;
};

template <class S>
void row_pass(const Problem& p, int64_t row, SoftmaxState* states, const Outputs<S>& out, char* to,
              const RowIndex& to_rows) {
  const LogprobsProblem& r = p.rows;
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
  finish_row(r, row, states, out);
  if (live) {
    const double logprobs = out.logprobs[row], weight = p.tokens.weight(row);
    const double slope = scalar::policy_slope<S>(p.options, p.tokens.at(row, logprobs));
    gradient =
        row_gradient(r, row,
                     {double(S(weight * slope)), double(S(-weight * p.options.entropy_coef)),
                      out.entropy[row], out.row_max[row], out.log_sum[row]});
  }
  // A row without a distribution, or a token out of it, shows in the gradient whatever its slopes.
  if (live && out.logprobs[row] != out.logprobs[row]) gradient.kind = RowGradient::nan;
  const auto kernel = PPO_SELECT(softmax_gradient);
  segments([&](int64_t first, int64_t n) {
    write_gradient(r, kernel, gradient, row, first, n, to, to_rows);
  });
}

template <class S>
std::tuple<Tensor, Tensor> all_rows(const Problem& p, const Tensor& like, ScalarType dtype,
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

// The policy's part of codes and params, in the order of ppo_loss.
PolicyOptions read_policy(const std::vector<int64_t>& codes, const std::vector<double>& params,
                          const OptTensor& moments, const OptTensor& entropy_coef,
                          const OptTensor& kl_coef, const OptTensor& ref_logprobs) {
  std::vector<double> numbers(params.begin() + 1, params.end());
  numbers.push_back(0.0);
  const int64_t sum = int64_t(Reduction::token_sum);
  PolicyOptions o = policy_options({codes[1], codes[2], codes[3], sum}, numbers);
  o.has_ref = ref_logprobs.has_value();
  o.entropy_coef = scalar_or(entropy_coef, o.entropy_coef);
  o.kl_coef = scalar_or(kl_coef, o.kl_coef);
  if (moments) {
    const View v = view_of(*moments);
    const double values[3] = {read_at(v, 0, 0), read_at(v, 0, 1), read_at(v, 0, 2)};
    set_whitening(o, values);
  }
  return o;
}

Problem read_problem(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                     const OptTensor& temperature, const OptTensor& old_logprobs,
                     const Tensor& advantages, const OptTensor& is_weights,
                     const OptTensor& moments, const OptTensor& ref_logprobs,
                     const Tensor& weights, const OptTensor& entropy_coef,
                     const OptTensor& kl_coef, const std::vector<int64_t>& codes,
                     const std::vector<double>& params) {
  const char* op = "logits_ppo_loss";
  check_options(codes, 4, params, 10, op);
  PPO_CHECK(codes[1] != int64_t(Variant::gspo), op, "gspo needs whole sequences");
  check_like(tokens, old_logprobs, op, "old_logprobs");
  check_like(tokens, advantages, op, "advantages");
  check_like(tokens, is_weights, op, "is_weights");
  check_like(tokens, ref_logprobs, op, "ref_logprobs");
  const bool one = weights.sizes().size() == 0;
  if (!one) check_like(tokens, weights, op, "weights");
  return {LogprobsProblem(logits, tokens, mask, temperature, {codes[0]}, {params[0]}, op),
          read_policy(codes, params, moments, entropy_coef, kl_coef, ref_logprobs),
          {RowValues(old_logprobs), RowValues(advantages), RowValues(is_weights),
           RowValues(ref_logprobs), RowValues(weights), one}};
}

std::tuple<Tensor, Tensor> run(const Problem& p, const Tensor& tokens, char* to,
                               const RowIndex& to_rows) {
  return p.rows.dtype == DType::f64 ? all_rows<double>(p, tokens, ScalarType::Double, to, to_rows)
                                    : all_rows<float>(p, tokens, ScalarType::Float, to, to_rows);
}

#define PPO_ARGS                                                                               \
  Tensor logits, Tensor tokens, OptTensor mask, OptTensor temperature, OptTensor old_logprobs, \
      Tensor advantages, OptTensor is_weights, OptTensor moments, OptTensor ref_logprobs,      \
      Tensor weights, OptTensor entropy_coef, OptTensor kl_coef, std::vector<int64_t> codes,   \
      std::vector<double> params
#define PPO_PROBLEM                                                                              \
  read_problem(logits, tokens, mask, temperature, old_logprobs, advantages, is_weights, moments, \
               ref_logprobs, weights, entropy_coef, kl_coef, codes, params)

std::tuple<Tensor, Tensor, Tensor> logits_ppo_loss(PPO_ARGS) {
  const Problem p = PPO_PROBLEM;
  Tensor grad = empty(logits.sizes(), logits.scalar_type());
  advise_huge_pages(data<char>(grad), size_t(p.rows.rows.rows() * p.rows.vocab * p.rows.item));
  const RowIndex rows(grad.sizes(), grad.strides(), grad.sizes().size() - 1);
  auto [logprobs, entropy] = run(p, tokens, data<char>(grad), rows);
  return {logprobs, entropy, grad};
}

std::tuple<Tensor, Tensor> logits_ppo_loss_inplace(PPO_ARGS) {
  const Problem p = PPO_PROBLEM;
  return run(p, tokens, data<char>(logits), p.rows.rows);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("logits_ppo_loss.cpu", TORCH_BOX(&ppo::logits_ppo_loss));
  m.impl("logits_ppo_loss_.cpu", TORCH_BOX(&ppo::logits_ppo_loss_inplace));
}
