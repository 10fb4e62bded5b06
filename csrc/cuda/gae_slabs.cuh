// Time-major gae: neighbouring lanes hold neighbouring environments, each warp a slab of their
// steps, so that every load is coalesced without a transpose.
#pragma once

#include "advantage_walk.cuh"
#include "gae.cuh"

namespace ppo::cuda {

constexpr int kSlab = 2 * kUnit;  // steps of a warp
constexpr int kSlabs = kTileSteps / kSlab;
constexpr int kSlabThreads = kSlabs * kWarp;

template <bool kTwo>
struct SlabShared {
  Map<kTwo> maps[2][kSlabs][kWarp];
  Head heads[kSlabs][kWarp];
  Moments moments[kSlabs];
};

// Where a thread stands: `slabs` warps share 32 environments, [first, first + slabs).
struct Slab {
  int first, index, slabs;
};

// The value behind this slab; `next`, that behind the tile, becomes the one before it.
PPO_DEVICE float next_of_slab(const Head (*heads)[kWarp], const Slab& at, float& next) {
  float mine = next;
  for (int slab = at.slabs - 1; slab >= 0; --slab) {
    mine = slab == at.index ? next : mine;
    const Head head = heads[at.first + slab][lane_id()];
    next = head.any ? head.value : next;
  }
  return mine;
}

// scan_lanes() from its second level on, for a slab of two units: `total` becomes the tile's map.
template <bool kTwo>
PPO_DEVICE void scan_slabs(Map<kTwo>& total, Map<kTwo> (&behind)[2], const Slab& at,
                           SlabShared<kTwo>& shared) {
  int turn = 0;
  for (int bit = 1; bit < at.slabs; bit *= 2, turn ^= 1) {
    shared.maps[turn][warp_id()][lane_id()] = total;
    __syncthreads();
    const Map<kTwo> other = shared.maps[turn][warp_id() ^ bit][lane_id()];
    const bool earlier = (at.index & bit) == 0;
    climb(earlier, other, behind[0]);
    climb(earlier, other, behind[1]);
    total = joined(earlier, total, other);
  }
}

template <bool kTwo>
PPO_DEVICE void walk_slabs(const GaeSource<kTwo>& source, const Sequence& span, const Slab& at,
                           MomentSum& moments, SlabShared<kTwo>& shared) {
  const AdvantageArgs& args = source.args.base;
  const typename GaeSource<kTwo>::Row row = source.open(span, -1);
  const int64_t tiles = (args.seqs.length + kTileSteps - 1) / kTileSteps;
  int64_t t = (tiles - 1) * kTileSteps + at.index * kSlab;
  Units<GaeSource<kTwo>> firsts(source, row, span, t, 0, kTileSteps);
  Units<GaeSource<kTwo>> seconds(source, row, span, t + kUnit, 0, kTileSteps);
  float next = number_of(args.bootstrap, span, 0.f);
  Later later{0.f, 0.f};
  Map<kTwo> chunk;
  for (int64_t tile = tiles - 1; tile >= 0; --tile, t -= kTileSteps) {
    const UnitOf<kTwo> first = firsts.take(t), second = seconds.take(t + kUnit);
    const Head near = head_of(first), far = head_of(second);
    shared.heads[warp_id()][lane_id()] = near.any ? near : far;
    __syncthreads();
    const float after = next_of_slab(shared.heads, at, next);
    const Suffixes<kTwo> maps = recur(args, first, far.any ? far.value : after);
    const Suffixes<kTwo> more = recur(args, second, after);
    Map<kTwo> total = compose(maps.of[0], more.of[0]);
    Map<kTwo> behind[2] = {more.of[0], {}};
    scan_slabs(total, behind, at, shared);
    const Later enters = apply(chunk, later);
    finish(args, span, t, first, maps, apply(behind[0], enters), moments);
    finish(args, span, t + kUnit, second, more, apply(behind[1], enters), moments);
    chunk = compose(total, chunk);
    if (tile % kTiles == 0) {
      later = apply(chunk, later);
      chunk = {};
    }
  }
}

// `lanes` slabs make a tile: a power of two, all of them where sequences are longer than a tile.
template <bool kTwo>
__global__ void __launch_bounds__(kSlabThreads)
    gae_slabs_kernel(const __grid_constant__ GaeArgs args) {
  auto& shared = *shared_memory<SlabShared<kTwo>>();
  const int slabs = args.base.lanes, group = warp_id() / slabs;
  const Slab at{group * slabs, warp_id() % slabs, slabs};
  const int64_t groups = int64_t(blockIdx.x) * (kSlabs / slabs) + group;
  const Sequence span = sequence_at(args.base.seqs, groups * kWarp + lane_id());
  MomentSum moments;
  walk_slabs(GaeSource<kTwo>{args}, span, at, moments, shared);
  leave(args.base, moments, shared.moments);
}

}  // namespace ppo::cuda
