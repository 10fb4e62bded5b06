// Kernels of token_logprobs: one warp per slice of a row (softmax.cuh), in any order on any warp.
// On sm_90 and later a warp's next slices stream through shared memory while it works on one.
#pragma once

#include "softmax.cuh"

namespace ppo::cuda {

constexpr int kRingStages = 3;

PPO_HOST_DEVICE int ring_barrier_bytes(int warps) {
  return (warps * kRingStages * int(sizeof(Mbarrier)) + 127) / 128 * 128;
}
// Bytes of all rings of a block; stage_bytes is a multiple of 16.
PPO_HOST_DEVICE size_t ring_bytes(int warps, int stage_bytes) {
  return size_t(ring_barrier_bytes(warps)) + size_t(warps) * kRingStages * size_t(stage_bytes);
}

// Ring buffer of a warp's slices in shared memory, in the order of their fetches.
template <class T>
class SliceRing {
 public:
  // Takes this warp's ring in the block's shared memory: the barriers of all warps first, then
  // their stages. Touches nothing unless `used`.
  PPO_DEVICE SliceRing(int stage_bytes, bool used)
      : bars_(shared_memory<Mbarrier>() + warp_id() * kRingStages),
        memory_(shared_memory<unsigned char>() + ring_barrier_bytes(int(blockDim.x) / kWarp) +
                warp_id() * kRingStages * stage_bytes),
        stage_bytes_(stage_bytes) {
    if (!used) return;
    if (lane_id() == 0) {
      for (int i = 0; i < kRingStages; ++i) mbarrier_init(&bars_[i], 1);
      fence_mbarrier_init();
    }
    __syncwarp();
  }

  // Starts to copy row[first, end). The 16-byte vectors at its ends are copied whole: they hold
  // elements of the row, so they can be read. At most kRingStages slices are in the ring.
  PPO_DEVICE void fetch(const T* row, int first, int end) {
    __syncwarp();
    if (lane_id() == 0) {
      const auto from = reinterpret_cast<uintptr_t>(row + first) / 16 * 16;
      const auto to = (reinterpret_cast<uintptr_t>(row + end) + 15) / 16 * 16;
      Mbarrier* bar = bars_ + fetched_ % kRingStages;
      mbarrier_arrive_expect(bar, unsigned(to - from));
      bulk_load(memory_ + fetched_ % kRingStages * stage_bytes_,
                reinterpret_cast<const void*>(from), unsigned(to - from), bar);
    }
    ++fetched_;
  }
  // Waits for the next slice; returns the address where row[0] would be.
  PPO_DEVICE T* take(const T* row, int first) {
    const int stage = taken_ % kRingStages;
    mbarrier_wait(bars_ + stage, unsigned(taken_ / kRingStages));
    ++taken_;
    const auto shift = reinterpret_cast<uintptr_t>(row + first) % 16;
    return reinterpret_cast<T*>(memory_ + stage * stage_bytes_ + shift) - first;
  }

 private:
  Mbarrier* bars_;
  unsigned char* memory_;
  int stage_bytes_, fetched_ = 0, taken_ = 0;
};

// Bulk-stores the slice from its ring buffer to `out`. Requires `out` and the source row to have
// the same offset from 16-byte alignment. The ring's memory is free again after lane 0's
// bulk_wait_read.
template <class T>
PPO_DEVICE void store_slice(T* out, const T* held, int first, int end) {
  constexpr int n = kPerVector<T>;
  int low = first + (n - phase_of(out + first)) % n, high = end - phase_of(out + end);
  if (low >= high) low = high = end;
  fence_async_proxy();
  __syncwarp();
  if (lane_id() == 0) {
    if (low < high) bulk_store(out + low, held + low, unsigned(high - low) * unsigned(sizeof(T)));
    bulk_commit();
  }
  for (int j = first + lane_id(); j < low; j += kWarp) out[j] = held[j];
  for (int j = high + lane_id(); j < end; j += kWarp) out[j] = held[j];
}

constexpr int kLogprobsThreads = 256, kLogprobsBlocks = 3;  // of a multiprocessor

// Rows [first, first + count) of the logits, cut into slices, and the assignment of slices to
// warps.
struct LogprobsRows : LogitsRows {
  int64_t first, count;
  int stage_bytes;  // of one slice in shared memory
  RowPlan plan;
  int run;  // consecutive slices of one row that a warp takes; a power of two
};

struct LogprobsForward {
  LogprobsRows rows;
  SoftmaxState* states;  // (count, slices)
  unsigned* done;        // (count,) zeros: slices of the row that are in `states`
  float *logprobs, *entropy, *row_max, *log_sum;  // (rows,) contiguous
};

// Inputs of the gradient, (rows,) each; absent ones are 0.
struct LogprobsUpstream {
  RowValues grad_logprobs, grad_entropy, entropy, row_max, log_sum;
};

struct LogprobsGradient {
  LogprobsRows rows;
  void* out;  // (rows, V), the logits themselves in place
  RowIndex out_at;
  const GradientTerms* terms;  // (count,)
};

// Run number n of this warp: slices [slice, slice + r.run) of a row.
struct SliceRun {
  int64_t row;  // in [0, count)
  int slice, first, end;
  bool exists;
};
PPO_DEVICE SliceRun run_at(const LogprobsRows& r, int64_t n) {
  const int per_block = int(blockDim.x) / kWarp, shift = __ffs(r.plan.slices) - __ffs(r.run);
  const int64_t index =
      n * (int64_t(gridDim.x) * per_block) + int64_t(blockIdx.x) * per_block + warp_id();
  const int slice = int(index & ((int64_t(1) << shift) - 1)) * r.run;
  const int first = slice * r.plan.length;
  return {index >> shift, slice, first, min(first + r.run * r.plan.length, r.vocab),
          (index >> shift) < r.count};
}

// Fetches of a warp's slices in the order of its runs, those of the rows that are `wanted`.
template <class T, class Wanted>
class SliceFetches {
 public:
  PPO_DEVICE SliceFetches(const LogprobsRows& r, SliceRing<T>& ring, const Wanted& wanted)
      : r_(r), ring_(ring), wanted_(wanted) {}

