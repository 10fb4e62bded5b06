// Device language: CUDA C++, or its emulation on a CPU (csrc/emulate), and functions for what only
// PTX can say. No torch headers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef PPO_EMULATE
#include "../../emulate/runtime.h"
#else
#include <cuda_runtime.h>
#endif

#include "../../tensor/types.h"

#define PPO_DEVICE __device__ __forceinline__
#define PPO_HOST_DEVICE __host__ __device__ __forceinline__

namespace ppo::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

PPO_DEVICE int lane_id() { return int(threadIdx.x) % kWarp; }
PPO_DEVICE int warp_id() { return int(threadIdx.x) / kWarp; }

// The block's dynamic shared memory (LaunchConfig::shared_bytes of it), 128-byte aligned.
template <class T>
PPO_DEVICE T* shared_memory() {
#ifdef PPO_EMULATE
  return reinterpret_cast<T*>(emulate::self().block->shared);
#else
  extern __shared__ __align__(128) unsigned char ppo_shared[];
  return reinterpret_cast<T*>(ppo_shared);
#endif
}

enum class Memory { global, shared };

#ifndef PPO_EMULATE
PPO_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// 16 bytes at an aligned address. Said in PTX for shared memory: the compiler may split a vector
// there into words, which the lanes of a warp then read and write from the same banks.
template <Memory memory>
PPO_DEVICE uint4 load_vector(const void* p) {
#ifndef PPO_EMULATE
  if constexpr (memory == Memory::shared) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(p))
                 : "memory");
    return v;
  }
#endif
  return *static_cast<const uint4*>(p);
}
template <Memory memory>
PPO_DEVICE void store_vector(void* p, const uint4& v) {
#ifndef PPO_EMULATE
  if constexpr (memory == Memory::shared) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
    return;
  }
#endif
  *static_cast<uint4*>(p) = v;
}

// p, which the compiler may take for an address of global memory wherever it came from.
template <class T>
PPO_DEVICE T* in_global(T* p) {
#ifndef PPO_EMULATE
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// 2^x to 2 ulp, flushing subnormals; -inf gives 0.
PPO_DEVICE float fast_exp2(float x) {
#ifdef PPO_EMULATE
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

#ifndef PPO_EMULATE

// Bulk asynchronous copies between global and shared memory, and the barriers they complete on
// (PTX ISA: cp.async.bulk, mbarrier). sm_90 and later: a kernel that calls them is launched there
// alone, and traps elsewhere. Addresses and sizes of copies are multiples of 16 bytes.

// Barrier in shared memory. A phase ends when `arrivals` threads have arrived and all expected
// bytes are there; the next phase begins at once.
struct alignas(8) Mbarrier {
  uint64_t state;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PPO_SM90(...) __trap()
#else
#define PPO_SM90(...) asm volatile(__VA_ARGS__)
#endif

// Called by one thread; before the first use, fence_mbarrier_init() and a barrier follow.
PPO_DEVICE void mbarrier_init(Mbarrier* bar, unsigned arrivals) {
  PPO_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)),
           "r"(arrivals) : "memory");
}
PPO_DEVICE void fence_mbarrier_init() {
  PPO_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
PPO_DEVICE void mbarrier_arrive(Mbarrier* bar) {
  PPO_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// Arrives, and makes the current phase wait for `bytes` more bytes.
PPO_DEVICE void mbarrier_arrive_expect(Mbarrier* bar, unsigned bytes) {
  PPO_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
           "r"(bytes) : "memory");
}
// Waits until the phase of this parity (0 for the first phase, then 1, 0, ...) is over.
PPO_DEVICE void mbarrier_wait(Mbarrier* bar, unsigned parity) {
  uint32_t over = 0;
  while (!over) {
    PPO_SM90(
        "{\n .reg .pred over;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        " selp.u32 %0, 1, 0, over;\n}" : "=r"(over) : "r"(shared_address(bar)),
        "r"(parity & 1) : "memory");
  }
}

// Bulk load, issued by one thread; its bytes count at `bar`, where mbarrier_arrive_expect
// announced them. The lines are evicted from the L2 first: data read once should not displace
// other data.
PPO_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
  PPO_SM90(
      "{\n .reg .b64 policy;\n"
      " createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], policy;\n}" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(bar)) : "memory");
}

// Bulk store, issued by one thread after a barrier that follows every writer's
// fence_async_proxy().
PPO_DEVICE void bulk_store(void* global, const void* shared, unsigned bytes) {
  PPO_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
               __cvta_generic_to_global(global)),
           "r"(shared_address(shared)), "r"(bytes) : "memory");
}
// Closes a group of this thread's stores: those since the last call.
PPO_DEVICE void bulk_commit() { PPO_SM90("cp.async.bulk.commit_group;" :: : "memory"); }
// Waits until all but the last `pending` groups of this thread have read their shared memory,
// which may then be written again. A block must not end before all groups have.
template <int pending>
PPO_DEVICE void bulk_wait_read() {
  PPO_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// Waits until the writes of all but the last `pending` groups can be read.
template <int pending>
PPO_DEVICE void bulk_wait() {
  PPO_SM90("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
// Makes this thread's writes to shared memory visible to bulk stores issued after a barrier.
PPO_DEVICE void fence_async_proxy() { PPO_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

// Access of a cluster's blocks to each other's shared memory (sm_90 and later).

PPO_DEVICE unsigned cluster_rank() {
  unsigned rank = 0;
  PPO_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PPO_DEVICE unsigned cluster_size() {
  unsigned size = 1;
  PPO_SM90("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

// Cluster barrier, called by every thread: writes before arriving, also to other blocks' shared
// memory, can be read after waiting. A block must not end while others may still read its own.
PPO_DEVICE void cluster_arrive() {
  PPO_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
PPO_DEVICE void cluster_wait() { PPO_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }
PPO_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Address of block `rank`'s copy of this block's `shared`, for plain loads and stores.
template <class T>
PPO_DEVICE T* cluster_map(T* shared, unsigned rank) {
  uint64_t at = 0;
  PPO_SM90("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(at);
}

// mbarrier_arrive at block `rank`'s copy of `bar`; releases this thread's writes to the cluster.
PPO_DEVICE void mbarrier_arrive_at(Mbarrier* bar, unsigned rank) {
  PPO_SM90(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(bar)),
      "r"(rank) : "memory");
}
// mbarrier_wait that acquires the writes of other blocks of the cluster before their arrival.
PPO_DEVICE void mbarrier_wait_cluster(Mbarrier* bar, unsigned parity) {
  uint32_t over = 0;
  while (!over) {
    PPO_SM90(
        "{\n .reg .pred over;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
        " selp.u32 %0, 1, 0, over;\n}" : "=r"(over) : "r"(shared_address(bar)),
        "r"(parity & 1) : "memory");
  }
}

#endif  // PPO_EMULATE

}  // namespace ppo::cuda
