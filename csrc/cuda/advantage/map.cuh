// A -> a A + b, and the tree in which such maps of steps are composed.
//
// A sequence is cut, from its start, into groups of 4 steps, tiles of 32 groups and chunks of 8
// tiles. StepGroups are composed one step after the other; a tile's groups in a binary tree; a
// chunk's tiles one after the other; chunks are applied one after the other, all of them last
// first. Who computes a node differs from kernel to kernel, the nodes do not: a sequence's bits
// depend neither on the kernel nor on padding, batching and packing. (The identity composes
// exactly.)
#pragma once

#include "../device/runtime.cuh"

namespace ppo::cuda {

constexpr int kGroupSteps = 4;
constexpr int kTileSteps = kGroupSteps * kWarp;
constexpr int kTiles = 8;
constexpr int kChunkSteps = kTileSteps * kTiles;

// What enters a step from the later ones: the advantage, and the one that makes the return.
struct Later {
  float advantage, for_return;
};

// `kExtras`: the return has a lambda of its own, and steps may cut the recurrence. A cut map
// forgets its argument by selection: 0 * NaN would not.
template <bool kExtras>
struct AffineMap {
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

// One level of the binary tree: `total` is this side's map, `other` its sibling's; `behind` is
// composed of what lies between this side's steps and its block's end.
template <bool kExtras>
PPO_DEVICE void climb(bool earlier, const AffineMap<kExtras>& other, AffineMap<kExtras>& behind) {
  behind = select(earlier, compose(behind, other), behind);
}
template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> joined(bool earlier, const AffineMap<kExtras>& total,
                                     const AffineMap<kExtras>& other) {
  return compose(select(earlier, total, other), select(earlier, other, total));
}

// A group in each lane, `lanes` of them a tile: `total` becomes the tile's map; returns the map of
// the groups behind this lane's.
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

// The first step, in time, of a run of steps that moves the recurrence: its value is the next
// value of the last that moves before.
struct NextValue {
  bool any;
  float value;
};

// The lanes of this lane's sequence, `lanes` of them, that hold a next value.
PPO_DEVICE unsigned lanes_with_value(const NextValue& mine, int lanes) {
  const unsigned group = lanes == kWarp ? kAllLanes : (1u << lanes) - 1u;
  return __ballot_sync(kAllLanes, mine.any) & (group << (lane_id() / lanes * lanes));
}

// The value of the first lane of `valued`, else `otherwise`.
PPO_DEVICE float first_value(unsigned valued, const NextValue& mine, float otherwise) {
  const int lane = valued ? __ffs(int(valued)) - 1 : lane_id();
  const float value = __shfl_sync(kAllLanes, mine.value, lane);
  return valued ? value : otherwise;
}

PPO_DEVICE unsigned behind_this_lane(unsigned lanes) { return lanes & ~((2u << lane_id()) - 1u); }

}  // namespace ppo::cuda