  // Fetches the next slice, if there is one; called by a whole warp.
  PPO_DEVICE void next() {
    while (first_ >= end_) {
      const SliceRun run = run_at(r_, runs_);
      if (!run.exists) return;
      ++runs_;
      if (!wanted_(run.row)) continue;
      row_ = r_.row<T>(r_.first + run.row);
      first_ = run.first;
      end_ = run.end;
    }
    ring_.fetch(row_, first_, min(first_ + r_.plan.length, end_));
    first_ += r_.plan.length;
  }

 private:
  const LogprobsRows& r_;
  SliceRing<T>& ring_;
  const Wanted wanted_;
  const T* row_ = nullptr;
  int64_t runs_ = 0;
  int first_ = 0, end_ = 0;
};

// Whether this warp's `run` states were the last of its row; if so the count is reset and the
// other states can be read.
PPO_DEVICE bool completes_row(unsigned* done, int run, int slices) {
  int last = 0;
  if (lane_id() == 0) {
    __threadfence();
    last = atomicAdd(done, unsigned(run)) == unsigned(slices - run);
    if (last) *done = 0;
    __threadfence();
  }
  last = __shfl_sync(kAllLanes, last, 0);
  __syncwarp();
  return last != 0;
}

template <class T>
PPO_DEVICE void store_outcome(const LogprobsForward& a, int64_t row, const SoftmaxState& state) {
  const LogprobsRows& r = a.rows;
  const int64_t label = r.tokens.integer(row);
  const bool legal = label >= 0 && label < r.vocab;
  const float label_logit = legal ? widen(r.row<T>(row)[label]) : 0.f;
  const Outcome o = outcome(state, label_logit, r.inv_temperature_at(row), legal);
  a.logprobs[row] = o.logprob;
  a.entropy[row] = o.entropy;
  a.row_max[row] = o.max;
  a.log_sum[row] = o.log_sum;
}

template <class T, bool streamed>
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks)
    logprobs_forward_kernel(const __grid_constant__ LogprobsForward a) {
  const LogprobsRows& r = a.rows;
  const int slices = r.plan.slices;
  SliceRing<T> ring(r.stage_bytes, streamed);
  const auto live = [&](int64_t i) { return r.live(r.first + i); };
  SliceFetches<T, decltype(live)> fetches(r, ring, live);
  if (streamed) {
#pragma unroll 1
    for (int k = 0; k < kRingStages - 1; ++k) fetches.next();
  }
  for (int64_t n = 0;; ++n) {
    const SliceRun run = run_at(r, n);
    if (!run.exists) break;
    const int64_t row = r.first + run.row;
    if (!r.live(row)) {
      if (run.slice == 0 && lane_id() == 0) {
        a.logprobs[row] = a.entropy[row] = a.row_max[row] = a.log_sum[row] = 0.f;
      }
      continue;
    }
    const T* const logits = r.row<T>(row);
    const float inv_temperature = r.inv_temperature_at(row);
    SoftmaxState* const states = a.states + run.row * slices;
    SoftmaxState state;
    int slice = run.slice;
    for (int first = run.first; first < run.end; first += r.plan.length) {
      const T* from = logits;
      if (streamed) {
        fetches.next();
        from = ring.take(logits, first);
      }
      state = slice_state(from, first, min(first + r.plan.length, run.end), inv_temperature);
      if (slices > 1 && lane_id() == 0) states[slice] = state;
      ++slice;
    }
    if (slices > 1) {
      if (!completes_row(a.done + run.row, r.run, slices)) continue;
      state = merged(states, slices);
    }
    if (lane_id() == 0) store_outcome<T>(a, row, state);
  }
}

