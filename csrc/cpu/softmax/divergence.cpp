// ppo_fast::divergence_fwd.cpu, divergence_bwd.cpu and divergence_bwd_.cpu: divergence of a
// student's rows of logits from a teacher's, and the gradient by the student's. There is no CUDA
// C++ kernel, so the arguments are read here. The symbols are those of divergence_simd.h.
#include <memory>

#include "../../codes.h"
#include "softmax.h"

namespace ppo {
namespace {

// 1 / temperature of a row and the state of its softmax, ln p = z / temperature - row_max -
// log_sum.
struct SideState {
  double inv_temperature, row_max, log_sum;

  double of(double logit) const { return logit * inv_temperature - row_max - log_sum; }
};
struct TwoSides {
  SideState student, teacher;
  double beta;
};

// A segment's sums of p ln(p / q) and q ln(q / p), for jsd of p ln(p / m) and q ln(q / m).
struct DivergenceSums {
  double kl, other;
};

// Gradient of a row: d loss / d logit_j = p_j (slope ln p_j + offset + by_kl L_j) - by_q q_j, but
// for the label where it gets `label_term`; L_j is ln(p_j / q_j), or ln(p_j / m_j) for jsd.
struct DivergenceGradient {
  RowGradient row;
  TwoSides sides;
  double by_kl, by_q;
};

}  // namespace
}  // namespace ppo

#define PPO_KERNEL "../softmax/divergence_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

auto sums_of(Divergence kind) {
  switch (kind) {
    case Divergence::reverse:
      return PPO_SELECT(divergence_sums<Divergence::reverse>);
    case Divergence::forward:
      return PPO_SELECT(divergence_sums<Divergence::forward>);
    case Divergence::jsd:
      return PPO_SELECT(divergence_sums<Divergence::jsd>);
    default:
      return PPO_SELECT(divergence_sums<Divergence::mixed>);
  }
}

auto gradient_of(Divergence kind) {
  switch (kind) {
    case Divergence::reverse:
      return PPO_SELECT(divergence_gradient<Divergence::reverse>);
    case Divergence::forward:
      return PPO_SELECT(divergence_gradient<Divergence::forward>);
    case Divergence::jsd:
      return PPO_SELECT(divergence_gradient<Divergence::jsd>);
    default:
      return PPO_SELECT(divergence_gradient<Divergence::mixed>);
  }
}

// Arguments of both ops but for the gradients.
struct DivergenceArgs {
  const Tensor &logits, &teacher_logits;
  const OptTensor &mask, &temperature, &teacher_temperature;
  const Tensor &row_max, &log_sum, &teacher_max, &teacher_log_sum;
  double number, teacher_number;  // temperatures
  int64_t kind;
  double beta;
};

// Check: logits are (..., V) with contiguous rows, of which there may be no column.
const Tensor& checked(const char* op, const Tensor& logits, const char* name) {
  const auto sizes = logits.sizes(), strides = logits.strides();
  PPO_CHECK(logits.is_cpu() && sizes.size() > 0, op, name);
  const size_t last = sizes.size() - 1;
  PPO_CHECK(sizes[last] <= 1 || strides[last] == 1, op, name);
  return logits;
}

// Check: x has a value for every row of the logits.
void check_rows(const char* op, const Tensor& logits, const Tensor& x, const char* name) {
  const auto sizes = logits.sizes(), lead = x.sizes();
  bool same = x.is_cpu() && lead.size() + 1 == sizes.size();
  for (size_t i = 0; same && i < lead.size(); ++i) same = lead[i] == sizes[i];
  PPO_CHECK(same, op, name);
}

// Rows of logits with the states of their softmax.
struct Side {
  RowsOfLogits rows;
  RowValues row_max, log_sum;

  SideState at(int64_t row) const {
    return {rows.inv_temperature(row), row_max.number(row), log_sum.number(row)};
  }
};

struct DivergenceRows {
  Side student, teacher;
  RowValues mask;
  Divergence kind;
  double beta;

