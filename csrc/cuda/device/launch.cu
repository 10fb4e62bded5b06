// Device of launch.h: its limits, stream and counters.
#include <cstdlib>
#include <map>
#include <mutex>

#include "launch.h"

namespace ppo::cuda {

#ifdef PPO_EMULATE

Device::Device(const Tensor& main) { STD_TORCH_CHECK(main.is_cpu(), "emulated: CPU tensors"); }

int Device::capability() const {
  const char* asked = std::getenv("PPO_FAST_CUDA_EMULATE");
  return asked && std::atoi(asked) >= 80 ? std::atoi(asked) : 90;
}
int Device::multiprocessors() const { return 2; }

unsigned* Device::counters(unsigned n) const {
  STD_TORCH_CHECK(n <= kMaxCounters && n <= emulate::kCounters, "ppo_fast: too many counters");
  return emulate::counters();
}

#else

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Limits of a device, looked up once.
struct Limits {
  int capability, multiprocessors;
};
const Limits& limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const int count = attribute(cudaDevAttrMultiProcessorCount, device);
  return known[device] = {10 * major + minor, count};
}

// Zeroed device memory, handed out in pieces and never taken back: the rest of the current slab of
// one device, and the pieces of its streams.
struct Slab {
  unsigned* free = nullptr;
  size_t left = 0;
  std::map<cudaStream_t, unsigned*> of_stream;
};

// New zeroed memory. Capture of another stream must not forbid this: nothing here belongs to a
// graph.
unsigned* zeroed(size_t n) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  cudaStream_t own = nullptr;
  STD_CUDA_CHECK(cudaMalloc(&memory, n * sizeof(unsigned)));
  STD_CUDA_CHECK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
  STD_CUDA_CHECK(cudaMemsetAsync(memory, 0, n * sizeof(unsigned), own));
  STD_CUDA_CHECK(cudaStreamSynchronize(own));
  STD_CUDA_CHECK(cudaStreamDestroy(own));
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  return static_cast<unsigned*>(memory);
}

unsigned* take(Slab& slab, size_t n) {
  constexpr size_t kSlab = 4 * Device::kMaxCounters;
  if (slab.left < n) {
    slab.free = zeroed(kSlab);
    slab.left = kSlab;
  }
  unsigned* out = slab.free;
  slab.free += n;
  slab.left -= n;
  return out;
}

}  // namespace

Device::Device(const Tensor& main)
    : guard_(main.get_device_index()), index_(main.get_device_index()) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

int Device::capability() const { return limits_of(index_).capability; }
int Device::multiprocessors() const { return limits_of(index_).multiprocessors; }

unsigned* Device::counters(unsigned n) const {
  STD_TORCH_CHECK(n <= kMaxCounters, "ppo_fast: too many counters");
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &capture));
  static std::mutex mutex;
  static std::map<int, Slab> slabs;
  const std::lock_guard<std::mutex> lock(mutex);
  Slab& slab = slabs[index_];
  // A graph may be replayed on any stream, concurrently with that stream's own launches.
  if (capture != cudaStreamCaptureStatusNone) return take(slab, n);
  unsigned*& found = slab.of_stream[stream_];
  if (!found) found = take(slab, kMaxCounters);
  return found;
}

#endif

}  // namespace ppo::cuda
