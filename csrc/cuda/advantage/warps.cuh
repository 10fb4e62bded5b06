// Short sequences: `lanes` lanes of a warp hold one, or a warp walks along it.
#pragma once

#include "walk.cuh"

namespace ppo::cuda {

// Every lane of a warp: `tiles` is the same in all.
PPO_DEVICE int64_t last_live_in_warp(const Steps& mask, const Sequence& span, int64_t tiles,
                                     int lanes) {
  const unsigned group = (lanes == kWarp ? kAllLanes : (1u << lanes) - 1u)
                         << (lane_id() / lanes * lanes);
  int64_t last = -1;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    last = last_live_of_unit(mask, span, tile * kTileSteps + lane_id() % lanes * kUnit);
    const unsigned found = __ballot_sync(kAllLanes, last >= 0) & group;
    last = __shfl_sync(kAllLanes, last, found ? 31 - __clz(int(found)) : lane_id());
    if (__any_sync(kAllLanes, last >= 0)) break;
  }
  return last;
}

template <class Source>
PPO_DEVICE void walk_warp(const Source& source, const Sequence& span, int lanes,
                          MomentSum& moments) {
  constexpr bool kTwo = Source::two;
  const AdvantageArgs& args = source.args.base;
  const int64_t tiles = lanes == kWarp ? (span.steps + kTileSteps - 1) / kTileSteps : 1;
  if (tiles == 0) return;
  const typename Source::Row row = source.open(
      span, Source::needs_last ? last_live_in_warp(args.mask, span, tiles, lanes) : -1);
  int64_t t = (tiles - 1) * kTileSteps + lane_id() % lanes * kUnit;
  Units<Source> units(source, row, span, t, 0, kTileSteps);
  float next = number_of(args.bootstrap, span, 0.f);
  Later later{0.f, 0.f};
  Map<kTwo> chunk;  // the tiles behind, of this tile's chunk
  for (int64_t tile = tiles - 1; tile >= 0; --tile, t -= kTileSteps) {
    const UnitOf<kTwo> unit = units.take(t);
    const Head head = head_of(unit);
    const unsigned heads = heads_of_tile(head, lanes);
    const Suffixes<kTwo> maps = recur(args, unit, first_head(behind_this_lane(heads), head, next));
    next = first_head(heads, head, next);
    Map<kTwo> total = maps.of(0);
    const Map<kTwo> behind = scan_lanes(total, lanes);
    const Later enters = apply(behind, apply(chunk, later));
    finish(args, span, t, unit, maps, enters, moments);
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
  leave(args.base, moments, shared_memory<Moments>());
}

}  // namespace ppo::cuda