  DivergenceRows(const char* op, const DivergenceArgs& a)
      : student{{checked(op, a.logits, "logits must be (..., V), rows contiguous"), a.temperature,
                 a.number},
                RowValues(a.row_max),
                RowValues(a.log_sum)},
        teacher{{checked(op, a.teacher_logits, "teacher_logits must be (..., V), rows contiguous"),
                 a.teacher_temperature, a.teacher_number},
                RowValues(a.teacher_max),
                RowValues(a.teacher_log_sum)},
        mask(a.mask),
        kind(Divergence(a.kind)),
        beta(a.beta) {
    PPO_CHECK(same_sizes(a.logits, a.teacher_logits) && student.rows.dtype == teacher.rows.dtype,
              op, "teacher_logits must have the logits' shape and dtype");
    check_rows(op, a.logits, a.row_max, "shape of row_max");
    check_like(a.row_max, a.log_sum, op, "log_sum");
    check_like(a.row_max, a.teacher_max, op, "teacher_max");
    check_like(a.row_max, a.teacher_log_sum, op, "teacher_log_sum");
    check_like(a.row_max, a.mask, op, "mask");
    check_like(a.row_max, a.temperature, op, "temperature_tensor");
    check_like(a.row_max, a.teacher_temperature, op, "teacher_temperature_tensor");
    PPO_CHECK(!a.mask || dtype_of(*a.mask) == DType::byte, op, "mask must be a 1-byte type");
    PPO_CHECK(a.kind >= 0 && a.kind <= int64_t(Divergence::mixed), op, "unknown kind");
  }

  const RowsOfLogits& rows() const { return student.rows; }
  bool live(int64_t row) const { return !mask || mask.is_set(row); }
  TwoSides at(int64_t row) const { return {student.at(row), teacher.at(row), beta}; }

  // The row's sums, from those of its segments in order.
  DivergenceSums total(const DivergenceSums* parts) const {
    DivergenceSums all{0, 0};
    for (int64_t i = 0; i < rows().segments; ++i) {
      all.kl += parts[i].kl;
      all.other += parts[i].other;
    }
    return all;
  }
  double divergence(const DivergenceSums& x) const {
    switch (kind) {
      case Divergence::reverse:
        return x.kl;
      case Divergence::forward:
        return x.other;
      case Divergence::jsd:
        return beta * x.other + (1.0 - beta) * x.kl;
      default:
        return beta * x.kl + (1.0 - beta) * x.other;
    }
  }
};

