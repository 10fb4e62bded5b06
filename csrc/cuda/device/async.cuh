// Bulk asynchronous copies between global and shared memory, and the barriers they complete on
// (PTX ISA: cp.async.bulk, mbarrier). sm_90 and later: a kernel that calls them is launched there
// alone, and traps elsewhere. Addresses and sizes of copies are multiples of 16 bytes.
#pragma once

#include "runtime.cuh"

#ifdef PPO_EMULATE
#include "../../emulate/async.h"
#else

namespace ppo::cuda {

// In shared memory. A phase ends when `arrivals` threads have arrived and all expected bytes are
// there; the next one begins at once.
struct alignas(8) Mbarrier {
  uint64_t state;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define PPO_SM90(...) __trap()
#else
#define PPO_SM90(...) asm volatile(__VA_ARGS__)
#endif

PPO_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// One thread initialises; then fence_mbarrier_init() and a barrier before anyone uses it.
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
// Arrive, and have the current phase wait for this many bytes more.
PPO_DEVICE void mbarrier_arrive_expect(Mbarrier* bar, unsigned bytes) {
  PPO_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
           "r"(bytes) : "memory");
}
// Until the phase of this parity (0 for the first one, then 1, 0, ...) is over.
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

// One thread issues; the bytes count at `bar`, where mbarrier_arrive_expect announced them. The
// lines are the first to leave the L2 again: what is read once should not push out what is not.
PPO_DEVICE void bulk_load(void* shared, const void* global, unsigned bytes, Mbarrier* bar) {
  PPO_SM90(
      "{\n .reg .b64 policy;\n"
      " createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], policy;\n}" ::"r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(bar)) : "memory");
}

// One thread issues, after a barrier that follows every writer's fence_async_proxy().
PPO_DEVICE void bulk_store(void* global, const void* shared, unsigned bytes) {
  PPO_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
               __cvta_generic_to_global(global)),
           "r"(shared_address(shared)), "r"(bytes) : "memory");
}
// This thread's stores since the last one form a group.
PPO_DEVICE void bulk_commit() { PPO_SM90("cp.async.bulk.commit_group;" :: : "memory"); }
// Until all but the last `pending` groups of this thread have read their shared memory: it may be
// written again. A block must not end before all have.
template <int pending>
PPO_DEVICE void bulk_wait_read() {
  PPO_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// The same until what they wrote can be read.
template <int pending>
PPO_DEVICE void bulk_wait() {
  PPO_SM90("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}
// This thread's writes to shared memory become visible to the bulk stores issued after a barrier.
PPO_DEVICE void fence_async_proxy() { PPO_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

}  // namespace ppo::cuda
#endif
