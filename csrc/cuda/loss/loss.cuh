// What the per-token losses share: tiles of tokens, their sequences' terms, the divisor.
#pragma once

#include "../../options.h"
#include "../device/scalar.cuh"
#include "sequence_terms.cuh"
#include "sums.cuh"

namespace ppo::cuda {

struct LossArgs {
  SequenceMap map;
  Column mask;
  const SequenceTerm* terms;  // per sequence; null where every token weighs 1
  bool rows;                  // a column or the terms want row numbers
  bool wide_grads;            // gradients are stored 16 bytes at a time
  int64_t tiles;
  Reduction reduction;
  ScalarArg denom;  // 0: the reduction's own
  void* parts;      // LossPart, one per block
  unsigned* counter;
  float *loss, *scale;
  double* stats;  // (kNStats,)
};

// The reduction's own D; 0 for token_sum.
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

// Where a loss keeps its counts among its sums, which are stats[first], stats[first + 1], ...
struct LossLayout {
  int first, tokens, seqs, loss, denom;
  bool keeps_seqs;  // else only D needs their number
};

// By one thread: loss, 1 / D, and the totals that only now are known.
template <int kSums>
PPO_DEVICE void divide(const LossArgs& a, const LossLayout& at, double joined,
                       LossShared<kSums>& shared) {
  double* totals = shared.totals;
  const double seqs = totals[at.seqs] + joined;
  const double own = own_denom(a, totals[at.tokens], seqs), given = read(a.denom);
  const bool has_given = a.denom.data || given > 0.0;
  const double denom = has_given ? given : a.reduction == Reduction::token_sum ? 1.0 : own;
  *a.loss = denom <= 0.0 ? 0.f : float(totals[at.loss] / denom);  // NaN passes
  *a.scale = denom <= 0.0 ? 0.f : float(1.0 / denom);
  if (at.keeps_seqs) totals[at.seqs] = seqs;
  totals[at.denom] = own;
}

// After a block's last tile. The last block to arrive writes loss, scale and statistics.
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
  const LossSums<kSums> all = merge_parts(parts, shared);
  const int joined = block_sum(joined_sequences(parts, shared), shared.scratch);
  if (threadIdx.x == 0) divide(a, at, double(joined), shared);
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

// The terms of this thread's slots; 1 where every token weighs the same.
PPO_DEVICE void terms_of(const LossArgs& a, const Slots& s, int64_t first_seq,
                         SequenceTerm (&out)[kItems]) {
  int64_t seq = first_seq;
#pragma unroll
  for (int k = 0; k < kItems; ++k) {
    out[k] = {1.f, 1.f};
    if (!a.terms || k >= s.count) continue;
    seq = a.map.offsets ? a.map.find_from(seq, s.first + k) : s.row[k];
    out[k] = a.terms[seq];
  }
}

// step.load(slots) and step.tokens(slots, live, first_seq, inputs, sums) over this block's share
// of the tiles, and the end. What Step::kLayout is must be known when compiling: it indexes
// registers.
template <int kSums, class Step>
PPO_DEVICE void loss_kernel(const LossArgs& a, const Step& step) {
  constexpr LossLayout at = Step::kLayout;
  auto& shared = *shared_memory<LossShared<kSums>>();
  LossSums<kSums> sums;
  int flags = 0;  // of thread 0
  const int64_t last = (blockIdx.x + 1) * a.tiles / gridDim.x;
  for (int64_t tile = blockIdx.x * a.tiles / gridDim.x; tile < last; ++tile) {
    const Slots slots = slots_of(tile, a.map.tokens, a.rows ? a.map.steps : 0);
    const auto inputs = step.load(slots);
    const uint32_t live = live_items(a.mask, slots);
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
