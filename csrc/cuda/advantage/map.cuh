// A -> a A + b, and the tree in which such maps of steps are composed.
//
// A sequence is cut, from its start, into units of 4 steps, tiles of 32 units and chunks of 8
// tiles. Units are composed one step after the other; a tile's units in a binary tree; a chunk's
// tiles one after the other; chunks are applied one after the other, all of them last first. Who
// computes a node differs from kernel to kernel, the nodes do not: a sequence's bits depend
// neither on the kernel nor on padding, batching and packing. (The identity composes exactly.)
#pragma once

#include "../device/runtime.cuh"

namespace ppo::cuda {

constexpr int kUnit = 4;
constexpr int kTileSteps = kUnit * kWarp;
constexpr int kTiles = 8;
constexpr int kChunkSteps = kTileSteps * kTiles;

// What enters a step from the later ones: the advantage, and the one that makes the return.
struct Later {
  float advantage, for_return;
};

// `kTwo`: the return has a lambda of its own, and steps may cut the recurrence. A cut map forgets
// its argument by selection: 0 * NaN would not.
template <bool kTwo>
struct Map {
  float a = 1.f, b = 0.f;
  float a_ret = 1.f, b_ret = 0.f;
  int cut = 0;
};

template <bool kTwo>
PPO_DEVICE Map<kTwo> compose(const Map<kTwo>& earlier, const Map<kTwo>& later) {
  Map<kTwo> m;
  m.a = earlier.a * later.a;
  m.b = fmaf(earlier.a, later.b, earlier.b);
  if constexpr (kTwo) {
    m.a_ret = earlier.a_ret * later.a_ret;
    m.b_ret = fmaf(earlier.a_ret, later.b_ret, earlier.b_ret);
    m.b = earlier.cut ? earlier.b : m.b;
    m.b_ret = earlier.cut ? earlier.b_ret : m.b_ret;
    m.cut = earlier.cut | later.cut;
  }
  return m;
}

template <bool kTwo>
PPO_DEVICE Later apply(const Map<kTwo>& m, const Later& x) {
  Later y;
  y.advantage = fmaf(m.a, x.advantage, m.b);
  if constexpr (kTwo) {
    y.for_return = fmaf(m.a_ret, x.for_return, m.b_ret);
    y.advantage = m.cut ? m.b : y.advantage;
    y.for_return = m.cut ? m.b_ret : y.for_return;
  } else {
    y.for_return = y.advantage;
  }
  return y;
}

template <bool kTwo>
PPO_DEVICE Map<kTwo> select(bool which, const Map<kTwo>& x, const Map<kTwo>& y) {
  Map<kTwo> m;
  m.a = which ? x.a : y.a;
  m.b = which ? x.b : y.b;
  if constexpr (kTwo) {
    m.a_ret = which ? x.a_ret : y.a_ret;
    m.b_ret = which ? x.b_ret : y.b_ret;
    m.cut = which ? x.cut : y.cut;
  }
  return m;
}

template <bool kTwo>
PPO_DEVICE Map<kTwo> of_lane(const Map<kTwo>& x, int lane) {
  Map<kTwo> m;
  m.a = __shfl_sync(kAllLanes, x.a, lane);
  m.b = __shfl_sync(kAllLanes, x.b, lane);
  if constexpr (kTwo) {
    m.a_ret = __shfl_sync(kAllLanes, x.a_ret, lane);
    m.b_ret = __shfl_sync(kAllLanes, x.b_ret, lane);
    m.cut = __shfl_sync(kAllLanes, x.cut, lane);
  }
  return m;
}

// One level of the binary tree: `total` is this side's map, `other` its sibling's; `behind` is
// composed of what lies between this side's steps and its block's end.
template <bool kTwo>
PPO_DEVICE void climb(bool earlier, const Map<kTwo>& other, Map<kTwo>& behind) {
  behind = select(earlier, compose(behind, other), behind);
}
template <bool kTwo>
PPO_DEVICE Map<kTwo> joined(bool earlier, const Map<kTwo>& total, const Map<kTwo>& other) {
  return compose(select(earlier, total, other), select(earlier, other, total));
}

// A unit in each lane, `lanes` of them a tile: `total` becomes the tile's map; returns the map of
// the units behind this lane's.
template <bool kTwo>
PPO_DEVICE Map<kTwo> scan_lanes(Map<kTwo>& total, int lanes) {
  Map<kTwo> behind;
  for (int bit = 1; bit < lanes; bit *= 2) {
    const Map<kTwo> other = of_lane(total, lane_id() ^ bit);
    const bool earlier = (lane_id() & bit) == 0;
    climb(earlier, other, behind);
    total = joined(earlier, total, other);
  }
  return behind;
}

// The first step, in time, of a run of steps that moves the recurrence: its value is the next
// value of the last that moves before.
struct Head {
  bool any;
  float value;
};

// The lanes of this lane's sequence, `lanes` of them, that have a head.
PPO_DEVICE unsigned heads_of_tile(const Head& head, int lanes) {
  const unsigned group = lanes == kWarp ? kAllLanes : (1u << lanes) - 1u;
  return __ballot_sync(kAllLanes, head.any) & (group << (lane_id() / lanes * lanes));
}

// The value of the first head among `heads`, else `otherwise`.
PPO_DEVICE float first_head(unsigned heads, const Head& mine, float otherwise) {
  const int lane = heads ? __ffs(int(heads)) - 1 : lane_id();
  const float value = __shfl_sync(kAllLanes, mine.value, lane);
  return heads ? value : otherwise;
}

PPO_DEVICE unsigned behind_this_lane(unsigned lanes) { return lanes & ~((2u << lane_id()) - 1u); }

}  // namespace ppo::cuda
