// Kernel for long sequences. Either a block walks along a sequence, chunk by chunk with one tile
// per warp; or, for few sequences, every chunk has its own block and there are two launches: the
// first stores each chunk's map, the second applies the maps of the later chunks, from the last to
// the nearest.
#pragma once

#include "walk.cuh"

namespace ppo::cuda {

// Task of a block: a whole sequence (whole), or one chunk, of which it stores the map (maps) or to
// which it applies the stored maps of the later chunks (apply).
enum class Pass : int { whole, maps, apply };

template <bool kExtras>
struct BlockShared {
  NextValue next_values[kTiles];
  AffineMap<kExtras> totals[kTiles];
  Later later;
  int64_t last[kTiles];
  int first_live[kTiles], last_live[kTiles];
  ShiftedSums moments[kTiles];
};

// Number of chunks before sequence `seq`. With packing every sequence has room for one extra
// chunk, which saves a sum over the other sequences' lengths.
PPO_DEVICE int64_t chunks_before(const AdvantageArgs& args, int64_t seq) {
  if (args.chunks_each) return seq * args.chunks_each;
  return offset_at(args.seqs, seq) / kChunkSteps + seq;
}

// Work of a block: chunks [begin, end) of a sequence. `slot` is the index of the sequence's first
// chunk.
struct Work {
  Sequence span;
  int64_t slot, begin, end, chunks;
};

// Sequence of a chunk; called by all lanes of a warp.
PPO_DEVICE int64_t sequence_of_chunk(const AdvantageArgs& args, int64_t index) {
  if (args.chunks_each) return index / args.chunks_each;
  int64_t before = 0;
  for (int64_t first = 0; first < args.seqs.count; first += kWarp) {
    const int64_t seq = first + lane_id();
    const bool here = seq < args.seqs.count && chunks_before(args, seq) <= index;
    before += __popc(__ballot_sync(kAllLanes, here));
  }
  return before > 0 ? before - 1 : 0;
}

PPO_DEVICE Work work_of_block(const AdvantageArgs& args, bool whole) {
  const int64_t index = blockIdx.x;
  const int64_t seq = whole ? index : sequence_of_chunk(args, index);
  Work w;
  w.span = sequence_at(args.seqs, seq);
  w.chunks = (w.span.steps + kChunkSteps - 1) / kChunkSteps;
  w.slot = whole ? 0 : chunks_before(args, seq);
  w.begin = whole ? 0 : index - w.slot;
  w.end = whole ? w.chunks : w.begin + 1;
  if (w.begin < 0 || w.end > w.chunks) w.begin = w.end = 0;
  return w;
}

PPO_DEVICE int64_t last_live_in_block(const Steps& mask, const Sequence& span, int64_t* scratch) {
  constexpr int kRounds = 4;  // in flight together
  constexpr int64_t kStride = kRounds * kChunkSteps;
  for (int64_t begin = (span.steps - 1) / kStride * kStride; begin >= 0; begin -= kStride) {
    int64_t last = -1;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int64_t t = begin + i * kChunkSteps + int64_t(threadIdx.x) * kGroupSteps;
      const int64_t here = last_live_of_group(mask, span, t);
      last = here >= 0 ? here : last;
    }
    last = block_reduce(last, Max{}, scratch);
    if (last >= 0) return last;
    __syncthreads();
  }
  return -1;
}

