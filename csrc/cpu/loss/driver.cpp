// Sequences, divisors and results of a loss call on the CPU.
#include "driver.h"

namespace ppo {
namespace {

int64_t count_live(const View& mask, const SequenceMap& seqs, int64_t s) {
  const int64_t n = seqs.end(s) - seqs.begin(s);
  if (!mask.data || n == 0) return n;
  const uint8_t* p = at<uint8_t>(mask, s, seqs.column(s, seqs.begin(s)));
  int64_t live = 0;
  if (mask.col_stride != 1) {
    for (int64_t i = 0; i < n; ++i) live += p[i * mask.col_stride] != 0;
    return live;
  }
  // Runs of 128 fit the byte-wide counters that the compiler vectorises.
  for (int64_t i = 0; i < n; i += 128) {
    const int64_t end = std::min(n, i + 128);
    uint8_t run = 0;
    for (int64_t j = i; j < end; ++j) run = uint8_t(run + (p[j] != 0));
    live += run;
  }
  return live;
}

Tensor scalar(double value, ScalarType dtype) {
  Tensor out = empty({}, dtype);
  if (dtype == ScalarType::Double) {
    *data<double>(out) = value;
  } else {
    *data<float>(out) = float(value);
  }
  return out;
}

Tensor stacked(const Tensor& main, int64_t count) {
  std::vector<int64_t> sizes{count};
  for (int64_t n : main.sizes()) sizes.push_back(n);
  return empty({sizes.data(), sizes.size()}, compute_dtype(main));
}

}  // namespace

Gradients::Gradients(const Tensor& main, int64_t count) : all(stacked(main, count)) {}

void* Gradients::at(int64_t i) const {
  const int64_t count = all.sizes()[0], item = is_double(all) ? 8 : 4;
  if (i >= count) return nullptr;
  return data<char>(all) + i * item * (all.numel() / count);
}

LossSequences::LossSequences(const Tensor& main, const OptTensor& mask,
                             const OptTensor& cu_seqlens, const OptTensor& weights,
                             Reduction reduction, const char* op)
    : mask_{} {
  const View shape = view_of(main);
  if (mask) mask_ = view_of(*mask);
  width_ = shape.cols;
  map_ = {nullptr, shape.rows, shape.cols};
  if (cu_seqlens) {
    offsets_ = read_cu_seqlens(*cu_seqlens);
    check_cu_seqlens(offsets_, shape.rows * shape.cols, op);
    map_ = {offsets_.data(), int64_t(offsets_.size()) - 1, 0};
  }
  live_.resize(size_t(map_.count));
  const int64_t tokens = std::max<int64_t>(shape.rows * shape.cols, 1);
  parallel_for(map_.count, std::max<int64_t>(1, 16 * kGrain * map_.count / tokens),
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   live_[size_t(s)] = count_live(mask_, map_, s);
                 }
               });
  const bool means = reduction == Reduction::seq_mean_token_mean;
  const View given = weights ? view_of(*weights) : View{};
  PPO_CHECK(!weights || given.cols == map_.count, op, "shape of sequence_weights");
  if (means || weights) weight_.reserve(live_.size());
  for (size_t s = 0; s < live_.size(); ++s) {
    const int64_t live = live_[s];
    n_tokens_ += live;
    n_seqs_ += live > 0;
    if (!means && !weights) continue;
    const double own = weights ? read_at(given, 0, int64_t(s)) : 1.0;
    // An empty sequence's weight may be NaN.
    weight_.push_back(live == 0 ? 0.0 : means ? own / double(live) : own);
  }
}

double LossSequences::own_denom(Reduction reduction) const {
  switch (reduction) {
    case Reduction::token_mean:
      return n_tokens();
    case Reduction::token_sum:
      return 0.0;
    case Reduction::seq_mean_token_sum_norm:
      return n_seqs() * double(width_);
    default:
      return n_seqs();
  }
}

double LossSequences::inverse_denom(const ReduceOptions& reduce) const {
  double denom = own_denom(reduce.reduction);
  if (reduce.reduction == Reduction::token_sum) denom = 1.0;
  if (reduce.has_denom) denom = reduce.denom;
  return denom <= 0.0 ? 0.0 : 1.0 / denom;  // NaN passes
}

LossCall::LossCall(const char* op, const Tensor& main, const OptTensor& mask,
                   const OptTensor& cu_seqlens, const OptTensor& sequence_weights,
                   ReduceOptions reduce, const OptTensor& denom, int64_t n_grads)
    : op_(op),
      main_(main),
      reduce_{reduce.reduction, scalar_or(denom, reduce.denom),
              reduce.has_denom || denom.has_value()},
      seqs_(main, checked(mask), cu_seqlens, sequence_weights, reduce.reduction, op),
      grads_(main, n_grads) {}

std::tuple<Tensor, Tensor, Tensor, Tensor> LossCall::results(const LossStats& stats,
                                                             double sum) const {
  const double inverse_denom = seqs_.inverse_denom(reduce_);
  const double loss = inverse_denom == 0.0 ? 0.0 : sum * inverse_denom;
  const ScalarType dtype = compute_dtype(main_);
  Tensor out = empty({kNStats}, ScalarType::Double);
  std::copy(stats.begin(), stats.end(), data<double>(out));
  return {scalar(loss, dtype), out, scalar(1.0, dtype), grads_.all};
}

}  // namespace ppo
