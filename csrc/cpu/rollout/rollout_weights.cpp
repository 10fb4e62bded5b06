// ppo_fast::rollout_weights.cpu: importance weights and rejections of tokens that another policy
// sampled, and their statistics. There is no other device's kernel, so the arguments are read
// here.
#include "../../tensor/views.h"
#include "../loss/args.h"

namespace ppo {

// Slots of a sequence that one item of work takes. A longer sequence is cut from its first slot
// on, so that its sums depend on neither the threads nor the other sequences.
constexpr int64_t kSegment = 1 << 14;
// Least number of slots per thread.
constexpr int64_t kLeastSlots = 1 << 13;
// Largest |x| that is exponentiated: MAX_LOG_RATIO of ppo_fast/corrections.py.
constexpr double kMaxLogRatio = 20.0;

// What x, x^2 / 2 and e^x - 1 - x must be within.
struct RolloutWindow {
  double low, high, k2, k3;
};

struct RolloutSegment {
  int64_t sequence, first, last;
  bool whole;  // the sequence has no other segment
};

struct RolloutArgs {
  SequenceMap seqs;
  View old_logprobs, rollout_logprobs, mask;
  RolloutLevel level;
  RolloutForm form;
  double low, high;
  RolloutWindow token;  // exact in the weights' precision, but for k3
  void* weights;
  uint8_t* kept;
};

// Sums over the unmasked slots of a segment, and extremes: of x clamped to +-kMaxLogRatio
// (bounded), of what the clamp took (excess), of functions of the clamped x, of the inputs.
struct RolloutSums {
  double tokens = 0, missing = 0, rejected = 0, below = 0, above = 0;
  double bounded = 0, excess = 0, bounded_sq = 0, k3 = 0, ratio_sq = 0, old = 0, rollout = 0;
  double weight = 0, weight_sq = 0;
  double x_min = std::numeric_limits<double>::infinity(), x_max = -x_min;
  double abs_min = x_min, k3_min = x_min, weight_min = x_min, weight_max = -x_min;
};

}  // namespace ppo

#define PPO_KERNEL "../rollout/rollout_weights_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

using RolloutTotals = std::array<double, RolloutFields::count>;
using RolloutWindows = std::array<RolloutWindow, 5>;

RolloutTotals neutral() {
  RolloutTotals none{};
  none[RolloutFields::weight_min] = std::numeric_limits<double>::infinity();
  none[RolloutFields::weight_max] = -none[RolloutFields::weight_min];
  return none;
}

RolloutTotals added(const std::vector<RolloutTotals>& parts) {
  RolloutTotals sum = neutral();
  for (const RolloutTotals& part : parts) {
    for (size_t k = 0; k < RolloutFields::weight_min; ++k) sum[k] += part[k];
    double &low = sum[RolloutFields::weight_min], &high = sum[RolloutFields::weight_max];
    low = std::min(low, part[RolloutFields::weight_min]);
    high = std::max(high, part[RolloutFields::weight_max]);
  }
  return sum;
}

double clamped(double x) { return std::clamp(x, -kMaxLogRatio, kMaxLogRatio); }

RolloutSums merged(const RolloutSums* parts, size_t n) {
  RolloutSums sum = parts[0];
  for (size_t i = 1; i < n; ++i) {
    const RolloutSums& more = parts[i];
    sum.tokens += more.tokens, sum.missing += more.missing, sum.rejected += more.rejected;
    sum.below += more.below, sum.above += more.above;
    sum.bounded += more.bounded, sum.excess += more.excess, sum.bounded_sq += more.bounded_sq;
    sum.k3 += more.k3, sum.ratio_sq += more.ratio_sq;
    sum.old += more.old, sum.rollout += more.rollout;
    sum.weight += more.weight, sum.weight_sq += more.weight_sq;
    sum.x_min = std::min(sum.x_min, more.x_min), sum.x_max = std::max(sum.x_max, more.x_max);
    sum.abs_min = std::min(sum.abs_min, more.abs_min);
    sum.k3_min = std::min(sum.k3_min, more.k3_min);
    sum.weight_min = std::min(sum.weight_min, more.weight_min);
    sum.weight_max = std::max(sum.weight_max, more.weight_max);
  }
  return sum;
}

bool holds(const RolloutWindow& w, double x, double k2, double k3) {
  return x >= w.low && x <= w.high && k2 <= w.k2 && k3 <= w.k3;
}
double k3_of(double x) { return std::expm1(x) - x; }

