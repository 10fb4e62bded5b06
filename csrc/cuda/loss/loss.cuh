// Per-token losses: tiles of tokens, sums in one fixed order, and the divisor.
#pragma once

#include "../../codes.h"
#include "sequences.cuh"

namespace ppo::cuda {

// Most blocks of a loss. Each takes neighbouring tiles and stores one part, which the last block
// merges.
constexpr int64_t kLossBlocks = 256;
static_assert(kLossBlocks <= kTokenThreads, "the last block has a thread for every part");

// Sums of a block: kSums of the loss's statistics, from kFirst on.
template <int kSums>
struct LossPart {
  double sums[kSums];
  float ratio_min, ratio_max;
  int64_t flags;  // SequenceFlag
};

// Sums of one thread over its tiles.
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

// Exchanges kHalf of the first 2 * kHalf numbers with the lane `by` away, and adds that lane's to
// those kept. (Recursive, because a loop over the halves is not unrolled and would index
// registers.)
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

// Sums of kSums numbers over the warp: lane l gets the sum of number l * kSums / 32.
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

// Sums over the block, in the order of its warps: thread i < kSums gets sum i.
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

// Whether the last sequence of the block that this thread stands for, without an unmasked token so
// far, has one in a later block.
template <int kSums>
PPO_DEVICE int joined_sequences(const LossShared<kSums>& shared) {
  const int blocks = int(gridDim.x), block = int(threadIdx.x);
  if (block >= blocks || !(shared.flags[block] & kOpen)) return 0;
  for (int i = block + 1; i < blocks; ++i) {
    if (shared.flags[i] & kHeadLive) return 1;
    if (shared.flags[i] & kStarts) return 0;
  }
  return 0;
}

// Totals of all parts in index order, and the ratio's extremes; called by the last block, whose
// loads are all under way before the first one is waited for.
template <int kSums>
PPO_DEVICE LossSums<kSums> merge_parts(const LossPart<kSums>* parts, LossShared<kSums>& shared) {
  constexpr int kRows = kTokenThreads / kSums;
  const int blocks = int(gridDim.x), at = int(threadIdx.x) % kSums;
  constexpr int kEach = int(kLossBlocks) / kRows;
  double part[kEach], sum = 0.0;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int i = int(threadIdx.x) / kSums + k * kRows;
    part[k] = i < blocks ? parts[i].sums[at] : 0.0;
  }
  LossSums<kSums> all;
  if (int(threadIdx.x) < blocks) {
    const LossPart<kSums>& mine = parts[threadIdx.x];
    all.ratio(mine.ratio_min, mine.ratio_max);
    shared.flags[threadIdx.x] = int(mine.flags);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) sum += part[k];
  shared.sums[threadIdx.x] = sum;
  block_extremes(all, shared);
  if (threadIdx.x < kSums) {
    double total = 0.0;
    for (int row = 0; row < kRows; ++row) total += shared.sums[row * kSums + at];
    shared.totals[at] = total;
  }
  return all;
}

struct LossArgs {
  SequenceMap map;
  Column mask;
  const SequenceTerm* terms;  // per sequence; null where every token weighs 1
  bool rows;                  // row numbers are needed by a column or by the terms
  bool wide_grads;            // gradients are stored 16 bytes at a time
  int64_t tiles;
  Reduction reduction;
  ScalarArg denom;  // 0: the reduction's own
  void* parts;      // LossPart, one per block
  unsigned* counter;
  float *loss, *scale;
  double* stats;  // (kNStats,)
};

// D of the reduction itself; 0 for token_sum.
PPO_DEVICE double own_denom(const LossArgs& a, double tokens, double seqs) {
  switch (a.reduction) {
    case Reduction::token_mean:
      return tokens;
    case Reduction::token_sum:
      return 0.0;
    case Reduction::seq_mean_token_sum_norm:
      return seqs * double(a.map.steps);
    default:
      return seqs;
  }
}

// Positions of a loss's counts among its sums, which are stats[first], stats[first + 1], ...
struct LossLayout {
  int first, tokens, seqs, loss, denom;
  bool keeps_seqs;  // else only D needs their number
};

