// Walks along sequences: prefetched groups, moments, and the kernel for short sequences (`lanes`
// lanes of a warp hold one, or a warp walks along it).
#pragma once

#include "steps.cuh"

namespace ppo::cuda {

// Kernels always state the least number of resident blocks per multiprocessor, even 1: otherwise
// ptxas chooses an occupancy and spills a few registers.
constexpr int kRowThreads = kTiles * kWarp;

// Prefetched groups of one lane, last first and `stride` steps apart. A group's inputs are loaded
// while the previous group is computed, and its mask one group earlier still, because masked steps
// are not read.
template <class Source>
class StepGroups {
 public:
  // Starts at the group at t; the last group is at or after `begin`.
  PPO_DEVICE StepGroups(const Source& source, const typename Source::Row& row,
                        const Sequence& span, int64_t t, int64_t begin, int stride)
      : source_(source), row_(row), span_(span), begin_(begin), stride_(stride) {
    flags_ = flags(t);
    raw_ = source_.load(row_, span_, t, flags_);
    ahead_ = flags(t - stride);
  }

  PPO_DEVICE StepGroupOf<Source::extras> take(int64_t t) {
    const StepGroupOf<Source::extras> group = source_.decode(row_, span_, t, flags_, raw_);
    flags_ = ahead_;
    if (t - stride_ >= begin_) raw_ = source_.load(row_, span_, t - stride_, flags_);
    ahead_ = flags(t - 2 * stride_);
    return group;
  }

 private:
  PPO_DEVICE uint32_t flags(int64_t t) const {
    return load_flags<Source::dense>(source_.args.base.mask, span_, t,
                                     t >= begin_ ? span_.exist(t) : 0);
  }

  const Source& source_;
  const typename Source::Row& row_;
  const Sequence& span_;
  int64_t begin_;
  int stride_;
  uint32_t flags_, ahead_;
  typename Source::Raw raw_;
};

// Last live step of this thread's group at t, or -1.
PPO_DEVICE int64_t last_live_of_group(const Steps& mask, const Sequence& span, int64_t t) {
  const unsigned bits = flag_bits(load_flags<Dense::no>(mask, span, t, span.exist(t)));
  return bits ? t + 31 - __clz(int(bits)) : -1;
}

template <bool kExtras>
PPO_DEVICE Suffixes<kExtras> recur(const AdvantageArgs& args, const StepGroupOf<kExtras>& group,
                                   float next) {
  return recur(group, next, args.gamma, args.decay);
}

// Whether this thread's share of the offsets rises from 0 to the number of slots.
PPO_DEVICE bool offsets_rise(const SequenceLayout& s) {
  if (!s.offsets) return true;
  bool good = true;
  const int64_t all = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < s.count; i += all) {
    const int64_t first = given_offset(s, i), end = given_offset(s, i + 1);
    good &= first <= end && (i > 0 || first == 0) && (i + 1 < s.count || end == s.length);
  }
  return good;
}

// Stores a block's moments. Invalid offsets make them NaN; the last block then makes every output
// NaN, written or not.
PPO_DEVICE void leave(const AdvantageArgs& args, const MomentSum& mine, ShiftedSums* scratch) {
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

// Last live step of a sequence; called by every lane of a warp with the same `tiles`.
PPO_DEVICE int64_t last_live_in_warp(const Steps& mask, const Sequence& span, int64_t tiles,
                                     int lanes) {
  const unsigned group = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1u)
                         << (lane_id() / lanes * lanes);
  int64_t last = -1;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    last = last_live_of_group(mask, span, tile * kTileSteps + lane_id() % lanes * kGroupSteps);
    const unsigned found = __ballot_sync(kAllLanes, last >= 0) & group;
    last = __shfl_sync(kAllLanes, last, found ? 31 - __clz(int(found)) : lane_id());
    if (__any_sync(kAllLanes, last >= 0)) break;
  }
  return last;
}

template <class Source>
PPO_DEVICE void walk_warp(const Source& source, const Sequence& span, int lanes,
                          MomentSum& moments) {
  constexpr bool kExtras = Source::extras;
  const AdvantageArgs& args = source.args.base;
  const int64_t tiles = lanes == kWarp ? (span.steps + kTileSteps - 1) / kTileSteps : 1;
  if (tiles == 0) return;
  const typename Source::Row row = source.open(
      span, Source::needs_last ? last_live_in_warp(args.mask, span, tiles, lanes) : -1);
  int64_t t = (tiles - 1) * kTileSteps + lane_id() % lanes * kGroupSteps;
  StepGroups<Source> groups(source, row, span, t, 0, kTileSteps);
  float next = number_of(args.bootstrap, span, 0.f);
  Later later{0.f, 0.f};
  AffineMap<kExtras> chunk;  // the tiles behind, of this tile's chunk
  for (int64_t tile = tiles - 1; tile >= 0; --tile, t -= kTileSteps) {
    const StepGroupOf<kExtras> group = groups.take(t);
    const NextValue mine = next_value_of(group);
    const unsigned valued = lanes_with_value(mine, lanes);
    const Suffixes<kExtras> maps =
        recur(args, group, first_value(behind_this_lane(valued), mine, next));
    next = first_value(valued, mine, next);
    AffineMap<kExtras> total = maps.of(0);
    const AffineMap<kExtras> behind = scan_lanes(total, lanes);
    const Later enters = apply(behind, apply(chunk, later));
    finish<Source::dense>(args, span, t, group, maps, enters, moments);
    chunk = compose(total, chunk);
    if (tile % kTiles == 0) {
      later = apply(chunk, later);
      chunk = {};
    }
  }
}

template <class Source>
__global__ void __launch_bounds__(kRowThreads, 1)
    advantage_warps_kernel(const __grid_constant__ typename Source::Args args) {
  const int lanes = args.base.lanes;
  const int64_t warp = int64_t(blockIdx.x) * kTiles + warp_id();
  const Sequence span = sequence_at(args.base.seqs, warp * (kWarp / lanes) + lane_id() / lanes);
  MomentSum moments;
  walk_warp(Source{args}, span, lanes, moments);
  leave(args.base, moments, shared_memory<ShiftedSums>());
}

}  // namespace ppo::cuda