// Whether the sequence's sums, means and extremes are within their windows. k2 and k3 are largest
// at an end of the range of x.
bool accepted(const RolloutWindows& windows, const RolloutSums& s) {
  const double n = s.tokens, k2 = 0.5 * s.bounded_sq;
  const double far = std::max(-s.x_min, s.x_max),
               k3_max = std::max(k3_of(s.x_min), k3_of(s.x_max));
  return holds(windows[1], s.bounded, k2, s.k3) &&
         holds(windows[2], s.bounded / n, k2 / n, s.k3 / n) &&
         holds(windows[3], s.x_min, 0.5 * s.abs_min * s.abs_min, s.k3_min) &&
         holds(windows[4], s.x_max, 0.5 * far * far, k3_max);
}

// What becomes of a sequence's slots: one weight for all, unless the level is the token's.
struct Verdict {
  double weight = 0;
  bool accepted = true;
};

struct RolloutCall {
  RolloutArgs args;
  RolloutWindows windows;
  bool fp64, per_sequence;  // whether the call's slots are known to be whole sequences

  // The sequence's weight; its part in the statistics, from its sums, replaces neutral totals.
  Verdict judge(RolloutSums s, RolloutTotals& totals) const {
    using K = RolloutFields;
    if (s.tokens == 0) return {};
    const double n = s.tokens, x = s.bounded + s.excess;
    Verdict v{0, accepted(windows, s)};
    if (args.level != RolloutLevel::token) v.weight = weigh(x, s);
    totals[K::tokens] = n;
    totals[K::missing] = s.missing;
    totals[K::rejected] = v.accepted ? s.rejected : n;
    totals[K::weight] = s.weight, totals[K::weight_sq] = s.weight_sq;
    totals[K::weight_min] = s.weight_min, totals[K::weight_max] = s.weight_max;
    totals[K::below] = s.below, totals[K::above] = s.above;
    totals[K::k1] = -x, totals[K::k3] = s.k3, totals[K::ratio_sq] = s.ratio_sq;
    if (!per_sequence) return v;
    const double ppl = -s.old / n, rollout_ppl = -s.rollout / n;
    totals[K::seqs] = 1;
    totals[K::rejected_seqs] = totals[K::rejected] > 0;
    totals[K::seq_ratio_sq] = std::exp(2.0 * clamped(x));
    totals[K::log_ppl] = ppl, totals[K::rollout_log_ppl] = rollout_ppl;
    totals[K::ppl] = std::exp(ppl), totals[K::rollout_ppl] = std::exp(rollout_ppl);
    totals[K::ppl_ratio] = std::exp(ppl - rollout_ppl);
    return v;
  }

  // One weight for every slot of the sequence, and the sums that follow from it.
  double weigh(double x, RolloutSums& s) const {
    const double n = s.tokens;
    double ratio = 1.0;
    if (args.level != RolloutLevel::none) {
      const double mean = args.level == RolloutLevel::sequence ? x : x / n;
      ratio = fp64 ? scalar::sequence_ratio<double>(mean) : PPO_SELECT(sequence_ratio_f)(mean);
    }
    const bool below = ratio<args.low, above = ratio> args.high;
    double w = std::clamp(ratio, args.low, args.high);
    if (args.form == RolloutForm::mask) w = below || above ? 0.0 : ratio;
    s.below = below ? n : 0.0, s.above = above ? n : 0.0;
    s.weight = n * w, s.weight_sq = n * w * w;
    s.weight_min = s.weight_max = w;
    return w;
  }

  // Writes what only the whole sequence decides.
  void apply(const RolloutSegment& segment, const Verdict& v) const {
    if (args.level != RolloutLevel::token) {
      const auto spread = fp64 ? &scalar::spread_weight<double> : PPO_SELECT(spread_weight_f);
      spread(args, segment, v.weight);
    }
    if (!v.accepted) {
      std::memset(args.kept + segment.first, 0, size_t(segment.last - segment.first));
    }
  }

