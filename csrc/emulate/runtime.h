// CUDA C++ for a host compiler: the part that csrc/cuda uses, over the fibers of engine.h. A
// missing function is a compile error of the emulated build: add it here.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using dim3 = ppo::emulate::Index;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) longlong2 {
  long long x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace ppo::emulate {

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) <= sizeof(uint64_t) && sizeof(From) <= sizeof(uint64_t));
  uint64_t bits = 0;
  To out;
  std::memcpy(&bits, &x, sizeof x);
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// Values of all lanes of a warp; all of them must take part.
template <class T>
struct Lanes {
  const uint64_t* slots;
  T operator[](unsigned lane) const { return bits_as<T>(slots[lane]); }
};

template <class T>
Lanes<T> meet(unsigned mask, T x, const char* what, int line) {
  if (mask != 0xffffffffu) fail(std::string(what) + ": the mask must name all lanes");
  Thread& me = self();
  uint64_t* slots = me.warp->slots[me.warp_turn++ % 2];
  slots[me.lane] = bits_as<uint64_t>(x);
  me.warp->barrier.arrive_and_wait(what, line);
  return {slots};
}

// The sum of all threads' votes.
inline int vote(int x, const char* what, int line) {
  Thread& me = self();
  int& votes = me.block->votes[me.block_turn++ % 2];
  votes += x;
  me.block->barrier.arrive_and_wait(what, line);
  const int all = votes;
  me.block->barrier.arrive_and_wait(what, line);
  votes = 0;
  return all;
}

inline int threads() { return int(blockDim.x * blockDim.y * blockDim.z); }

}  // namespace ppo::emulate

#define PPO_HERE int line = __builtin_LINE()

