// Kernel of gradients times the number that a backward brings.
#pragma once

#include "../device/tensor.cuh"

namespace ppo::cuda {

constexpr int kScaleThreads = 256;
// Bytes of a row that a block takes at a time: two vectors a thread.
constexpr int kScaleTileBytes = 2 * 16 * kScaleThreads;
// Most blocks. Where the factor is 1 a block does nothing but load it, so there are few.
constexpr int64_t kScaleBlocks = 1056;

struct ScaleArgs {
  const void* x;  // (rows, cols), contiguous in a row
  void* out;      // the same shape: x itself in place
  RowIndex x_at, out_at;
  int64_t rows, cols, tiles;  // tiles: of a row
  ScalarArg factor, scale;    // scale: 1 where absent
  bool in_place;
};

// `count` columns of a row times the factor, in whole vectors where both rows allow. Plain
// accesses of a vector would be taken apart by the compiler for sm_80 and sm_90.
template <class T>
PPO_DEVICE void scale_tile(const T* x, T* out, int64_t count, float factor) {
  constexpr int n = kPerVector<T>;
  const bool wide =
      reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int64_t vectors = wide ? count / n : 0;
#pragma unroll 2
  for (int64_t v = threadIdx.x; v < vectors; v += kScaleThreads) {
    float y[n];
    unpack<T>(__ldcs(reinterpret_cast<const uint4*>(x + v * n)), y);
#pragma unroll
    for (int k = 0; k < n; ++k) y[k] *= factor;
    __stcs(reinterpret_cast<uint4*>(out + v * n), pack<T>(y));
  }
  for (int64_t j = vectors * n + threadIdx.x; j < count; j += kScaleThreads) {
    out[j] = narrow<T>(widen(x[j]) * factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const __grid_constant__ ScaleArgs a) {
  const float factor = float(read(a.factor)) * float(read(a.scale));
  if (a.in_place && factor == 1.f) return;
  constexpr int64_t tile = kScaleTileBytes / int(sizeof(T));
  for (int64_t task = blockIdx.x; task < a.rows * a.tiles; task += gridDim.x) {
    const int64_t row = a.rows == 1 ? 0 : task / a.tiles, first = (task - row * a.tiles) * tile;
    const int64_t left = a.cols - first;
    scale_tile<T>(static_cast<const T*>(a.x) + a.x_at.offset(row) + first,
                  static_cast<T*>(a.out) + a.out_at.offset(row) + first, left < tile ? left : tile,
                  factor);
  }
}

}  // namespace ppo::cuda