template <class S>
std::tuple<Tensor, Tensor> forward(const DivergenceRows& p, const Tensor& like, ScalarType dtype) {
  auto result = std::make_tuple(empty(like.sizes(), dtype), empty(like.sizes(), dtype));
  S* const divergence = data<S>(std::get<0>(result));
  S* const kl = data<S>(std::get<1>(result));
  const int64_t rows = p.rows().rows.rows(), segments = p.rows().segments;
  std::unique_ptr<DivergenceSums[]> parts(new DivergenceSums[size_t(rows * segments)]);
  const auto kernel = sums_of(p.kind);
  p.rows().for_segments([&](int64_t task, int64_t row, int64_t first, int64_t n) {
    if (!p.live(row)) return;
    const int64_t at = first * p.rows().item;
    parts[size_t(task)] =
        kernel(p.rows().dtype, p.rows().row(row) + at, p.teacher.rows.row(row) + at, n, p.at(row));
  });
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool live = p.live(row);
      const DivergenceSums all = live ? p.total(&parts[size_t(row * segments)]) : DivergenceSums{};
      divergence[row] = live ? S(p.divergence(all)) : S(0);
      kl[row] = S(all.kl);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> divergence_fwd(Tensor logits, Tensor teacher_logits, OptTensor mask,
                                          OptTensor temperature_tensor,
                                          OptTensor teacher_temperature_tensor, Tensor row_max,
                                          Tensor log_sum, Tensor teacher_max,
                                          Tensor teacher_log_sum, double temperature,
                                          double teacher_temperature, int64_t kind, double beta) {
  const DivergenceRows rows(
      "divergence_fwd",
      {logits, teacher_logits, mask, temperature_tensor, teacher_temperature_tensor, row_max,
       log_sum, teacher_max, teacher_log_sum, temperature, teacher_temperature, kind, beta});
  return is_double(logits) ? forward<double>(rows, row_max, ScalarType::Double)
                           : forward<float>(rows, row_max, ScalarType::Float);
}

// Per-row tensors of the gradient; absent incoming gradients are 0.
struct UpstreamRows {
  RowValues grad_logprobs, grad_entropy, grad_divergence, tokens, entropy, kl;
};

// The divergence's part of the row's gradient, c its incoming gradient.
void add_divergence(DivergenceGradient& out, Divergence kind, double c, double kl) {
  const double beta = out.sides.beta;
  c *= out.sides.student.inv_temperature;
  switch (kind) {
    case Divergence::reverse:
      out.by_kl = c;
      break;
    case Divergence::forward:
      out.by_q = c;
      break;
    case Divergence::jsd:
      out.by_kl = (1.0 - beta) * c;
      break;
    default:
      out.by_kl = beta * c;
      out.by_q = (1.0 - beta) * c;
  }
  out.row.offset += out.by_q - (kind == Divergence::forward ? 0.0 : out.by_kl * kl);
}

// ln(p / m), from P and Q.
double to_mixture(double P, double Q, double beta) {
  if (Q > P) return P - Q - std::log(beta + (1.0 - beta) * std::exp(P - Q));
  return -std::log1p(beta * std::expm1(Q - P));
}

// The label's part of d loss / d z, but for temperature and h: g (1 - p) + c d of its column.
double label_term(const DivergenceRows& p, const DivergenceGradient& x, double teacher_logit,
                  double ln_p, double g, double kl) {
  const double P = ln_p, Q = x.sides.teacher.of(teacher_logit), prob = std::exp(P);
  double term = -g * std::expm1(P) * x.row.inv_temperature;
  if (x.by_kl != 0 && prob != 0) {
    const double ratio = p.kind == Divergence::jsd ? to_mixture(P, Q, p.beta) : P - Q;
    term += x.by_kl * prob * (ratio - kl);
  }
  return x.by_q == 0 ? term : term + x.by_q * (prob - std::exp(Q));
}
// Gradient of a row. With the incoming gradients g, h and c and the token y: d loss / d z_j =
// g (1[j = y] - p_j) - h p_j (ln p_j + H) + c d_j, d_j the divergence's.
DivergenceGradient gradient_at(const DivergenceRows& p, const UpstreamRows& up, int64_t row) {
  DivergenceGradient out{};
  double g = up.grad_logprobs ? up.grad_logprobs.number(row) : 0.0;
  const double h = up.grad_entropy ? up.grad_entropy.number(row) : 0.0;
  const double c = up.grad_divergence.number(row);
  if (g == 0 && h == 0 && c == 0) return out;
  const RowsOfLogits& rows = p.rows();
  const double H = up.entropy.number(row), kl = up.kl.number(row);
  out.sides = p.at(row);
  const SideState &student = out.sides.student, &teacher = out.sides.teacher;
  const double inv = student.inv_temperature, taught = teacher.row_max + teacher.log_sum + kl;
  out.row = {RowGradient::nan,
             up.tokens.integer(row),
             inv,
             student.row_max,
             student.log_sum,
             0.0,
             0.0,
             0.0};
  if (H != H || (c != 0 && taught != taught)) return out;
  const bool has_label = g != 0 && out.row.label >= 0 && out.row.label < rows.vocab;
  const double logit = has_label ? number_at(rows.dtype, rows.row(row), out.row.label) : 0.0;
  // As in row_gradient: a token at -inf passes no gradient of its log-probability.
  const bool impossible = has_label && logit == -std::numeric_limits<double>::infinity();
  if (impossible) g = 0;
  if (g == 0 && h == 0 && c == 0) return {};
  out.row.slope = -h * inv;
  out.row.offset = -(g + h * H) * inv;
  if (c != 0) add_divergence(out, p.kind, c, kl);
  if (out.row.offset + out.row.slope != out.row.offset + out.row.slope) return out;
  out.row.kind = RowGradient::live;
  if (!has_label || impossible) {
    out.row.label = -1;
    return out;
  }
  const double P = student.of(logit);
  const double y = number_at(rows.dtype, p.teacher.rows.row(row), out.row.label);
  out.row.label_term = label_term(p, out, y, P, g, kl) - h * std::exp(P) * (P + H) * inv;
  return out;
}

// Writes row i at out + out_rows.offset(i); `out` may be the student's logits themselves.
void backward(const DivergenceRows& p, const UpstreamRows& up, const Tensor& out) {
  const RowIndex out_rows(out.sizes(), out.strides(), out.sizes().size() - 1);
  char* const to = data<char>(out);
  const int64_t rows = p.rows().rows.rows(), item = p.rows().item;
  std::unique_ptr<DivergenceGradient[]> gradients(new DivergenceGradient[size_t(rows)]);
  // All row gradients come first, before any logit is overwritten: a row's segments may run on
  // several threads.
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gradients[size_t(row)] = p.live(row) ? gradient_at(p, up, row) : DivergenceGradient{};
    }
  });
  const auto kernel = gradient_of(p.kind);
  const auto alone = PPO_SELECT(softmax_gradient);
  p.rows().for_segments([&](int64_t, int64_t row, int64_t first, int64_t n) {
    const DivergenceGradient& gradient = gradients[size_t(row)];
    const char* const teacher = p.teacher.rows.row(row) + first * item;
    // Without a gradient of the divergence the teacher is not read: nothing times 0 is infinite.
    const auto write = [&](DType dtype, const char* from, char* at, int64_t count,
                           const RowGradient& own) {
      if (gradient.by_kl == 0 && gradient.by_q == 0) return alone(dtype, from, at, count, own);
      kernel(dtype, from, teacher, at, count, gradient);
    };
    write_gradient(write, gradient.row, p.rows().dtype, p.rows().row(row) + first * item, first, n,
                   to + (out_rows.offset(row) + first) * item, p.rows().dtype);
  });
}