inline void __syncthreads(PPO_HERE) {
  ppo::emulate::self().block->barrier.arrive_and_wait("__syncthreads", line);
}
inline int __syncthreads_or(int p, PPO_HERE) {
  return ppo::emulate::vote(p != 0, "__syncthreads_or", line) > 0;
}
inline int __syncthreads_and(int p, PPO_HERE) {
  return ppo::emulate::vote(p != 0, "__syncthreads_and", line) == ppo::emulate::threads();
}
inline int __syncthreads_count(int p, PPO_HERE) {
  return ppo::emulate::vote(p != 0, "__syncthreads_count", line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, PPO_HERE) {
  ppo::emulate::meet(mask, 0, "__syncwarp", line);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, PPO_HERE) {
  const auto lanes = ppo::emulate::meet(mask, x, "__shfl_sync", line);
  const unsigned lane = ppo::emulate::self().lane, base = lane / unsigned(width) * unsigned(width);
  return lanes[base + unsigned(from) % unsigned(width)];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int by, int width = 32, PPO_HERE) {
  const auto lanes = ppo::emulate::meet(mask, x, "__shfl_xor_sync", line);
  const unsigned lane = ppo::emulate::self().lane, other = lane ^ unsigned(by);
  return lanes[other / unsigned(width) > lane / unsigned(width) ? lane : other];
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, PPO_HERE) {
  const auto lanes = ppo::emulate::meet(mask, x, "__shfl_up_sync", line);
  const unsigned lane = ppo::emulate::self().lane;
  return lanes[lane % unsigned(width) < by ? lane : lane - by];
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, PPO_HERE) {
  const auto lanes = ppo::emulate::meet(mask, x, "__shfl_down_sync", line);
  const unsigned lane = ppo::emulate::self().lane;
  return lanes[lane % unsigned(width) + by >= unsigned(width) ? lane : lane + by];
}
inline unsigned __ballot_sync(unsigned mask, int p, PPO_HERE) {
  const auto lanes = ppo::emulate::meet(mask, p != 0, "__ballot_sync", line);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= unsigned(lanes[i]) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int p, PPO_HERE) { return __ballot_sync(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, PPO_HERE) {
  return __ballot_sync(mask, p, line) == 0xffffffffu;
}

#undef PPO_HERE

// Fibers take turns, so a plain update is atomic.
template <class T>
T atomicAdd(T* at, std::common_type_t<T> x) {
  const T old = *at;
  *at = old + x;
  return old;
}
template <class T>
T atomicMax(T* at, std::common_type_t<T> x) {
  const T old = *at;
  *at = old > x ? old : x;
  return old;
}
template <class T>
T atomicMin(T* at, std::common_type_t<T> x) {
  const T old = *at;
  *at = old < x ? old : x;
  return old;
}
template <class T>
T atomicExch(T* at, std::common_type_t<T> x) {
  const T old = *at;
  *at = x;
  return old;
}
template <class T>
T atomicCAS(T* at, std::common_type_t<T> expected, std::common_type_t<T> x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Cache hints change nothing here.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::common_type_t<T> x) {
  *p = x;
}
template <class T>
void __stcg(T* p, std::common_type_t<T> x) {
  *p = x;
}

inline unsigned __float_as_uint(float x) { return ppo::emulate::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return ppo::emulate::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return ppo::emulate::bits_as<float>(x); }
inline float __int_as_float(int x) { return ppo::emulate::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return ppo::emulate::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return ppo::emulate::bits_as<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32) | low) >> (shift % 32));
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t(y) << 32) | x;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; ++i) {
    out |= unsigned((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return out;
}
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __hiloint2double(int high, int low) {
  return ppo::emulate::bits_as<double>((uint64_t(unsigned(high)) << 32) | unsigned(low));
}

// Unlike C's, CUDA's are overloaded for float, in the global namespace and in device code.
using std::expm1;
using std::fmax;
using std::fmin;
using std::isfinite;
using std::isinf;
using std::isnan;
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }  // as CUDA's: a number before NaN
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// Bulk copies, barriers in shared memory and clusters: contracts in csrc/cuda/device/runtime.cuh.
// Copies happen as late as allowed, so that data read or overwritten too early shows as NaN or as
// wrong data.
namespace ppo::cuda {

// Arrivals and bytes still missing in the current phase.
struct alignas(8) Mbarrier {
  int32_t bytes;
  int16_t arrivals;
  uint16_t expected : 15, phase : 1;
};

namespace emulated {

inline uint64_t* word(Mbarrier* bar) { return reinterpret_cast<uint64_t*>(bar); }

inline void advance(Mbarrier* bar) {
  if (bar->arrivals > 0 || bar->bytes > 0) return;
  bar->arrivals = int16_t(bar->expected);
  bar->phase ^= 1;
}

inline void check_copy(const void* global, const void* shared, unsigned bytes, const char* what) {
  const auto address = reinterpret_cast<uintptr_t>(global) | reinterpret_cast<uintptr_t>(shared);
  if (address % 16 != 0 || bytes % 16 != 0 || bytes == 0)
    emulate::fail(std::string(what) + " of " + std::to_string(bytes) +
                  " bytes: addresses and size must be multiples of 16");
  emulate::check_shared(shared, bytes, what);
}

}  // namespace emulated

inline void mbarrier_init(Mbarrier* bar, unsigned arrivals) {
  emulate::check_shared(bar, sizeof *bar, "mbarrier");
  bar->bytes = 0;
  bar->arrivals = int16_t(arrivals);
  bar->expected = uint16_t(arrivals);
  bar->phase = 0;
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(Mbarrier* bar) {
  if (bar->arrivals <= 0) emulate::fail("an arrival too many at an mbarrier");
  --bar->arrivals;
  emulated::advance(bar);
}
inline void mbarrier_arrive_expect(Mbarrier* bar, unsigned bytes) {
  bar->bytes += int32_t(bytes);
  mbarrier_arrive(bar);
}
inline void mbarrier_wait(Mbarrier* bar, unsigned parity) {
  while (bar->phase == (parity & 1)) {
    emulate::wait_while(emulated::word(bar), *emulated::word(bar), "an mbarrier");
  }
}

inline void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
  emulated::check_copy(global, shared, bytes, "a bulk load");
  std::memset(shared, 0xff, bytes);
  emulate::defer_copy(shared, global, bytes, [bar, bytes] {
    bar->bytes -= int32_t(bytes);
    emulated::advance(bar);
  });
}
inline void bulk_store(void* global, const void* shared, unsigned bytes) {
  emulated::check_copy(global, shared, bytes, "a bulk store");
  emulate::Thread* me = &emulate::self();
  emulate::defer_copy(global, shared, bytes, [me] { ++me->copies_done; });
  ++me->copies_issued;
}
inline void bulk_commit() {
  emulate::Thread& me = emulate::self();
  me.groups[me.n_groups++ % emulate::Thread::kGroups] = me.copies_issued;
}
template <int pending>
inline void bulk_wait_read() {
  static_assert(pending < emulate::Thread::kGroups);
  emulate::Thread& me = emulate::self();
  if (me.n_groups <= unsigned(pending)) return;
  const uint64_t enough = me.groups[(me.n_groups - 1 - pending) % emulate::Thread::kGroups];
  while (me.copies_done < enough) {
    emulate::wait_while(&me.copies_done, me.copies_done, "its bulk stores");
  }
}
template <int pending>
inline void bulk_wait() {
  bulk_wait_read<pending>();
}
inline void fence_async_proxy() {}

inline unsigned cluster_rank() { return emulate::self().block->rank; }
inline unsigned cluster_size() { return emulate::geometry().cluster; }
inline void cluster_arrive(int line = __builtin_LINE()) {
  emulate::self().cluster_arrival = emulate::cluster_barrier().arrive("cluster_arrive", line);
}
inline void cluster_wait() { emulate::cluster_barrier().wait(emulate::self().cluster_arrival); }
inline void cluster_sync(int line = __builtin_LINE()) {
  cluster_arrive(line);
  cluster_wait();
}
template <class T>
inline T* cluster_map(T* shared, unsigned rank) {
  return static_cast<T*>(emulate::in_block(shared, rank));
}
inline void mbarrier_arrive_at(Mbarrier* bar, unsigned rank) {
  mbarrier_arrive(cluster_map(bar, rank));
}
inline void mbarrier_wait_cluster(Mbarrier* bar, unsigned parity) { mbarrier_wait(bar, parity); }

}  // namespace ppo::cuda
