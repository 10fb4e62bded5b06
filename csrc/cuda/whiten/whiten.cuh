// Kernels of masked moments, and of whitening by given moments.
#pragma once

#include "../device/reduce.cuh"
#include "../device/tokens.cuh"

namespace ppo::cuda {

// Most blocks: more than run at a time would only make more parts to merge.
constexpr int64_t kMomentBlocks = 256, kWhitenBlocks = 1024;

struct MomentsArgs {
  Column x, mask;
  int64_t total, cols, tiles;  // cols: 0 where no column wants row numbers
  Moments* parts;
  double* out;
  unsigned* counter;
};

template <class = void>
__global__ void __launch_bounds__(kTokenThreads, 1)  // else ptxas chooses and spills for sm_80
    moments_kernel(const __grid_constant__ MomentsArgs a) {
  auto* scratch = shared_memory<ShiftedSums>();
  MomentSum sum;
  const int64_t last = (blockIdx.x + 1) * a.tiles / gridDim.x;
  for (int64_t tile = blockIdx.x * a.tiles / gridDim.x; tile < last; ++tile) {
    const Slots slots = slots_of(tile, a.total, a.cols);
    const Raw raw = load_raw(a.x, slots);
    const uint32_t live = live_items(a.mask, slots);
    const Values x = values_of(a.x, slots, raw);
#pragma unroll
    for (int k = 0; k < kItems; ++k) sum.add(x.at[k], (live >> k & 1u) != 0);
  }
  const Moments mine = block_moments(sum.result(), scratch);
  leave_moments(mine, blockIdx.x, gridDim.x, a.parts, a.out, a.counter, scratch);
}

struct WhitenArgs {
  Column x, mask;
  int64_t total, cols, tiles;  // cols: as above
  const double* moments;       // count, mean, M2, `moments_stride` apart
  int64_t moments_stride;
  bool shift_mean, unbiased, eps_at_std;
  double eps;
  float* out;  // contiguous
};

// Constants of y = ((x - high) - low) * scale + add. The mean is in two parts, because rounding it
// once would shift every element alike. Without a variance y = add.
struct Whitening {
  float high, low, scale, add;
  bool flat;
};

PPO_DEVICE Whitening whitening(const WhitenArgs& a) {
  const double mean = a.moments[a.moments_stride], n = a.moments[0];
  const double free = a.unbiased ? n - 1.0 : n;
  const double var = free > 0.0 ? a.moments[2 * a.moments_stride] / free : 0.0;
  const double scale = a.eps_at_std ? 1.0 / (sqrt(var) + a.eps) : 1.0 / sqrt(var + a.eps);
  const float high = float(mean);
  return {high, float(mean - double(high)), float(scale), a.shift_mean ? 0.f : high, var == 0.0};
}

template <class = void>
__global__ void __launch_bounds__(kTokenThreads)
    whiten_kernel(const __grid_constant__ WhitenArgs a) {
  auto* shared = shared_memory<Whitening>();
  if (threadIdx.x == 0) *shared = whitening(a);  // double divisions: once a block
  __syncthreads();
  const Whitening w = *shared;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const Slots slots = slots_of(tile, a.total, a.cols);
    const Raw raw = load_raw(a.x, slots);
    const uint32_t live = live_items(a.mask, slots);
    const Values x = values_of(a.x, slots, raw);
    float y[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const float d = (x.at[k] - w.high) - w.low;
      y[k] = live >> k & 1u ? w.flat ? w.add : fmaf(d, w.scale, w.add) : 0.f;
    }
    store_items(a.out, true, slots, y);
  }
}

}  // namespace ppo::cuda