// Arguments of divergence_bwd and divergence_bwd_; the gradient into `out`, which is like the
// logits or is they themselves.
struct Gradients {
  const OptTensor &grad_logprobs, &grad_entropy;
  const Tensor &grad_divergence, &tokens, &entropy, &kl;
};
void write_gradients(const char* op, const Tensor& out, const DivergenceArgs& args,
                     const Gradients& x) {
  const DivergenceRows rows(op, args);
  const Tensor& main = args.row_max;
  check_like(main, x.tokens, op, "tokens");
  const DType index = dtype_of(x.tokens);
  PPO_CHECK(index == DType::i64 || index == DType::i32, op, "tokens must be int32 or int64");
  backward(rows,
           {row_values(op, main, x.grad_logprobs, "grad_logprobs"),
            row_values(op, main, x.grad_entropy, "grad_entropy"),
            row_values(op, main, x.grad_divergence, "grad_divergence"), RowValues(x.tokens),
            row_values(op, main, x.entropy, "entropy"), row_values(op, main, x.kl, "kl")},
           out);
}

Tensor divergence_bwd(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor grad_divergence,
                      Tensor logits, Tensor teacher_logits, Tensor tokens, OptTensor mask,
                      OptTensor temperature_tensor, OptTensor teacher_temperature_tensor,
                      Tensor entropy, Tensor row_max, Tensor log_sum, Tensor teacher_max,
                      Tensor teacher_log_sum, Tensor kl, double temperature,
                      double teacher_temperature, int64_t kind, double beta) {
  Tensor out = empty(logits.sizes(), logits.scalar_type());
  advise_huge_pages(data<char>(out), size_t(out.numel()) * out.element_size());
  write_gradients(
      "divergence_bwd", out,
      {logits, teacher_logits, mask, temperature_tensor, teacher_temperature_tensor, row_max,
       log_sum, teacher_max, teacher_log_sum, temperature, teacher_temperature, kind, beta},
      {grad_logprobs, grad_entropy, grad_divergence, tokens, entropy, kl});
  return out;
}

void divergence_bwd_inplace(OptTensor grad_logprobs, OptTensor grad_entropy,
                            Tensor grad_divergence, Tensor logits, Tensor teacher_logits,
                            Tensor tokens, OptTensor mask, OptTensor temperature_tensor,
                            OptTensor teacher_temperature_tensor, Tensor entropy, Tensor row_max,
                            Tensor log_sum, Tensor teacher_max, Tensor teacher_log_sum, Tensor kl,
                            double temperature, double teacher_temperature, int64_t kind,
                            double beta) {
  write_gradients(
      "divergence_bwd_", logits,
      {logits, teacher_logits, mask, temperature_tensor, teacher_temperature_tensor, row_max,
       log_sum, teacher_max, teacher_log_sum, temperature, teacher_temperature, kind, beta},
      {grad_logprobs, grad_entropy, grad_divergence, tokens, entropy, kl});
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("divergence_fwd.cpu", TORCH_BOX(&ppo::divergence_fwd));
  m.impl("divergence_bwd.cpu", TORCH_BOX(&ppo::divergence_bwd));
  m.impl("divergence_bwd_.cpu", TORCH_BOX(&ppo::divergence_bwd_inplace));
}
