// ppo_fast::token_stats.cpu: softmax numbers of a label per row of logits, as logprobs_fwd has
// them, with the row's squared probabilities, mean and largest column. There is no CUDA C++
// kernel, so the arguments are read here.
#include <memory>

#include "softmax.h"

namespace ppo {
namespace {

// A segment's sum of e^2(z - max), its part of the row's mean, and its largest logit, before the
// temperature, with the first column that holds it.
struct SegmentStats {
  double squares, mean, peak;
  int64_t top;
};

}  // namespace
}  // namespace ppo

#define PPO_KERNEL "../softmax/token_stats_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A row's own, beside its softmax.
struct RowStats {
  double log_sum_sq, mean;
  int64_t top;
};

RowStats merge_stats(const SoftmaxState* states, const SegmentStats* parts, int64_t n) {
  const SoftmaxState whole = merge(states, n);
  double squares = 0, mean = 0;
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double scale = std::exp(states[i].max - whole.max);
    squares += parts[i].squares * scale * scale;
    mean += parts[i].mean;
    if (parts[i].peak > parts[best].peak) best = i;
  }
  return {whole.sum > 0 ? std::log(squares) : kNaN, mean, best * kSegment + parts[best].top};
}

template <class S>
Results stats_of(const LogitsRows& p, const Tensor& tokens, ScalarType dtype) {
  const auto number = [&] { return empty(tokens.sizes(), dtype); };
  Results result{number(),
                 number(),
                 number(),
                 number(),
                 number(),
                 number(),
                 empty(tokens.sizes(), ScalarType::Long)};
  const Outputs<S> softmax{data<S>(std::get<0>(result)), data<S>(std::get<1>(result)),
                           data<S>(std::get<2>(result)), data<S>(std::get<3>(result))};
  S* const log_sum_sq = data<S>(std::get<4>(result));
  S* const mean = data<S>(std::get<5>(result));
  int64_t* const top = data<int64_t>(std::get<6>(result));
  const int64_t rows = p.rows.rows(), tasks = rows * p.segments;
  std::unique_ptr<SoftmaxState[]> states(new SoftmaxState[size_t(tasks)]);
  std::unique_ptr<SegmentStats[]> parts(new SegmentStats[size_t(tasks)]);
  const auto kernel = PPO_SELECT(token_stats);
  p.for_segments([&](int64_t task, int64_t row, int64_t first, int64_t n) {
    if (!p.live(row)) return;
    const double inv = p.inv_temperature(row);
    states[size_t(task)] = kernel(p.dtype, p.row(row) + first * p.item, n, inv,
                                  inv / double(p.vocab), parts[size_t(task)]);
  });
  parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const size_t first = size_t(row * p.segments);
      const bool live = p.live(row);
      if (live) {
        finish_row(p.at(row), &states[first], row, softmax);
      } else {
        softmax.set(row, 0, 0, 0, 0);
      }
      const RowStats own =
          live ? merge_stats(&states[first], &parts[first], p.segments) : RowStats{};
      log_sum_sq[row] = S(own.log_sum_sq);
      mean[row] = S(own.mean);
      top[row] = own.top;
    }
  });
  return result;
}

Results token_stats(Tensor logits, Tensor tokens, OptTensor mask, OptTensor temperature_tensor,
                    double temperature, int64_t ignore_index) {
  const LogitsRows rows("token_stats", logits, tokens, mask, temperature_tensor, ignore_index,
                        temperature);
  const bool wide = is_double(logits);
  PPO_CHECK(wide || rows.dtype == DType::f32, "token_stats", "logits must be fp32 or fp64");
  return wide ? stats_of<double>(rows, tokens, ScalarType::Double)
              : stats_of<float>(rows, tokens, ScalarType::Float);
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("token_stats.cpu", TORCH_BOX(&ppo::token_stats));
}
