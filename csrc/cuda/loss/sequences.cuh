// Sequences of a loss: their flat slots, the count of those with an unmasked token, and the terms
// that their tokens need.
#pragma once

#include "../device/math.cuh"
#include "../device/reduce.cuh"
#include "../device/tokens.cuh"

namespace ppo::cuda {

// Flat slots of every sequence: rows of `steps` slots, or [offsets[s], offsets[s + 1]) if there
// are offsets. Offsets are not checked; those beyond the tokens count as the end of the tokens.
struct SequenceMap {
  const void* offsets;
  DType dtype;
  int64_t stride;  // of the offsets
  int64_t count, steps, tokens;

  PPO_DEVICE int64_t offset(int64_t s) const {
    const int64_t at = read_index(offsets, dtype, s * stride);
    return at < 0 ? 0 : at < tokens ? at : tokens;
  }
  PPO_DEVICE int64_t begin(int64_t s) const { return offsets ? offset(s) : s * steps; }
  PPO_DEVICE int64_t end(int64_t s) const { return offsets ? offset(s + 1) : (s + 1) * steps; }

  // Sequence of a slot: the last one that starts at `slot` or before, the only one of those that
  // is not empty. Called by whole warps, which halve the range five times per step.
  PPO_DEVICE int64_t find(int64_t slot) const {
    if (!offsets) return slot / steps;
    int64_t found = 0;
    for (int64_t left = count; left > 1;) {
      const int64_t step = (left + kWarp - 1) / kWarp, mine = lane_id() * step;
      const bool before = mine < left && offset(found + (mine < left ? mine : 0)) <= slot;
      const int last = __popc(__ballot_sync(kAllLanes, before)) - 1;
      const int64_t skipped = (last > 0 ? last : 0) * step;
      found += skipped;
      left = left - skipped < step ? left - skipped : step;
    }
    return found;
  }
  // The same for any thread, searching from a sequence that starts at `slot` or before; packed
  // sequences only.
  PPO_DEVICE int64_t find_from(int64_t s, int64_t slot) const {
    while (s + 1 < count && offset(s + 1) <= slot) ++s;
    return s;
  }
};

// Unmasked slots of a tile: kTile bits in shared memory.
constexpr int kTileWords = kTile / 32;
static_assert(kTileWords == kWarp, "one ballot of a warp finds the words that are not 0");

class TileBits {
 public:
  // Called by all threads of the block; bit k of `live` is slot 4 * thread + k.
  PPO_DEVICE TileBits(uint32_t* words, uint32_t live) : words_(words) {
    uint32_t word = live << (threadIdx.x % 8 * kItems);
#pragma unroll
    for (int by = 1; by < 8; by *= 2) word |= __shfl_xor_sync(kAllLanes, word, by);
    if (threadIdx.x % 8 == 0) words[threadIdx.x / 8] = word;
    __syncthreads();
    some_ = __ballot_sync(kAllLanes, words[lane_id()] != 0);
  }
  // Whether one of the slots [first, last) is unmasked.
  PPO_DEVICE bool any(int64_t first, int64_t last) const {
    if (first >= last) return false;
    const int a = int(first) / 32, b = int(last - 1) / 32;
    const uint32_t from = ~0u << (int(first) % 32), to = ~0u >> (31 - int(last - 1) % 32);
    if (a == b) return (words_[a] & from & to) != 0;
    const uint32_t between = (~0u << a << 1) & ~(~0u << b);
    return ((words_[a] & from) | (words_[b] & to) | (some_ & between)) != 0;
  }