// Gradient terms of every row, one thread each: the label's logit is read before anything is
// overwritten in place.
template <class T>
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks)
    logprobs_terms_kernel(const __grid_constant__ LogprobsRows r,
                          const __grid_constant__ LogprobsUpstream up, GradientTerms* terms) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = r.first + i;
  if (i >= r.count) return;
  GradientTerms t{};
  t.zero = true;
  if (r.live(row)) {
    const int64_t label = r.tokens.integer(row);
    const bool legal = label >= 0 && label < r.vocab;
    const float label_logit = legal ? widen(r.row<T>(row)[label]) : 0.f;
    const float g = up.grad_logprobs ? up.grad_logprobs.number(row) : 0.f;
    const float h = up.grad_entropy ? up.grad_entropy.number(row) : 0.f;
    const Outcome o{true, up.row_max.number(row), up.log_sum.number(row), 0.f,
                    up.entropy.number(row)};
    t = gradient_terms(g, h, o, label, label_logit, r.inv_temperature_at(row), legal);
  }
  terms[i] = t;
}

template <class T, bool streamed>
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks)
    logprobs_gradient_kernel(const __grid_constant__ LogprobsGradient a) {
  const LogprobsRows& r = a.rows;
  const auto out_row = [&](int64_t i) { return static_cast<T*>(a.out) + a.out_at.offset(i); };
  // Streamed slices are stored in 16-byte units, so input and output rows must share their
  // alignment.
  const auto together = [&](int64_t i) { return phase_of(r.row<T>(i)) == phase_of(out_row(i)); };
  SliceRing<T> ring(r.stage_bytes, streamed);
  const auto wanted = [&](int64_t i) { return !a.terms[i].zero && together(r.first + i); };
  SliceFetches<T, decltype(wanted)> fetches(r, ring, wanted);
  if (streamed) {
#pragma unroll 1
    for (int k = 0; k < kRingStages - 1; ++k) fetches.next();
  }
  for (int64_t n = 0;; ++n) {
    const SliceRun run = run_at(r, n);
    if (!run.exists) break;
    const int64_t row = r.first + run.row;
    const GradientTerms t = a.terms[run.row];
    const T* logits = r.row<T>(row);
    T* out = out_row(row);
    if (t.zero) {
      write_zeros<Memory::global>(out, run.first, run.end, lane_id(), kWarp);
      continue;
    }
    if (streamed && together(row)) {
      for (int first = run.first; first < run.end; first += r.plan.length) {
        const int end = min(first + r.plan.length, run.end);
        T* held = ring.take(logits, first);
        write_gradient<Memory::shared, Memory::shared>(held, held, first, end, t, lane_id(), kWarp,
                                                       [] {});
        // The next fetch takes the memory that the last slice was stored from.
        if (lane_id() == 0) bulk_wait_read<0>();
        fetches.next();
        store_slice(out, held, first, end);
      }
    } else {
      write_gradient<Memory::global, Memory::global>(logits, out, run.first, run.end, t, lane_id(),
                                                     kWarp, [] {});
    }
  }
  if (streamed && lane_id() == 0) bulk_wait_read<0>();
}

// Gradient half as wide as its logits, in their place: a block takes a row, whose stores overlap
// columns that it has read, but never another row.
__global__ void __launch_bounds__(kLogprobsThreads, kLogprobsBlocks)
    logprobs_bf16_gradient_kernel(const __grid_constant__ LogprobsGradient a) {
  const LogprobsRows& r = a.rows;
  for (int64_t i = blockIdx.x; i < r.count; i += gridDim.x) {
    const GradientTerms t = a.terms[i];
    const int64_t row = r.first + i;
    bf16* out = static_cast<bf16*>(a.out) + a.out_at.offset(row);
    const int thread = int(threadIdx.x), threads = int(blockDim.x);
    if (t.zero) {
      write_zeros<Memory::global>(out, 0, r.vocab, thread, threads);
    } else {
      write_gradient<Memory::global, Memory::global>(r.row<float>(row), out, 0, r.vocab, t, thread,
                                                     threads, [] { __syncthreads(); });
    }
  }
}

}  // namespace ppo::cuda
