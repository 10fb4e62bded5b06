// Host side of every CUDA op: the device of a call, launches, outputs and workspace. Emulated, the
// "device" is the CPU and a launch runs the kernel's threads as fibers.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "../../tensor/views.h"
#include "tensor.cuh"

namespace ppo::cuda {

#ifdef PPO_EMULATE
constexpr bool kEmulated = true;  // plans take the fewest threads: each is a fiber
using Stream = void*;
#else
constexpr bool kEmulated = false;
using Stream = cudaStream_t;
#endif

// Device and current stream of a tensor; current while this object lives.
class Device {
 public:
  explicit Device(const Tensor& main);
  Stream stream() const { return stream_; }
  int index() const { return index_; }
  int capability() const;  // 80, 90, 100: major * 10 + minor
  int multiprocessors() const;
  // Number of clusters of a kernel that are resident at once.
  template <class Kernel>
  int clusters(Kernel kernel, unsigned threads, size_t shared_bytes, unsigned cluster) const;

  // Arrival counters of blocks: `n` zeros, at most kMaxCounters. Launches on one stream share
  // them, so a kernel leaves them at 0; a launch captured into a graph gets counters of its own.
  unsigned* counters(unsigned n) const;
  static constexpr unsigned kMaxCounters = 32768;

 private:
#ifndef PPO_EMULATE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  int index_ = 0;
  Stream stream_ = nullptr;
};

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;  // blocks of x that run together and see each other's shared memory
  Stream stream;
};

// 2-D view of a tensor on any device: (B, T) as it is, (N,) as one row, 0-d as 1 x 1.
inline View strided_view(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t rank = sizes.size();
  STD_TORCH_CHECK(rank <= 2, "ppo_fast: expected a rank of at most 2");
  View v{x.const_data_ptr(), dtype_of(x), 1, 1, 0, 0};
  if (rank >= 1) v.cols = sizes[rank - 1], v.col_stride = strides[rank - 1];
  if (rank == 2) v.rows = sizes[0], v.row_stride = strides[0];
  return v;
}

// A fresh contiguous tensor on main's device.
inline Tensor empty_on(const Tensor& main, Sizes sizes, ScalarType dtype) {
  return torch::stable::new_empty(main, sizes, dtype);
}

// Check: x has main's shape and device.
inline void check_beside(const Tensor& main, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(same_sizes(main, x) && x.is_cuda() == main.is_cuda() &&
                      x.get_device_index() == main.get_device_index(),
                  "ppo_fast::", op, ": shape or device of ", name);
}
inline void check_beside(const Tensor& main, const OptTensor& x, const char* op,
                         const char* name) {
  if (x) check_beside(main, *x, op, name);
}

// Checked view of a tensor with a number per row, of main's shape and device.
inline RowValues row_values(const char* op, const Tensor& main, const OptTensor& x,
                            const char* name) {
  check_beside(main, x, op, name);
  PPO_CHECK(!x || dtype_of(*x) == DType::f32 || dtype_of(*x) == DType::bf16 ||
                dtype_of(*x) == DType::f16,
            op, name);
  return RowValues(x);
}

// Calls f with a zero of the storage type; ops/ has refused every other dtype.
template <class Fn>
void for_dtype(DType dtype, const Fn& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::bf16) return f(bf16{});
  STD_TORCH_CHECK(dtype == DType::f16, "ppo_fast: the CUDA kernels take fp32, bf16 and fp16");
  f(fp16{});
}

#ifdef PPO_EMULATE
template <class Kernel>
int Device::clusters(Kernel, unsigned, size_t, unsigned) const {
  return 1;
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config,
            Args&&... args) {
  const std::tuple<std::decay_t<Params>...> values(std::forward<Args>(args)...);
  const emulate::Geometry geometry{name, config.grid, config.block, config.shared_bytes,
                                   config.cluster};
  emulate::run(geometry, [&] { std::apply(kernel, values); });
}
#else
// Launch request in the runtime's form. Shared memory beyond the default limit is requested first.
struct Request {
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t how{};

  template <class Kernel>
  Request(Kernel kernel, const LaunchConfig& config) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (config.shared_bytes > kWithoutAsking) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(config.shared_bytes)));
    }
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = config.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    how.gridDim = config.grid;
    how.blockDim = config.block;
    how.dynamicSmemBytes = config.shared_bytes;
    how.stream = config.stream;
    how.attrs = &cluster;
    how.numAttrs = config.cluster > 1 ? 1 : 0;
  }
  Request(const Request&) = delete;
};

template <class Kernel>
int Device::clusters(Kernel kernel, unsigned threads, size_t shared_bytes,
                     unsigned cluster) const {
  Request request(kernel, {dim3(cluster), dim3(threads), shared_bytes, cluster, stream_});
  request.how.numAttrs = 1;  // a cluster of one block is one too
  int n = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&n, kernel, &request.how));
  return n;
}

// Enqueues kernel(args...); `name` is for messages. A failed launch throws.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchConfig& config,
            Args&&... args) {
  const Request request(kernel, config);
  const cudaError_t status =
      cudaLaunchKernelEx(&request.how, kernel, Params(std::forward<Args>(args))...);
  STD_TORCH_CHECK(status == cudaSuccess, "ppo_fast: launching ", name, ": ",
                  cudaGetErrorString(status));
}
#endif

}  // namespace ppo::cuda

// The dispatch key that this folder's ops are registered for.
#ifdef PPO_EMULATE
#define PPO_CUDA_KEY CPU
#else
#define PPO_CUDA_KEY CUDA
#endif