 private:
  const uint32_t* words_;
  uint32_t some_;
};

// Facts about the sequences that cross the ends of a range of slots.
enum SequenceFlag : int {
  kHeadLive = 1,  // the sequence that began before has an unmasked token here
  kStarts = 2,    // the last slot's sequence began here
  kOpen = 4,      // that sequence continues after the range and has no unmasked token yet
};

// Flags of two adjacent ranges as one range. The caller counts the open sequence of the first
// whose first unmasked token is in the second.
PPO_DEVICE int join_flags(int before, int after) {
  const int head = (before & kHeadLive) | (before & kStarts ? 0 : after & kHeadLive);
  if (after & kStarts) return head | (after & (kStarts | kOpen));
  const bool open = (before & kOpen) && !(after & kHeadLive);
  return head | (before & kStarts) | (open ? kOpen : 0);
}

// Number of sequences, of those from `first` to `last` over the slots [start, end) of one tile,
// that begin here and have an unmasked token here; distributed over the threads.
PPO_DEVICE int live_starts(const SequenceMap& map, const TileBits& bits, int64_t start,
                           int64_t end, int64_t first, int64_t last) {
  int live = 0;
  for (int64_t s = first + threadIdx.x; s <= last; s += blockDim.x) {
    const int64_t a = map.begin(s), b = map.end(s);
    live += a >= start && a < b && bits.any(a - start, (b < end ? b : end) - start);
  }
  return live;
}
PPO_DEVICE int edge_flags(const SequenceMap& map, const TileBits& bits, int64_t start, int64_t end,
                          int64_t first, int64_t last) {
  const int64_t begin = map.begin(last), head_end = map.end(first);
  const bool starts = begin >= start;
  const bool live = starts && bits.any(begin - start, end - start);
  const bool head =
      map.begin(first) < start && bits.any(0, (head_end < end ? head_end : end) - start);
  return (head ? kHeadLive : 0) | (starts ? kStarts : 0) |
         (starts && !live && map.end(last) > end ? kOpen : 0);
}

// Terms of a sequence: the weight of its tokens and, where the ratio is the sequence's, that ratio
// and whether its log-ratio is clamped.
struct SequenceTerm {
  float weight, ratio;
  bool held;
};

struct SequenceTermsArgs {
  SequenceMap map;
  Column mask, now, old;  // now and old: null if no ratios are needed
  RowValues weights;      // (S,), false if absent
  bool means;             // tokens weigh 1 / tokens of their sequence, else 1
  float d_min, d_max;
  int lanes;  // threads of a sequence: a warp's or the block's
  SequenceTerm* terms;
};

constexpr int kSequenceSteps = 4;  // loads of a thread under way

// Count of tokens, and the sum of their log-ratios in double, so that the position of padding does
// not survive rounding.
struct SequenceSums {
  double tokens = 0.0, d = 0.0;
};

PPO_DEVICE SequenceSums sequence_sums(const SequenceTermsArgs& a, int64_t s, int lane) {
  SequenceSums sums;
  const int64_t end = a.map.end(s);
  const auto at = [s](const Column& c, int64_t slot) { return slot * c.stride + s * c.skip; };
  for (int64_t slot = a.map.begin(s) + lane; slot < end; slot += kSequenceSteps * a.lanes) {
    float d[kSequenceSteps] = {};
    bool live[kSequenceSteps];
#pragma unroll
    for (int k = 0; k < kSequenceSteps; ++k) {
      const int64_t i = slot + k * a.lanes;
      live[k] = i < end;
      if (!live[k]) continue;
      if (a.mask.data) live[k] = static_cast<const uint8_t*>(a.mask.data)[at(a.mask, i)] != 0;
      if (a.old.data) {
        d[k] = read_float(a.now.data, a.now.dtype, at(a.now, i)) -
               read_float(a.old.data, a.old.dtype, at(a.old, i));
      }
    }
#pragma unroll
    for (int k = 0; k < kSequenceSteps; ++k) {
      sums.tokens += live[k];
      sums.d += live[k] ? double(d[k]) : 0.0;
    }
  }
  return sums;
}

template <class = void>
__global__ void __launch_bounds__(kTokenThreads)
    sequence_terms_kernel(const __grid_constant__ SequenceTermsArgs a) {
  double* scratch = shared_memory<double>();
  const bool alone = a.lanes == kWarp;  // a warp for every sequence
  const int64_t s =
      alone ? int64_t(blockIdx.x) * (kTokenThreads / kWarp) + warp_id() : int64_t(blockIdx.x);
  SequenceSums sums;
  if (s < a.map.count) sums = sequence_sums(a, s, int(threadIdx.x) % a.lanes);
  if (alone) {
    sums.tokens = warp_sum(sums.tokens);
    sums.d = warp_sum(sums.d);
  } else {
    sums.tokens = block_sum(sums.tokens, scratch);
    sums.d = block_sum(sums.d, scratch + kTokenThreads / kWarp);
  }
  if (s >= a.map.count || threadIdx.x % a.lanes != 0) return;
  const double n = sums.tokens > 0.0 ? sums.tokens : 1.0;
  const double own = a.weights ? double(a.weights.number(s)) : 1.0;
  const float mean = float(sums.d / n);
  a.terms[s] = {float(a.means ? own / n : own), exp_parts(clamp(mean, a.d_min, a.d_max)).exp,
                mean < a.d_min || mean > a.d_max};
}

}  // namespace ppo::cuda
