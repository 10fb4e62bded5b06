// Time-major gae: neighbouring threads hold neighbouring sequences, and those of one sequence a
// slab of its steps each, so that every load is coalesced without a transpose.
#pragma once

#include "gae.cuh"
#include "walk.cuh"

namespace ppo::cuda {

constexpr int kSlab = 2 * kUnit;  // steps of a thread
constexpr int kSlabs = kTileSteps / kSlab;
// Sequences side by side; half as many where a thread needs more than 128 registers.
template <bool kTwo>
constexpr int kAbreast = kTwo ? 16 : 32;
template <bool kTwo>
constexpr int kSlabThreads = kSlabs * kAbreast<kTwo>;

template <bool kTwo>
struct SlabShared {
  Map<kTwo> maps[2][kSlabs][kAbreast<kTwo>];
  Head heads[kSlabs][kAbreast<kTwo>];
  Moments moments[kSlabThreads<kTwo> / kWarp];
};

// Where a thread stands: in column `column`, `slabs` rows from `first` on share a sequence, and
// `index` is this one among them.
struct Slab {
  int column, first, index, slabs;
};

// The value behind this slab; `next`, that behind the tile, becomes the one before it.
template <bool kTwo>
PPO_DEVICE float next_of_slab(const SlabShared<kTwo>& shared, const Slab& at, float& next) {
  float mine = next;
  for (int slab = at.slabs - 1; slab >= 0; --slab) {
    mine = slab == at.index ? next : mine;
    const Head head = shared.heads[at.first + slab][at.column];
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
    shared.maps[turn][at.first + at.index][at.column] = total;
    __syncthreads();
    const Map<kTwo> other = shared.maps[turn][at.first + (at.index ^ bit)][at.column];
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
  float next = number_of(args.bootstrap, span, 0.f);
  Later later{0.f, 0.f};
  Map<kTwo> chunk;
  for (int64_t tile = tiles - 1; tile >= 0; --tile, t -= kTileSteps) {
    const uint32_t flags = load_flags(args.mask, span, t, span.exist(t));
    const uint32_t more_flags = load_flags(args.mask, span, t + kUnit, span.exist(t + kUnit));
    const auto raw = source.load(row, span, t, flags);
    const auto more_raw = source.load(row, span, t + kUnit, more_flags);
    const UnitOf<kTwo> first = source.decode(row, span, t, flags, raw);
    const UnitOf<kTwo> second = source.decode(row, span, t + kUnit, more_flags, more_raw);
    const Head near = head_of(first), far = head_of(second);
    shared.heads[at.first + at.index][at.column] = near.any ? near : far;
    __syncthreads();
    const float after = next_of_slab(shared, at, next);
    const Suffixes<kTwo> maps = recur(args, first, far.any ? far.value : after);
    const Suffixes<kTwo> more = recur(args, second, after);
    Map<kTwo> total = compose(maps.of(0), more.of(0));
    Map<kTwo> behind[2] = {more.of(0), {}};
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
__global__ void __launch_bounds__(kSlabThreads<kTwo>, 1)
    gae_slabs_kernel(const __grid_constant__ GaeArgs args) {
  auto& shared = *shared_memory<SlabShared<kTwo>>();
  const Sequences& seqs = args.base.seqs;
  const int slabs = args.base.lanes, row = int(threadIdx.x) / kAbreast<kTwo>;
  const Slab at{int(threadIdx.x) % kAbreast<kTwo>, row / slabs * slabs, row % slabs, slabs};
  const int64_t group = int64_t(blockIdx.x) * (kSlabs / slabs) + row / slabs;
  const int64_t seq = group * kAbreast<kTwo> + at.column;
  const Sequence span{seq, 0, seq < seqs.count ? seqs.length : 0};
  MomentSum moments;
  walk_slabs(GaeSource<kTwo>{args}, span, at, moments, shared);
  leave(args.base, moments, shared.moments);
}

}  // namespace ppo::cuda
