// Emulator of CUDA launches on a CPU: every CUDA thread is a fiber, the blocks of a cluster are
// resident together, clusters run one after the other. Fibers switch only where they wait, so data
// races do not show; every other fault of a kernel ends in an exception that names it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace ppo::emulate {

struct Index {
  unsigned x = 1, y = 1, z = 1;
  constexpr Index(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  size_t count() const { return size_t(x) * y * z; }
  // Number i of `this` many, x fastest.
  Index at(size_t i) const {
    return Index(unsigned(i % x), unsigned(i / x % y), unsigned(i / x / y));
  }
};

struct Geometry {
  const char* kernel;  // its name, for messages
  Index grid, block;
  size_t shared_bytes;
  unsigned cluster;
};

// Runs body() once per CUDA thread. Throws std::runtime_error on a deadlock, on divergent
// collectives, on damaged shared memory and on counters left behind.
void run(const Geometry& geometry, const std::function<void()>& body);

// Arrival counters of blocks; every launch must leave them at 0.
constexpr unsigned kCounters = 32768;
unsigned* counters();

// Functions for device code, called inside run().

// Threads that wait for each other at one place of the program. `what` and `line` say which:
// threads that meet at different places have diverged.
class Barrier {
 public:
  Barrier() = default;
  explicit Barrier(unsigned expected) : expected_(expected) {}
  uint64_t arrive(const char* what, int line);  // gives what to wait for
  void wait(uint64_t arrival) const;
  void arrive_and_wait(const char* what, int line) { wait(arrive(what, line)); }

 private:
  unsigned expected_ = 0, arrived_ = 0;
  const char* what_ = nullptr;
  int line_ = 0;
  uint64_t epoch_ = 0;
};

// Slots of a warp's collectives, in two alternating sets, because a lane may be one collective
// ahead.
struct Warp {
  Barrier barrier{32};
  uint64_t slots[2][32];
};

struct Block {
  Barrier barrier;
  unsigned rank;      // in its cluster
  std::byte* shared;  // 128-byte aligned
  int votes[2];       // of __syncthreads_or and its kin, by turn
};

struct Thread {
  Warp* warp;
  Block* block;
  unsigned lane;
  unsigned warp_turn = 0, block_turn = 0;  // collectives so far
  uint64_t cluster_arrival = 0;
  static constexpr unsigned kGroups = 8;
  uint64_t copies_issued = 0, copies_done = 0;  // its bulk stores
  uint64_t groups[kGroups] = {};  // copies issued when each of the last was committed
  unsigned n_groups = 0;
};

Thread& self();
const Geometry& geometry();
Barrier& cluster_barrier();

// Ends the launch with an exception that names the kernel and this thread.
[[noreturn]] void fail(const std::string& what);

// Lets other threads run until *word differs from value.
void wait_while(const volatile uint64_t* word, uint64_t value, const char* what);

// Address of `p` of this block's shared memory in that of the cluster's block `rank`.
void* in_block(const void* p, unsigned rank);
// Fails unless [p, p + bytes) is within this block's shared memory.
void check_shared(const void* p, size_t bytes, const char* what);

// A copy that happens some time later: when every thread waits, or the launch ends. `done` runs
// after it.
void defer_copy(void* to, const void* from, size_t bytes, std::function<void()> done);

}  // namespace ppo::emulate

// Number of launches so far, for tests.
extern "C" {
inline __attribute__((visibility("default"))) uint64_t ppo_fast_emulated_launches = 0;
}
