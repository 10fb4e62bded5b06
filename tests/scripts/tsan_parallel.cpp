// Replacement of torch's parallel_for under ThreadSanitizer. torch's OpenMP runtime is not
// compiled with it, so its forks and joins would be reported as races. Preloaded, this file
// defines the one symbol by which kernels ask for threads, and gives four wherever the grain
// allows it: the kernels' own reads and writes are watched.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) AOTITorchError
torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc f, void* context) {
  const int64_t items = end - begin;
  const int64_t count = std::clamp<int64_t>(items / std::max<int64_t>(grain, 1), 1, 4);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    threads.emplace_back(f, begin + items * i / count, begin + items * (i + 1) / count, context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
