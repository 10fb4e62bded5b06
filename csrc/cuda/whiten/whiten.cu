// ppo_fast::moments.cuda and whiten.cuda: arguments and launches.
#include <algorithm>

#include "../../ops/whiten.h"
#include "../device/launch.h"
#include "whiten.cuh"

namespace ppo::cuda {
namespace {

constexpr char kOp[] = "whiten";

// Columns per row if a tensor is not flat, else 0: row numbers cost a division each.
int64_t cols_wanted(const TokenShape& shape, const Column& x, const Column& mask) {
  return x.skip != 0 || mask.skip != 0 ? shape.cols : 0;
}

struct WhitenOnCuda {
  static void check(const char* op, const Tensor& x, const OptTensor& mask) {
    check_beside(x, mask, op, "mask");
  }

  static Tensor moments(const Tensor& x, const OptTensor& mask) {
    const Device device(x);
    const TokenShape shape = token_shape(x, kOp);
    const unsigned blocks = unsigned(std::clamp<int64_t>(shape.tiles(), 1, kMomentBlocks));
    const Tensor parts = empty_on(x, {int64_t(blocks), 3}, ScalarType::Double);
    const Tensor out = empty_on(x, {3}, ScalarType::Double);
    MomentsArgs a{};
    a.x = column_of(x, shape);
    a.mask = column_of(mask, shape);
    a.total = shape.total();
    a.cols = cols_wanted(shape, a.x, a.mask);
    a.tiles = shape.tiles();
    a.parts = static_cast<Moments*>(parts.mutable_data_ptr());
    a.out = data<double>(out);
    a.counter = device.counters(1);
    launch("moments_kernel", moments_kernel<>,
           {dim3(blocks), dim3(kTokenThreads), sizeof(ShiftedSums) * kTokenThreads / kWarp, 1,
            device.stream()},
           a);
    return out;
  }

  static Tensor whiten(const Tensor& x, const OptTensor& mask, const Tensor& moments,
                       const WhitenOptions& o) {
    const Device device(x);
    const TokenShape shape = token_shape(x, kOp);
    const Tensor out = empty_on(x, x.sizes(), ScalarType::Float);
    if (shape.total() == 0) return out;
    WhitenArgs a{};
    a.x = column_of(x, shape);
    a.mask = column_of(mask, shape);
    a.total = shape.total();
    a.cols = cols_wanted(shape, a.x, a.mask);
    a.tiles = shape.tiles();
    a.moments = static_cast<const double*>(moments.const_data_ptr());
    a.moments_stride = moments.strides()[0];
    a.shift_mean = o.shift_mean;
    a.unbiased = o.unbiased;
    a.eps_at_std = o.eps_at_std;
    a.eps = o.eps;
    a.out = data<float>(out);
    const unsigned blocks = unsigned(std::min(a.tiles, kWhitenBlocks));
    launch("whiten_kernel", whiten_kernel<>,
           {dim3(blocks), dim3(kTokenThreads), sizeof(Whitening), 1, device.stream()}, a);
    return out;
  }
};

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("moments.cuda", TORCH_BOX(&ppo::moments<ppo::cuda::WhitenOnCuda>));
  m.impl("whiten.cuda", TORCH_BOX(&ppo::whiten<ppo::cuda::WhitenOnCuda>));
}
