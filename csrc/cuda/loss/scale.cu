// ppo_fast::scaled.cuda and scaled_.cuda: gradients times the number that a backward brings. No
// other device has the op, so its arguments are read here.
#include <algorithm>

#include "../device/launch.h"
#include "scale.cuh"

namespace ppo::cuda {
namespace {

constexpr char kOp[] = "scaled";

// Fills `out`: the gradients themselves, or like them.
void scale_into(const Tensor& grads, const Tensor& factor, const OptTensor& scale,
                const Tensor& out) {
  const auto sizes = grads.sizes(), strides = grads.strides();
  const size_t rank = sizes.size();
  PPO_CHECK(rank == 0 || sizes[rank - 1] <= 1 || strides[rank - 1] == 1, kOp,
            "the last dimension must be contiguous");
  PPO_CHECK(factor.sizes().size() == 0, kOp, "factor must be 0-d");
  PPO_CHECK(!scale || scale->sizes().size() == 0, kOp, "scale must be 0-d");
  if (grads.numel() == 0) return;
  const Device device(grads);
  const size_t lead = rank == 0 || (grads.is_contiguous() && out.is_contiguous()) ? 0 : rank - 1;
  ScaleArgs a{};
  a.x = grads.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.x_at = RowIndex(sizes, strides, lead);
  a.out_at = RowIndex(sizes, out.strides(), lead);
  a.rows = a.x_at.rows();
  a.cols = grads.numel() / a.rows;
  a.factor = scalar_of(factor, 1.0);
  a.scale = scalar_of(scale, 1.0);
  a.in_place = a.out == a.x;
  for_dtype(dtype_of(grads), [&](auto item) {
    using T = decltype(item);
    constexpr int64_t tile = kScaleTileBytes / int64_t(sizeof(T));
    a.tiles = (a.cols + tile - 1) / tile;
    const unsigned blocks = unsigned(std::min(a.rows * a.tiles, kScaleBlocks));
    launch("scale_kernel", scale_kernel<T>,
           {dim3(blocks), dim3(kScaleThreads), 0, 1, device.stream()}, a);
  });
}

Tensor scaled(Tensor grads, Tensor factor, OptTensor scale) {
  const Tensor out = empty_on(grads, grads.sizes(), grads.scalar_type());
  scale_into(grads, factor, scale, out);
  return out;
}

void scaled_inplace(Tensor grads, Tensor factor, OptTensor scale) {
  scale_into(grads, factor, scale, grads);
}

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("scaled.cuda", TORCH_BOX(&ppo::cuda::scaled));
  m.impl("scaled_.cuda", TORCH_BOX(&ppo::cuda::scaled_inplace));
}
