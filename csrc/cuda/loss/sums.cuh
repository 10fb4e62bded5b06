// Sums of all tokens of a loss in one order: of threads, blocks, and by the block that is last.
#pragma once

#include "sequences.cuh"

namespace ppo::cuda {

// At most; each has neighbouring tiles, and leaves one part for the last of them to merge.
constexpr int64_t kLossBlocks = 256;
static_assert(kLossBlocks <= kTokenThreads, "the last block has a thread for every part");

// A block's sums; those of a loss are kSums of its statistics, from kFirst on.
template <int kSums>
struct LossPart {
  double sums[kSums];
  float ratio_min, ratio_max;
  int64_t flags;  // SequenceFlag
};

// One thread's sums over its tiles.
template <int kSums>
struct LossSums {
  double sums[kSums] = {};
  float ratio_min = __builtin_inff(), ratio_max = -__builtin_inff();

  // A NaN stays.
  PPO_DEVICE void ratio(float low, float high) {
    ratio_min = low < ratio_min || low != low ? low : ratio_min;
    ratio_max = high > ratio_max || high != high ? high : ratio_max;
  }
};

template <int kSums>
struct LossShared {
  static constexpr int kWarps = kTokenThreads / kWarp;
  uint32_t words[2][kTileWords];
  double sums[kTokenThreads];  // by warps, then by rows of blocks
  float low[kWarps], high[kWarps];
  int flags[kLossBlocks];
  double totals[kSums];
  int scratch[kWarps];
};

// Gives the lane `by` away kHalf of the first 2 * kHalf numbers and adds its others to the rest.
// (Recursive: a loop over the halves is not unrolled, and would index registers.)
template <int kHalf, int kSums>
PPO_DEVICE void fold_halves(double (&x)[kSums], int by) {
  const bool upper = (lane_id() & by) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const double give = upper ? x[i] : x[i + kHalf], keep = upper ? x[i + kHalf] : x[i];
    x[i] = keep + __shfl_xor_sync(kAllLanes, give, by);
  }
  if constexpr (kHalf > 1) fold_halves<kHalf / 2>(x, by / 2);
}

// Sums kSums numbers over the warp: lane l gets that of number l * kSums / 32.
template <int kSums>
PPO_DEVICE double warp_sums(double (&x)[kSums]) {
  fold_halves<kSums / 2>(x, kWarp / 2);
#pragma unroll
  for (int by = kWarp / kSums / 2; by > 0; by /= 2) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], by);
  }
  return x[0];
}

template <int kSums>
PPO_DEVICE void block_extremes(LossSums<kSums>& mine, LossShared<kSums>& shared) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const float low = __shfl_xor_sync(kAllLanes, mine.ratio_min, by);
    const float high = __shfl_xor_sync(kAllLanes, mine.ratio_max, by);
    mine.ratio(low, high);
  }
  if (lane_id() == 0) {
    shared.low[warp_id()] = mine.ratio_min;
    shared.high[warp_id()] = mine.ratio_max;
  }
  __syncthreads();
  for (int w = 0; w < shared.kWarps; ++w) mine.ratio(shared.low[w], shared.high[w]);
}

// Thread i < kSums gets the block's sum i, in the order of its warps.
template <int kSums>
PPO_DEVICE double block_sums(double (&x)[kSums], LossShared<kSums>& shared) {
  constexpr int kEach = kWarp / kSums;
  const double sum = warp_sums(x);
  if (lane_id() % kEach == 0) shared.sums[warp_id() * kSums + lane_id() / kEach] = sum;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x < kSums) {
    for (int w = 0; w < shared.kWarps; ++w) total += shared.sums[w * kSums + threadIdx.x];
  }
  return total;
}

// Sequences that a block opened without an unmasked token and a later one has one of.
template <int kSums>
PPO_DEVICE int joined_sequences(const LossPart<kSums>* parts, LossShared<kSums>& shared) {
  const int blocks = int(gridDim.x), block = int(threadIdx.x);
  if (block < blocks) shared.flags[block] = int(parts[block].flags);
  __syncthreads();
  if (block >= blocks || !(shared.flags[block] & kOpen)) return 0;
  for (int i = block + 1; i < blocks; ++i) {
    if (shared.flags[i] & kHeadLive) return 1;
    if (shared.flags[i] & kStarts) return 0;
  }
  return 0;
}

// By the last block: shared.totals, and the ratio's extremes, of all parts in index order.
template <int kSums>
PPO_DEVICE LossSums<kSums> merge_parts(const LossPart<kSums>* parts, LossShared<kSums>& shared) {
  constexpr int kRows = kTokenThreads / kSums;
  const int blocks = int(gridDim.x), at = int(threadIdx.x) % kSums;
  double sum = 0.0;
#pragma unroll 4
  for (int i = int(threadIdx.x) / kSums; i < blocks; i += kRows) sum += parts[i].sums[at];
  LossSums<kSums> all;
  if (int(threadIdx.x) < blocks) {
    all.ratio(parts[threadIdx.x].ratio_min, parts[threadIdx.x].ratio_max);
  }
  shared.sums[threadIdx.x] = sum;
  block_extremes(all, shared);
  if (threadIdx.x < kSums) {
    double total = 0.0;
    for (int row = 0; row < kRows; ++row) total += shared.sums[row * kSums + at];
    shared.totals[at] = total;
  }
  return all;
}

}  // namespace ppo::cuda
