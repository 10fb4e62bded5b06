// The emulated twins of csrc/cuda/device/async.cuh and cluster.cuh: see there for what they
// promise. Bulk copies happen as late as they may: what is read or overwritten too early shows as
// NaN or as wrong data.
#pragma once

#include "runtime.h"

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