// First, then last live step within chunks [begin, end) of a sequence, or -1; called by all lanes
// of a warp.
PPO_DEVICE int64_t first_live_of_chunks(const ChunkLive* live, int64_t begin, int64_t end) {
  for (; begin < end; begin += kWarp) {
    const int64_t c = begin + lane_id();
    const int step = c < end ? live[c].first : -1;
    const unsigned found = __ballot_sync(kAllLanes, step >= 0);
    const int64_t at =
        __shfl_sync(kAllLanes, c * kChunkSteps + step, found ? __ffs(int(found)) - 1 : 0);
    if (found) return at;
  }
  return -1;
}
PPO_DEVICE int64_t last_live_of_chunks(const ChunkLive* live, int64_t end) {
  for (; end > 0; end -= kWarp) {
    const int64_t c = end - 1 - lane_id();
    const int step = c >= 0 ? live[c].last : -1;
    const unsigned found = __ballot_sync(kAllLanes, step >= 0);
    const int64_t at =
        __shfl_sync(kAllLanes, c * kChunkSteps + step, found ? __ffs(int(found)) - 1 : 0);
    if (found) return at;
  }
  return -1;
}

// Value behind a chunk: that of the next step that moves the recurrence, or the bootstrap.
template <class Row>
PPO_DEVICE float next_behind(const AdvantageArgs& args, const Work& w, const Row& row) {
  const int64_t behind = w.end * kChunkSteps;
  int64_t step = behind < w.span.steps ? behind : -1;
  if (args.scouted && args.carry) {
    step = first_live_of_chunks(args.live + w.slot, w.end, w.chunks);
    if (step < 0 && row.slot >= behind) step = row.slot;
  }
  if (step < 0) return number_of(args.bootstrap, w.span, 0.f);
  const bool kept = load_flags<Dense::no>(args.mask, w.span, step, 1) != 0 || step == row.slot;
  float value[kGroupSteps];
  decode<Dense::no>(load_quad<Dense::no>(args.values, w.span, step, kept), args.values.dtype,
                    value);
  return value[0];
}

// State that enters a chunk from the n chunks behind it; maps[0] is the nearest. Called by a warp.
template <bool kExtras>
PPO_DEVICE Later fold_chunks(const AffineMap<kExtras>* maps, int64_t n) {
  Later later{0.f, 0.f};
  for (int64_t end = n; end > 0; end -= kWarp) {
    const int64_t i = end - 1 - lane_id();
    AffineMap<kExtras> mine;
    if (i >= 0) mine = maps[i];
#pragma unroll 4
    for (int lane = 0; lane < kWarp; ++lane) later = apply(of_lane(mine, lane), later);
  }
  return later;
}

// Map of the tiles behind this warp's in its chunk; `all` becomes the chunk's map.
template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> fold_tiles(const AffineMap<kExtras>* totals,
                                         AffineMap<kExtras>& all) {
  AffineMap<kExtras> behind;
  all = {};
#pragma unroll
  for (int tile = kTiles - 1; tile >= 0; --tile) {
    behind = select(tile == warp_id(), all, behind);
    all = compose(totals[tile], all);
  }
  return behind;
}

// Value behind this warp's tile. `next` enters as the value behind the chunk and leaves as the
// value behind the chunk before.
PPO_DEVICE float next_of_tile(const NextValue* next_values, float& next) {
  const unsigned any = __ballot_sync(kAllLanes, lane_id() < kTiles && next_values[lane_id()].any);
  const unsigned behind = any & (~1u << warp_id());
  const float mine = behind ? next_values[__ffs(int(behind)) - 1].value : next;
  next = any ? next_values[__ffs(int(any)) - 1].value : next;
  return mine;
}

// Processes one chunk and returns its map.
template <class Source, Pass kPass>
PPO_DEVICE AffineMap<Source::extras> take_chunk(const AdvantageArgs& args, const Sequence& span,
                                                int64_t t,
                                                const StepGroupOf<Source::extras>& group,
                                                float& next, const Later& later,
                                                MomentSum& moments,
                                                BlockShared<Source::extras>& shared) {
  const NextValue mine = next_value_of(group);
  const unsigned valued = lanes_with_value(mine, kWarp);
  const float value = first_value(valued, mine, 0.f);
  if (lane_id() == 0) shared.next_values[warp_id()] = {valued != 0, value};
  __syncthreads();
  const float after = next_of_tile(shared.next_values, next);
  const Suffixes<Source::extras> maps =
      recur(args, group, first_value(behind_this_lane(valued), mine, after));
  AffineMap<Source::extras> total = maps.of(0), chunk;
  const AffineMap<Source::extras> behind = scan_lanes(total, kWarp);
  if (lane_id() == 0) shared.totals[warp_id()] = total;
  __syncthreads();
  const AffineMap<Source::extras> tiles = fold_tiles(shared.totals, chunk);
  if constexpr (kPass != Pass::maps) {
    finish<Source::dense>(args, span, t, group, maps, apply(behind, apply(tiles, later)), moments);
  }
  return chunk;
}