  // Fills weights and mask; returns the statistics.
  RolloutTotals run(const std::vector<RolloutSegment>& segments) const {
    const int64_t n = int64_t(segments.size()), slots = std::max<int64_t>(args.seqs.tokens(), 1);
    const int64_t grain = std::max<int64_t>(1, kLeastSlots * n / slots);
    const auto read = fp64 ? &scalar::rollout_segment<double> : PPO_SELECT(rollout_segment_f);
    std::vector<RolloutSums> sums(static_cast<size_t>(n));
    std::vector<RolloutTotals> totals(static_cast<size_t>(n), neutral());
    parallel_for(n, grain, [&](int64_t begin, int64_t end) {
      for (size_t i = size_t(begin); i < size_t(end); ++i) {
        read(args, segments[i], sums[i]);
        if (segments[i].whole) apply(segments[i], judge(sums[i], totals[i]));
      }
    });
    std::vector<Verdict> verdicts(static_cast<size_t>(n));
    bool any = false;
    for (size_t i = 0, end = 0; i < size_t(n); i = end) {
      for (end = i + 1; end < size_t(n) && segments[end].sequence == segments[i].sequence;) ++end;
      if (segments[i].whole) continue;
      any = true;
      const Verdict v = judge(merged(&sums[i], end - i), totals[i]);
      std::fill(&verdicts[i], &verdicts[0] + end, v);
    }
    if (any) {
      parallel_for(n, grain, [&](int64_t begin, int64_t end) {
        for (size_t i = size_t(begin); i < size_t(end); ++i) {
          if (!segments[i].whole) apply(segments[i], verdicts[i]);
        }
      });
    }
    return added(totals);
  }
};

// Segments of every sequence that has a slot, in order.
std::vector<RolloutSegment> segments_of(const SequenceMap& seqs) {
  std::vector<RolloutSegment> out;
  for (int64_t s = 0; s < seqs.count; ++s) {
    const int64_t begin = seqs.begin(s), end = seqs.end(s);
    for (int64_t first = begin; first < end; first += kSegment) {
      out.push_back({s, first, std::min(end, first + kSegment), end - begin <= kSegment});
    }
  }
  return out;
}

// Largest float that is not above x.
double float_below(double x) {
  const float f = float(x);
  return double(f) > x ? std::nextafter(f, -INFINITY) : f;
}

// The token's window: k2's bound is one of |x|, and bounds of x are exact for x of this precision.
RolloutWindow token_window(RolloutWindow w, bool fp64) {
  const double reach = std::sqrt(2.0 * w.k2);
  w.low = std::max(w.low, -reach), w.high = std::min(w.high, reach);
  if (!fp64) w.low = -float_below(-w.low), w.high = float_below(w.high);
  return w;
}

View like(const Tensor& main, const OptTensor& x, const char* name) {
  check_like(main, x, "rollout_weights", name);
  return x ? view_of(*x) : View{};
}

std::tuple<Tensor, Tensor, Tensor> rollout_weights(Tensor old_logprobs, Tensor rollout_logprobs,
                                                   OptTensor mask, OptTensor cu_seqlens,
                                                   int64_t level, int64_t form, double low,
                                                   double high, std::vector<double> windows) {
  constexpr const char* op = "rollout_weights";
  RolloutCall call{};
  PPO_CHECK(windows.size() == 4 * call.windows.size(), op, "windows must have 20 numbers");
  for (size_t i = 0; i < call.windows.size(); ++i) {
    call.windows[i] = {windows[4 * i], windows[4 * i + 1], windows[4 * i + 2], windows[4 * i + 3]};
  }
  call.fp64 = is_double(old_logprobs);
  call.per_sequence = old_logprobs.sizes().size() == 2 || cu_seqlens;
  RolloutArgs& a = call.args;
  a.old_logprobs = view_of(old_logprobs);
  a.rollout_logprobs = like(old_logprobs, rollout_logprobs, "rollout_logprobs");
  a.mask = like(old_logprobs, mask, "mask");
  PPO_CHECK(!mask || a.mask.dtype == DType::byte, op, "mask must be a 1-byte type");
  a.seqs = {nullptr, a.old_logprobs.rows, a.old_logprobs.cols};
  std::vector<int64_t> offsets;
  if (cu_seqlens) {
    offsets = read_cu_seqlens(*cu_seqlens);
    check_cu_seqlens(offsets, old_logprobs.numel(), op);
    a.seqs = {offsets.data(), int64_t(offsets.size()) - 1, 0};
  }
  a.level = RolloutLevel(level), a.form = RolloutForm(form);
  a.low = call.fp64 ? low : float(low), a.high = call.fp64 ? high : float(high);
  a.token = token_window(call.windows[0], call.fp64);
  Tensor weights = empty(old_logprobs.sizes(), compute_dtype(old_logprobs));
  Tensor kept = empty(old_logprobs.sizes(), ScalarType::Bool);
  Tensor stats = empty({RolloutFields::count}, ScalarType::Double);
  a.weights = weights.mutable_data_ptr(), a.kept = data<uint8_t>(kept);
  const RolloutTotals totals = call.run(segments_of(a.seqs));
  std::copy(totals.begin(), totals.end(), data<double>(stats));
  return {weights, kept, stats};
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("rollout_weights.cpu", TORCH_BOX(&ppo::rollout_weights));
}
