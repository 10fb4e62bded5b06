// The scheduler of the emulated device (see engine.h).
#include "engine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "runtime.h"

namespace ppo::emulate {
namespace {

constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 4096;
// Around each block's shared memory; NaN, as all of it before a kernel writes it.
constexpr size_t kRedZone = 1024, kMaxShared = 227 * 1024;
constexpr int kPoison = 0xff;

struct Fiber {
  // ucontext makes the stack's first frame; from then on _setjmp and _longjmp switch, which unlike
  // swapcontext make no system call.
  ucontext_t first;
  jmp_buf context;
  bool started = false, done = false;
  const volatile uint64_t* word = nullptr;  // waits while *word == value
  uint64_t value = 0;
  const char* waits_for = nullptr;
  Index thread, block;
  Thread state;

  bool blocked() const { return word && *word == value; }
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  std::function<void()> done;
};

struct Device {
  Geometry geometry;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;  // as many as any launch needed, kept
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  Barrier cluster;
  std::deque<Copy> copies;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::string failure;
};

std::mutex g_mutex;  // launches from several host threads take turns
std::unique_ptr<Device> g_device;
unsigned g_counters[kCounters];

[[gnu::noinline]] void to_scheduler() {
  if (_setjmp(g_device->current->context) == 0) _longjmp(g_device->scheduler, 1);
}

// A fiber outlives its thread: it is handed the next one after the scheduler has marked it not
// done.
void fiber_main() {
  for (;;) {
    (*g_device->body)();
    g_device->current->done = true;
    to_scheduler();
  }
}

std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("ppo_fast: no memory for a fiber's stack");
  mprotect(stack, kGuardBytes, PROT_NONE);
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = stack;
  fiber->first.uc_stack.ss_size = kStackBytes;
  fiber->first.uc_link = nullptr;
  makecontext(&fiber->first, &fiber_main, 0);
  return fiber;
}

[[gnu::noinline]] void resume(Fiber& fiber) {
  Device& d = *g_device;
  d.current = &fiber;
  fiber.word = nullptr;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  if (_setjmp(d.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

std::string name_of(const Fiber& f) {
  const auto text = [](const Index& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  };
  return "thread " + text(f.thread) + " of block " + text(f.block);
}

[[noreturn]] void raise(const std::string& what) {
  const std::string message =
      std::string("ppo_fast: emulated kernel ") + g_device->geometry.kernel + ": " + what;
  std::memset(g_counters, 0, sizeof g_counters);
  g_device.reset();  // fibers of a failed launch are lost where they stand
  throw std::runtime_error(message);
}

bool complete_one_copy() {
  auto& copies = g_device->copies;
  if (copies.empty()) return false;
  Copy copy = std::move(copies.front());
  copies.pop_front();
  std::memmove(copy.to, copy.from, copy.bytes);
  copy.done();
  return true;
}

void report_deadlock(size_t threads) {
  std::string what = "deadlock:";
  size_t waiting = 0, ended = 0;
  for (size_t i = 0; i < threads; ++i) {
    const Fiber& f = *g_device->fibers[i];
    ended += f.done;
    if (!f.done && ++waiting <= 3) what += " " + name_of(f) + " waits for " + f.waits_for + ";";
  }
  raise(what + " " + std::to_string(waiting) + " threads wait, " + std::to_string(ended) +
        " have ended");
}

void schedule(size_t threads) {
  Device& d = *g_device;
  for (size_t left = threads; left > 0;) {
    bool progress = false;
    for (size_t i = 0; i < threads; ++i) {
      Fiber& fiber = *d.fibers[i];
      if (fiber.done || fiber.blocked()) continue;
      progress = true;
      resume(fiber);
      if (!d.failure.empty()) raise(std::string(d.failure));
      left -= fiber.done;
    }
    if (!progress && left > 0 && !complete_one_copy()) report_deadlock(threads);
  }
  if (!d.copies.empty()) raise("blocks ended before their bulk copies were complete");
}

// Fresh state for the blocks of one cluster, whose first one is `first` in launch order.
void set_up(size_t first) {
  Device& d = *g_device;
  const Geometry& g = d.geometry;
  const size_t block_threads = g.block.count();
  const size_t warps = block_threads / 32;
  d.blocks.assign(g.cluster, Block{});
  d.warps.assign(g.cluster * warps, Warp{});
  d.cluster = Barrier(unsigned(g.cluster * block_threads));
  while (d.fibers.size() < g.cluster * block_threads) d.fibers.push_back(new_fiber());
  while (d.memory.size() < g.cluster) {
    d.memory.emplace_back(new std::byte[kMaxShared + 2 * kRedZone + 128]);
  }
  for (unsigned rank = 0; rank < g.cluster; ++rank) {
    Block& block = d.blocks[rank];
    const auto base = reinterpret_cast<uintptr_t>(d.memory[rank].get()) + kRedZone + 127;
    block.shared = reinterpret_cast<std::byte*>(base / 128 * 128);
    std::memset(block.shared - kRedZone, kPoison, g.shared_bytes + 2 * kRedZone);
    block.barrier = Barrier(unsigned(block_threads));
    block.rank = rank;
    for (size_t t = 0; t < block_threads; ++t) {
      Fiber& fiber = *d.fibers[rank * block_threads + t];
      fiber.done = false;
      fiber.word = nullptr;
      fiber.block = g.grid.at(first + rank);
      fiber.thread = g.block.at(t);
      fiber.state = Thread{};
      fiber.state.warp = &d.warps[rank * warps + t / 32];
      fiber.state.block = &block;
      fiber.state.lane = unsigned(t % 32);
    }
  }
}

void check_red_zones() {
  const Geometry& g = g_device->geometry;
  for (const Block& block : g_device->blocks) {
    for (size_t i = 0; i < kRedZone; ++i) {
      if (block.shared[ptrdiff_t(i) - ptrdiff_t(kRedZone)] != std::byte(kPoison) ||
          block.shared[g.shared_bytes + i] != std::byte(kPoison)) {
        raise("wrote outside its " + std::to_string(g.shared_bytes) + " bytes of shared memory");
      }
    }
  }
}

void check_counters() {
  for (unsigned i = 0; i < kCounters; ++i) {
    if (g_counters[i] != 0) {
      raise("left counter " + std::to_string(i) + " at " + std::to_string(g_counters[i]));
    }
  }
}

void check_geometry(const Geometry& g) {
  const size_t block_threads = g.block.count();
  if (block_threads == 0 || block_threads > 1024 || block_threads % 32 != 0)
    raise("a block of " + std::to_string(block_threads) + " threads");
  if (g.cluster < 1 || g.cluster > 8 || g.grid.x % g.cluster != 0)
    raise("a grid of " + std::to_string(g.grid.x) + " in clusters of " +
          std::to_string(g.cluster));
  if (g.grid.y > 65535 || g.grid.z > 65535) raise("a grid too large in y or z");
  if (g.shared_bytes > kMaxShared)
    raise(std::to_string(g.shared_bytes) + " bytes of shared memory");
}

}  // namespace

void run(const Geometry& g, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (!g_device) g_device = std::make_unique<Device>();
  Device& d = *g_device;
  d.geometry = g;
  d.body = &body;
  check_geometry(g);
  blockDim = g.block;
  gridDim = g.grid;
  const size_t block_threads = g.block.count();
  const size_t blocks = g.grid.count();
  for (size_t first = 0; first < blocks; first += g.cluster) {
    set_up(first);
    schedule(g.cluster * block_threads);
    check_red_zones();
  }
  check_counters();
  ++ppo_fast_emulated_launches;
}

unsigned* counters() { return g_counters; }

Thread& self() { return g_device->current->state; }
const Geometry& geometry() { return g_device->geometry; }
Barrier& cluster_barrier() { return g_device->cluster; }

void fail(const std::string& what) {
  g_device->failure = name_of(*g_device->current) + ": " + what;
  to_scheduler();
  __builtin_unreachable();
}

void wait_while(const volatile uint64_t* word, uint64_t value, const char* what) {
  Fiber& fiber = *g_device->current;
  while (*word == value) {
    fiber.word = word, fiber.value = value, fiber.waits_for = what;
    to_scheduler();
  }
}

uint64_t Barrier::arrive(const char* what, int line) {
  if (arrived_ == 0) {
    what_ = what, line_ = line;
  } else if (line_ != line || std::strcmp(what_, what) != 0) {
    fail(std::string("divergent: ") + what + " in line " + std::to_string(line) +
         " where others are at " + what_ + " in line " + std::to_string(line_));
  }
  const uint64_t arrival = epoch_;
  if (++arrived_ == expected_) {
    arrived_ = 0;
    ++epoch_;
  }
  return arrival;
}

void Barrier::wait(uint64_t arrival) const { wait_while(&epoch_, arrival, what_); }

void* in_block(const void* p, unsigned rank) {
  if (rank >= g_device->blocks.size())
    fail("no block " + std::to_string(rank) + " in its cluster");
  check_shared(p, 1, "the address to map");
  const auto at = static_cast<const std::byte*>(p) - self().block->shared;
  return g_device->blocks[rank].shared + at;
}

void check_shared(const void* p, size_t bytes, const char* what) {
  const auto at = static_cast<const std::byte*>(p) - self().block->shared;
  if (at < 0 || size_t(at) + bytes > geometry().shared_bytes)
    fail(std::string(what) + " is outside the block's shared memory");
}

void defer_copy(void* to, const void* from, size_t bytes, std::function<void()> done) {
  g_device->copies.push_back({to, from, bytes, std::move(done)});
}

}  // namespace ppo::emulate
