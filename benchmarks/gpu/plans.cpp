// Sizes by which the host code of csrc/cuda plans its launches, as the device code declares them:
// lines of "name value" for benchmarks/gpu/native.py. Compiled as the emulation is.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/advantage/blocks.cuh"
#include "../../csrc/cuda/advantage/gae.cuh"
#include "../../csrc/cuda/loss/ppo_loss.cuh"
#include "../../csrc/cuda/loss/scale.cuh"
#include "../../csrc/cuda/softmax/logits_ppo_loss.cuh"
#include "../../csrc/cuda/softmax/logprobs.cuh"

using namespace ppo::cuda;

int main(int, char** sizes) {
  const int vocab = std::atoi(sizes[1]), item = std::atoi(sizes[2]);
  const auto say = [](const char* name, long long value) {
    std::printf("%s %lld\n", name, value);
  };
  const RowPlan plan = row_plan(vocab);
  say("slices", plan.slices);
  say("ring_warps", kLogprobsThreads / kWarp);
  say("ring_bytes", (long long)ring_bytes(kLogprobsThreads / kWarp, plan.length * item + 16));
  for (int size = 1; size <= kMaxCluster; size *= 2) {
    const long long bytes = kStagesAt + kStages * stage_bytes(plan, size, item);
    if (size <= plan.slices && bytes <= 227 * 1024) {
      say("cluster", size);
      say("cluster_bytes", bytes);
      const int workers = std::min(kMaxWorkers, plan.slices / size);
      say("cluster_threads", kClusterThreads - (kMaxWorkers - workers) * kWarp);
      break;
    }
  }
  say("loss_blocks", kLossBlocks);
  say("loss_tile", kTile);
  say("loss_threads", kTokenThreads);
  say("loss_bytes", sizeof(LossShared<16>));
  say("scale_blocks", kScaleBlocks);
  say("scale_tile_bytes", kScaleTileBytes);
  say("scale_threads", kScaleThreads);
  say("row_threads", kRowThreads);
  say("block_bytes", sizeof(BlockShared<false>));
  say("chunk_steps", kChunkSteps);
  say("dense_rows", int(Dense::rows));
  say("dense_columns", int(Dense::columns));
  say("pass_whole", int(Pass::whole));
  say("pass_maps", int(Pass::maps));
  say("pass_apply", int(Pass::apply));
  say("slab_steps", kSlab);
  say("slabs", kSlabs);
  say("abreast", kAbreast<false>);
  say("slab_bytes", sizeof(SlabShared<false>));
}
