// ppo_fast::support_fwd.cpu and support_bwd.cpu: log-probability and entropy of each row's first
// pair among the row's pairs, and the gradient by the pairs' logits. A row's pairs are a row of
// logits with its label in column 0, of a length of its own. There is no CUDA C++ kernel, so the
// arguments are read here.
#include "../../tensor/pairs.h"
#include "softmax.h"

#define PPO_KERNEL "../softmax/logprobs_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

struct SupportRows {
  const char* logits;
  DType dtype;
  int64_t item;
  PairRows pairs;
  RowValues temperature;
  double number_temperature;

  SupportRows(const char* op, const Tensor& logits, const Tensor& offsets, const Tensor& mask,
              const OptTensor& temperature, double number_temperature)
      : logits(static_cast<const char*>(logits.const_data_ptr())),
        dtype(dtype_of(logits)),
        item(int64_t(logits.element_size())),
        pairs(op, offsets, mask, logits.numel()),
        temperature(row_values(op, mask, temperature, "temperature")),
        number_temperature(number_temperature) {
    const View v = view_of(logits);
    PPO_CHECK(logits.sizes().size() == 1 && (v.cols <= 1 || v.col_stride == 1), op,
              "logits must be contiguous (M,)");
  }

  LogitsRow at(int64_t row) const {
    const double t = temperature ? temperature.number(row) : number_temperature;
    return {logits + pairs.first(row) * item, dtype, pairs.count(row), 0, inverse(dtype, t)};
  }
};

// Calls f(segment, first, n) for a row's segments, one at least.
template <class Fn>
void for_segments(const LogitsRow& r, const Fn& f) {
  for (int64_t i = 0; i < r.segments(); ++i) {
    const int64_t first = i * kSegment, left = r.vocab - first;
    f(i, first, left < kSegment ? left : kSegment);
  }
}

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const SupportRows& p, ScalarType dtype) {
  const std::array<int64_t, 1> rows = {p.pairs.rows()};
  const Sizes sizes(rows.data(), 1);
  auto result = std::make_tuple(empty(sizes, dtype), empty(sizes, dtype), empty(sizes, dtype),
                                empty(sizes, dtype));
  const Outputs<S> out{data<S>(std::get<0>(result)), data<S>(std::get<1>(result)),
                       data<S>(std::get<2>(result)), data<S>(std::get<3>(result))};
  const auto kernel = PPO_SELECT(softmax_state);
  p.pairs.for_ranges(kLogitGrain, [&](int64_t begin, int64_t end) {
    std::vector<SoftmaxState> states;
    for (int64_t row = begin; row < end; ++row) {
      if (!p.pairs.live(row)) {
        out.set(row, 0, 0, 0, 0);
        continue;
      }
      const LogitsRow r = p.at(row);
      states.resize(size_t(r.segments()));
      for_segments(r, [&](int64_t i, int64_t first, int64_t n) {
        states[size_t(i)] = kernel(r.dtype, r.logits + first * p.item, n, r.inv_temperature);
      });
      finish_row(r, states.data(), row, out);
    }
  });
  return result;
}

void backward(const SupportRows& p, const Upstream& up, const Tensor& out) {
  const DType wide = dtype_of(out);
  char* const to = data<char>(out);
  const int64_t item = int64_t(out.element_size());
  const auto kernel = PPO_SELECT(softmax_gradient_wide);
  p.pairs.for_ranges(kLogitGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const LogitsRow r = p.at(row);
      const RowGradient gradient = p.pairs.live(row) ? row_gradient(r, up.at(row)) : RowGradient{};
      for_segments(r, [&](int64_t, int64_t first, int64_t n) {
        write_gradient(kernel, gradient, r.dtype, r.logits + first * p.item, first, n,
                       to + (p.pairs.first(row) + first) * item, wide);
      });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> support_fwd(Tensor logits, Tensor offsets, Tensor mask,
                                                       OptTensor temperature_tensor,
                                                       double temperature) {
  const SupportRows rows("support_fwd", logits, offsets, mask, temperature_tensor, temperature);
  return is_double(logits) ? forward<double>(rows, ScalarType::Double)
                           : forward<float>(rows, ScalarType::Float);
}

Tensor support_bwd(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits, Tensor offsets,
                   Tensor mask, OptTensor temperature_tensor, Tensor entropy, Tensor row_max,
                   Tensor log_sum, double temperature) {
  constexpr const char* op = "support_bwd";
  const SupportRows rows(op, logits, offsets, mask, temperature_tensor, temperature);
  const Upstream up{
      row_values(op, mask, grad_logprobs, "grad_logprobs"),
      row_values(op, mask, grad_entropy, "grad_entropy"), row_values(op, mask, entropy, "entropy"),
      row_values(op, mask, row_max, "row_max"), row_values(op, mask, log_sum, "log_sum")};
  Tensor out = empty(logits.sizes(), compute_dtype(logits));
  backward(rows, up, out);
  return out;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("support_fwd.cpu", TORCH_BOX(&ppo::support_fwd));
  m.impl("support_bwd.cpu", TORCH_BOX(&ppo::support_bwd));
}
