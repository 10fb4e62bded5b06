// What the kernels that walk along sequences share: the order of loads, the moments.
#pragma once

#include "steps.cuh"

namespace ppo::cuda {

// Kernels say how many blocks of them a multiprocessor shall hold at least, 1 too: else ptxas
// stops at an occupancy of its own choosing and spills a few registers.
constexpr int kRowThreads = kTiles * kWarp;

// One lane's units, last first and `stride` steps apart. A unit's inputs are asked for while the
// one before it is computed, and its mask one unit earlier still, as masked steps are not read.
template <class Source>
class Units {
 public:
  // From the unit at t down to the one at or after `begin`.
  PPO_DEVICE Units(const Source& source, const typename Source::Row& row, const Sequence& span,
                   int64_t t, int64_t begin, int stride)
      : source_(source), row_(row), span_(span), begin_(begin), stride_(stride) {
    flags_ = flags(t);
    raw_ = source_.load(row_, span_, t, flags_);
    ahead_ = flags(t - stride);
  }

  PPO_DEVICE UnitOf<Source::two> take(int64_t t) {
    const UnitOf<Source::two> unit = source_.decode(row_, span_, t, flags_, raw_);
    flags_ = ahead_;
    if (t - stride_ >= begin_) raw_ = source_.load(row_, span_, t - stride_, flags_);
    ahead_ = flags(t - 2 * stride_);
    return unit;
  }

 private:
  PPO_DEVICE uint32_t flags(int64_t t) const {
    return load_flags(source_.args.base.mask, span_, t, t >= begin_ ? span_.exist(t) : 0);
  }

  const Source& source_;
  const typename Source::Row& row_;
  const Sequence& span_;
  int64_t begin_;
  int stride_;
  uint32_t flags_, ahead_;
  typename Source::Raw raw_;
};

// The last live step of this thread's unit at t, or -1.
PPO_DEVICE int64_t last_live_of_unit(const Steps& mask, const Sequence& span, int64_t t) {
  const unsigned bits = flag_bits(load_flags(mask, span, t, span.exist(t)));
  return bits ? t + 31 - __clz(int(bits)) : -1;
}

template <bool kTwo>
PPO_DEVICE Suffixes<kTwo> recur(const AdvantageArgs& args, const UnitOf<kTwo>& unit, float next) {
  return recur(unit, next, args.gamma, args.decay);
}

// Whether this thread's share of the offsets rises from 0 to the number of slots.
PPO_DEVICE bool offsets_rise(const Sequences& s) {
  if (!s.offsets) return true;
  bool good = true;
  const int64_t all = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < s.count; i += all) {
    const int64_t first = given_offset(s, i), end = given_offset(s, i + 1);
    good &= first <= end && (i > 0 || first == 0) && (i + 1 < s.count || end == s.length);
  }
  return good;
}

// The moments of a block, from those of its threads. Offsets that no sequences can have make them
// NaN; the last block then makes every output NaN, written or not.
PPO_DEVICE void leave(const AdvantageArgs& args, const MomentSum& mine, Moments* scratch) {
  constexpr double kNan = __builtin_nan("");
  const bool bad = __syncthreads_or(!offsets_rise(args.seqs));
  Moments all = block_moments(mine.result(), scratch);
  if (bad) all = {kNan, kNan, kNan};
  const bool last =
      leave_moments(all, blockIdx.x, gridDim.x, args.parts, args.moments, args.counter, scratch);
  if (!last || !args.seqs.offsets) return;
  __syncthreads();
  if (args.moments[0] == args.moments[0]) return;
  const auto poison = [&](const Output& out) {
    for (int64_t i = threadIdx.x; out.data && i < args.seqs.length; i += blockDim.x) {
      out.data[i * out.step] = float(kNan);
    }
  };
  poison(args.advantages);
  poison(args.returns);
  poison(args.rewards);
  poison(args.kl);
}

}  // namespace ppo::cuda
