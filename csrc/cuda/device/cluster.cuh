// Blocks of one cluster and each other's shared memory (sm_90 and later, see async.cuh).
#pragma once

#include "async.cuh"

#ifndef PPO_EMULATE
namespace ppo::cuda {

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

// Every thread of the cluster; what was written before arriving can be read after waiting, in
// other blocks' shared memory too. A block must not end while others may still read its own.
PPO_DEVICE void cluster_arrive() {
  PPO_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
PPO_DEVICE void cluster_wait() { PPO_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }
PPO_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where this block's shared `p` stands in block `rank` of the cluster: plain loads and stores.
template <class T>
PPO_DEVICE T* cluster_map(T* shared, unsigned rank) {
  uint64_t at = 0;
  PPO_SM90("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(at);
}

// mbarrier_arrive at the barrier that stands at `bar` in block `rank`'s shared memory; releases
// this thread's writes to the cluster.
PPO_DEVICE void mbarrier_arrive_at(Mbarrier* bar, unsigned rank) {
  PPO_SM90(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(bar)),
      "r"(rank) : "memory");
}
// mbarrier_wait that sees what other blocks of the cluster wrote before they arrived.
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

}  // namespace ppo::cuda
#endif