// Writes loss, 1 / D, and the totals that are known only at the end; called by one thread.
// `given` is a.denom, `joined` the sequences that blocks share.
template <int kSums>
PPO_DEVICE void divide(const LossArgs& a, const LossLayout& at, double given, double joined,
                       LossShared<kSums>& shared) {
  double* totals = shared.totals;
  const double seqs = totals[at.seqs] + joined;
  const double own = own_denom(a, totals[at.tokens], seqs);
  const bool has_given = a.denom.data || given > 0.0;
  const double denom = has_given ? given : a.reduction == Reduction::token_sum ? 1.0 : own;
  *a.loss = denom <= 0.0 ? 0.f : float(totals[at.loss] / denom);  // NaN passes
  *a.scale = denom <= 0.0 ? 0.f : float(1.0 / denom);
  if (at.keeps_seqs) totals[at.seqs] = seqs;
  totals[at.denom] = own;
}

// End of a block, after its last tile. The last block writes loss, scale and statistics.
template <int kSums>
PPO_DEVICE void finish(const LossArgs& a, const LossLayout& at, LossSums<kSums>& mine, int flags,
                       LossShared<kSums>& shared) {
  auto* parts = static_cast<LossPart<kSums>*>(a.parts);
  LossPart<kSums>& part = parts[blockIdx.x];
  block_extremes(mine, shared);
  const double sum = block_sums(mine.sums, shared);
  if (threadIdx.x < kSums) part.sums[threadIdx.x] = sum;
  if (threadIdx.x == 0) {
    part.ratio_min = mine.ratio_min;
    part.ratio_max = mine.ratio_max;
    part.flags = flags;
  }
  if (!arrives_last(a.counter, gridDim.x)) return;
  const double given = read(a.denom);
  const LossSums<kSums> all = merge_parts(parts, shared);
  const int joined = block_sum(joined_sequences(shared), shared.scratch);
  if (threadIdx.x == 0) divide(a, at, given, double(joined), shared);
  __syncthreads();
  const int i = int(threadIdx.x), own = i - at.first;
  if (i == kRatioMin) {
    a.stats[i] = double(all.ratio_min);
  } else if (i == kRatioMax) {
    a.stats[i] = double(all.ratio_max);
  } else if (i < kNStats) {
    a.stats[i] = own >= 0 && own < kSums ? shared.totals[own] : 0.0;
  }
}

// Terms of this thread's slots; 1 if every token weighs the same.
PPO_DEVICE void terms_of(const LossArgs& a, const Slots& s, int64_t first_seq,
                         SequenceTerm (&out)[kItems]) {
  int64_t seq = first_seq;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    out[k] = {1.f, 1.f, false};
    if (!a.terms || k >= s.count) continue;
    seq = a.map.offsets ? a.map.find_from(seq, s.first + k) : s.row[k];
    out[k] = a.terms[seq];
  }
}

// Body of a loss kernel: step.load(slots) and step.tokens(slots, live, first_seq, inputs, sums)
// over this block's share of the tiles, then finish(). step.resolve() reads the numbers that are
// tensors, while the first tile's loads are under way. Step::kLayout is a compile-time constant
// because it indexes registers.
template <int kSums, class Step>
PPO_DEVICE void loss_kernel(const LossArgs& a, Step step) {
  constexpr LossLayout at = Step::kLayout;
  auto& shared = *shared_memory<LossShared<kSums>>();
  LossSums<kSums> sums;
  int flags = 0;  // of thread 0
  const int64_t first = blockIdx.x * a.tiles / gridDim.x;
  const int64_t last = (blockIdx.x + 1) * a.tiles / gridDim.x;
  for (int64_t tile = first; tile < last; ++tile) {
    const Slots slots = slots_of(tile, a.map.tokens, a.rows ? a.map.steps : 0);
    const auto inputs = step.load(slots);
    const uint32_t live = live_items(a.mask, slots);
    if (tile == first) step.resolve();
    const int64_t start = tile * kTile;
    const int64_t end = start + kTile < a.map.tokens ? start + kTile : a.map.tokens;
    const int64_t first_seq = a.map.find(start), last_seq = a.map.find(end - 1);
    step.tokens(slots, live, first_seq, inputs, sums);

    const TileBits bits(shared.words[tile % 2], live);
    int started = live_starts(a.map, bits, start, end, first_seq, last_seq);
    if (threadIdx.x == 0) {
      const int more = edge_flags(a.map, bits, start, end, first_seq, last_seq);
      started += (flags & kOpen) && (more & kHeadLive);
      flags = join_flags(flags, more);
    }
    sums.sums[at.seqs] += double(started);
    sums.sums[at.tokens] += double(__popc(live));
  }
  finish(a, at, sums, flags, shared);
}

}  // namespace ppo::cuda
