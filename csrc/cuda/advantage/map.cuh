// Affine maps A -> a A + b of steps, and the tree that composes them.
//
// A sequence is cut, from its start, into groups of 4 steps, tiles of 32 groups and chunks of 8
// tiles. The steps of a group are composed one after the other, the groups of a tile in a binary
// tree, the tiles of a chunk one after the other; chunks are applied one after the other, always
// last first. Kernels differ in which thread computes a node, not in the nodes: a sequence's bits
// depend neither on the kernel nor on padding, batching and packing. (The identity composes
// exactly.)
#pragma once

#include "../device/runtime.cuh"

namespace ppo::cuda {

constexpr int kGroupSteps = 4;
constexpr int kTileSteps = kGroupSteps * kWarp;
constexpr int kTiles = 8;
constexpr int kChunkSteps = kTileSteps * kTiles;

// State that enters a step from the later ones: the advantage, and the one that forms the return.
struct Later {
  float advantage, for_return;
};

// Affine map of steps. With kExtras (see GaeSource) it holds a second pair for the returns' own
// lambda, and may be cut: a cut map drops its argument by selection, because 0 * NaN is NaN.
template <bool kExtras>
struct alignas(8) AffineMap {
  float a = 1.f, b = 0.f;
};
template <>
struct AffineMap<true> {
  float a = 1.f, b = 0.f;
  float a_ret = 1.f, b_ret = 0.f;
  int cut = 0;
};

template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> compose(const AffineMap<kExtras>& earlier,
                                      const AffineMap<kExtras>& later) {
  AffineMap<kExtras> m;
  m.a = earlier.a * later.a;
  m.b = fmaf(earlier.a, later.b, earlier.b);
  if constexpr (kExtras) {
    m.a_ret = earlier.a_ret * later.a_ret;
    m.b_ret = fmaf(earlier.a_ret, later.b_ret, earlier.b_ret);
    m.b = earlier.cut ? earlier.b : m.b;
    m.b_ret = earlier.cut ? earlier.b_ret : m.b_ret;
    m.cut = earlier.cut | later.cut;
  }
  return m;
}

template <bool kExtras>
PPO_DEVICE Later apply(const AffineMap<kExtras>& m, const Later& x) {
  Later y;
  y.advantage = fmaf(m.a, x.advantage, m.b);
  if constexpr (kExtras) {
    y.for_return = fmaf(m.a_ret, x.for_return, m.b_ret);
    y.advantage = m.cut ? m.b : y.advantage;
    y.for_return = m.cut ? m.b_ret : y.for_return;
  } else {
    y.for_return = y.advantage;
  }
  return y;
}

template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> select(bool which, const AffineMap<kExtras>& x,
                                     const AffineMap<kExtras>& y) {
  AffineMap<kExtras> m;
  m.a = which ? x.a : y.a;
  m.b = which ? x.b : y.b;
  if constexpr (kExtras) {
    m.a_ret = which ? x.a_ret : y.a_ret;
    m.b_ret = which ? x.b_ret : y.b_ret;
    m.cut = which ? x.cut : y.cut;
  }
  return m;
}

template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> of_lane(const AffineMap<kExtras>& x, int lane) {
  AffineMap<kExtras> m;
  m.a = __shfl_sync(kAllLanes, x.a, lane);
  m.b = __shfl_sync(kAllLanes, x.b, lane);
  if constexpr (kExtras) {
    m.a_ret = __shfl_sync(kAllLanes, x.a_ret, lane);
    m.b_ret = __shfl_sync(kAllLanes, x.b_ret, lane);
    m.cut = __shfl_sync(kAllLanes, x.cut, lane);
  }
  return m;
}

// One level of the binary tree: `total` is this side's map, `other` its sibling's, `behind` the
// composition of the steps between this side and the end of its subtree.
template <bool kExtras>
PPO_DEVICE void climb(bool earlier, const AffineMap<kExtras>& other, AffineMap<kExtras>& behind) {
  behind = select(earlier, compose(behind, other), behind);
}
template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> joined(bool earlier, const AffineMap<kExtras>& total,
                                     const AffineMap<kExtras>& other) {
  return compose(select(earlier, total, other), select(earlier, other, total));
}

// Scan over `lanes` lanes, one group each, that make a tile: `total` becomes the tile's map;
// returns the map of the groups behind this lane's.
template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> scan_lanes(AffineMap<kExtras>& total, int lanes) {
  AffineMap<kExtras> behind;
  for (int bit = 1; bit < lanes; bit *= 2) {
    const AffineMap<kExtras> other = of_lane(total, lane_id() ^ bit);
    const bool earlier = (lane_id() & bit) == 0;
    climb(earlier, other, behind);
    total = joined(earlier, total, other);
  }
  return behind;
}

// First step in time of a run of steps that moves the recurrence, if any: the value that the step
// before the run bootstraps from.
struct NextValue {
  bool any;
  float value;
};

// Lanes of this lane's sequence (`lanes` lanes) that hold a next value.
PPO_DEVICE unsigned lanes_with_value(const NextValue& mine, int lanes) {
  const unsigned group = lanes == kWarp ? kAllLanes : (1u << lanes) - 1u;
  return __ballot_sync(kAllLanes, mine.any) & (group << (lane_id() / lanes * lanes));
}

// Value of the first lane of `valued`; `otherwise` if there is none.
PPO_DEVICE float first_value(unsigned valued, const NextValue& mine, float otherwise) {
  const int lane = valued ? __ffs(int(valued)) - 1 : lane_id();
  const float value = __shfl_sync(kAllLanes, mine.value, lane);
  return valued ? value : otherwise;
}

PPO_DEVICE unsigned behind_this_lane(unsigned lanes) { return lanes & ~((2u << lane_id()) - 1u); }

}  // namespace ppo::cuda