template <class Source, Pass kPass>
PPO_DEVICE void walk_block(const Source& source, const Work& w, MomentSum& moments,
                           BlockShared<Source::extras>& shared) {
  constexpr bool kExtras = Source::extras;
  const AdvantageArgs& args = source.args.base;
  AffineMap<kExtras>* const left = static_cast<AffineMap<kExtras>*>(args.maps) + w.slot;
  int64_t last = -1;
  if constexpr (Source::needs_last) {
    last = kPass == Pass::whole ? last_live_in_block(args.mask, w.span, shared.last)
                                : last_live_of_chunks(args.live + w.slot, w.chunks);
  }
  const typename Source::Row row = source.open(w.span, last);
  int64_t t = (w.end - 1) * kChunkSteps + int64_t(threadIdx.x) * kGroupSteps;
  const int64_t begin = w.begin * kChunkSteps;
  StepGroups<Source> groups(source, row, w.span, t, begin, kChunkSteps);
  float next = next_behind(args, w, row);
  Later later{0.f, 0.f};
  if constexpr (kPass == Pass::apply) {
    if (warp_id() == 0) later = fold_chunks(left + w.end, w.chunks - w.end);
    if (threadIdx.x == 0) shared.later = later;
    __syncthreads();
    later = shared.later;
  }
  AffineMap<kExtras> chunk;
  for (; t >= begin; t -= kChunkSteps) {
    chunk =
        take_chunk<Source, kPass>(args, w.span, t, groups.take(t), next, later, moments, shared);
    later = apply(chunk, later);
  }
  if constexpr (kPass == Pass::maps) {
    if (threadIdx.x == 0) left[w.begin] = chunk;  // there was one
  }
}

template <class Source, Pass kPass>
__global__ void __launch_bounds__(kRowThreads, Source::resident)
    advantage_blocks_kernel(const __grid_constant__ typename Source::Args args) {
  auto& shared = *shared_memory<BlockShared<Source::extras>>();
  const Work w = work_of_block(args.base, kPass == Pass::whole);
  MomentSum moments;
  if (w.begin < w.end) walk_block<Source, kPass>(Source{args}, w, moments, shared);
  if constexpr (kPass != Pass::maps) leave(args.base, moments, shared.moments);
}

// First and last live step of every chunk, for the two passes.
static __global__ void __launch_bounds__(kRowThreads)
    chunk_live_kernel(const __grid_constant__ AdvantageArgs args) {
  auto& shared = *shared_memory<BlockShared<false>>();
  const Work w = work_of_block(args, false);
  if (w.begin == w.end) return;
  const int here = int(threadIdx.x) * kGroupSteps;
  const int64_t t = w.begin * kChunkSteps + here;
  const unsigned bits = flag_bits(load_flags<Dense::no>(args.mask, w.span, t, w.span.exist(t)));
  const int first = bits ? here + __ffs(int(bits)) - 1 : kChunkSteps;
  const int last = bits ? here + 31 - __clz(int(bits)) : -1;
  const int lowest = block_reduce(first, Min{}, shared.first_live);
  const int highest = block_reduce(last, Max{}, shared.last_live);
  if (threadIdx.x == 0) {
    args.live[w.slot + w.begin] = {lowest < kChunkSteps ? lowest : -1, highest};
  }
}

}  // namespace ppo::cuda
