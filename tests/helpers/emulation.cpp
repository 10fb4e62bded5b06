// Kernels for tests/backends/test_cuda_emulation.py: what the emulated device must get right, and
// what it must find. Each writes floats to `out`; the message of an exception goes to `said`.
#include <cstring>
#include <map>
#include <stdexcept>

#include "../../csrc/cuda/device/reduce.cuh"

namespace {

using namespace ppo::cuda;
using ppo::emulate::Geometry;

// --- right ones
void sums(float* out) {
  const float x = float(threadIdx.x + 1);
  const float all = block_sum(x, shared_memory<float>());
  out[blockIdx.x * blockDim.x + threadIdx.x] = all;
}
void shuffles(float* out) {
  const int lane = lane_id();
  const float up = __shfl_up_sync(kAllLanes, float(lane), 1);
  const float down = __shfl_down_sync(kAllLanes, float(lane), 3);
  const float from = __shfl_sync(kAllLanes, float(lane), 5, 8);
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  out[lane] = up + 100 * down + 10000 * from + (odd == 0xaaaaaaaau ? 0.5f : 0.f);
}
void last_block(float* out) {
  out[1 + blockIdx.x] = float(blockIdx.x + 1);
  if (!arrives_last(ppo::emulate::counters(), gridDim.x)) return;
  float all = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) all += out[1 + i];
  out[0] = all;
}
void neighbours(float* out) {
  float* mine = shared_memory<float>();
  if (threadIdx.x == 0) *mine = float(cluster_rank() + 1);
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  if (threadIdx.x == 0) out[blockIdx.x] = *cluster_map(mine, next);
  cluster_sync();
}
// A bulk load of 16 floats and a bulk store of their doubles; what was there too early is kept.
void copies(float* out) {
  alignas(16) static float source[16];
  auto* bar = shared_memory<Mbarrier>();
  float* held = shared_memory<float>() + 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 16; ++i) source[i] = float(i);
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(bar, sizeof source);
    bulk_load(held, source, sizeof source, bar);
    out[16] = held[3];
  }
  __syncthreads();
  mbarrier_wait(bar, 0);
  if (threadIdx.x < 16) held[threadIdx.x] *= 2;
  fence_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, held, sizeof source);
    bulk_commit();
    bulk_wait_read<0>();
  }
}
void uninitialised(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

// --- wrong ones
void deadlock(float*) {
  if (threadIdx.x != 7) __syncthreads();
}
void divergence(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void warp_divergence(float* out) {
  if (lane_id() < 16) {
    out[0] = __shfl_sync(kAllLanes, 1.f, 0);
  } else {
    __syncwarp();
  }
}
void outside(float*) {
  if (threadIdx.x == 0) shared_memory<float>()[64] = 1.f;  // of 256 bytes
}
void unwaited_store(float* out) {
  if (threadIdx.x == 0) {
    bulk_store(out, shared_memory<float>(), 64);
    bulk_commit();
  }
}
void reused_source(float* out) {
  float* held = shared_memory<float>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 16; ++i) held[i] = 1.f;
    bulk_store(out, held, 64);
    bulk_commit();
    held[0] = 2.f;
    bulk_wait_read<0>();
  }
}
void misaligned(float* out) {
  if (threadIdx.x == 0) bulk_store(out + 1, shared_memory<float>(), 64);
}
void never_arrives(float*) {
  auto* bar = shared_memory<Mbarrier>();
  if (threadIdx.x == 0) mbarrier_init(bar, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
}
void beyond_the_cluster(float* out) { out[0] = *cluster_map(shared_memory<float>(), 2); }
void counter_left(float*) { atomicAdd(ppo::emulate::counters() + 3, 1u); }

struct Case {
  void (*kernel)(float*);
  Geometry geometry;
};
Case of(const char* name, void (*kernel)(float*), unsigned grid, unsigned block,
        unsigned cluster = 1) {
  return {kernel, {name, {grid}, {block}, 256, cluster}};
}
#define PPO_CASE(kernel, ...) {#kernel, of(#kernel, kernel, __VA_ARGS__)}
const std::map<std::string, Case> kCases{
    PPO_CASE(sums, 2, 96),
    PPO_CASE(shuffles, 1, 32),
    PPO_CASE(last_block, 5, 64),
    PPO_CASE(neighbours, 6, 32, 3),
    PPO_CASE(copies, 1, 64),
    PPO_CASE(uninitialised, 1, 32),
    PPO_CASE(deadlock, 1, 64),
    PPO_CASE(divergence, 1, 64),
    PPO_CASE(warp_divergence, 1, 32),
    PPO_CASE(outside, 1, 32),
    PPO_CASE(unwaited_store, 1, 32),
    PPO_CASE(reused_source, 1, 32),
    PPO_CASE(misaligned, 1, 32),
    PPO_CASE(never_arrives, 1, 32),
    PPO_CASE(beyond_the_cluster, 2, 32, 2),
    PPO_CASE(counter_left, 1, 32),
};

}  // namespace

// 0 and results in `out`, or 1 and what the device said.
extern "C" __attribute__((visibility("default"))) int run_case(const char* name, float* out,
                                                               char* said, int room) {
  const Case& c = kCases.at(name);
  try {
    ppo::emulate::run(c.geometry, [&] { c.kernel(out); });
  } catch (const std::runtime_error& error) {
    std::strncpy(said, error.what(), size_t(room - 1));
    return 1;
  }
  return 0;
}
