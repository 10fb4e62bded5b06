// A warp's slices of rows, streamed through its own part of the block's shared memory (sm_90).
#pragma once

#include "../device/async.cuh"
#include "softmax.cuh"

namespace ppo::cuda {

constexpr int kRingStages = 3;

PPO_HOST_DEVICE int ring_barrier_bytes(int warps) {
  return (warps * kRingStages * int(sizeof(Mbarrier)) + 127) / 128 * 128;
}
// Stages of a multiple of 16 bytes.
PPO_HOST_DEVICE size_t ring_bytes(int warps, int stage_bytes) {
  return size_t(ring_barrier_bytes(warps)) + size_t(warps) * kRingStages * size_t(stage_bytes);
}

// A warp's slices on their way through shared memory, in the order they were fetched.
template <class T>
class SliceRing {
 public:
  // This warp's ring in the block's shared memory: all warps' barriers first, then their stages.
  // Unless `used` it touches nothing.
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

  // Start to copy row[first, end). The 16 bytes around its ends come along: they hold elements of
  // the row, so they are there to be read. At most kRingStages are fetched and not yet dropped.
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
  // The next one, when it has arrived: where row[0] would stand.
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

// Write held[first, end), which the warp has put where the ring's copy of it stood, to out; `out`
// and the row that was fetched start at the same distance from 16 bytes. The ring's memory is free
// again after lane 0's bulk_wait_read.
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

}  // namespace ppo::cuda
