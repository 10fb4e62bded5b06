// Arguments of the advantage kernels, passed by value: plain data (on the CPU:
// cpu/advantage/args.h).
#pragma once

#include "../../codes.h"
#include "../device/reduce.cuh"
#include "../device/tensor.cuh"

namespace ppo::cuda {

// Tensor of steps: step t of sequence s is at data + s * seq + (first slot of s + t) * step
// elements. Without packing the first slot is 0; with packing `seq` is 0. Null data if absent.
struct Steps {
  const void* data;
  DType dtype;
  int64_t seq, step;
};

// fp32 output, laid out as `Steps`.
struct Output {
  float* data;
  int64_t seq, step;
};

// Steps are dense where all inputs are fp32, and they, the mask and the outputs lie alike: in
// rows, a sequence's steps side by side and its neighbours equally far apart; in columns, the
// sequences side by side and their steps equally far apart. One offset serves all of them.
enum class Dense : int { no, rows, columns };

// Starts and lengths of sequences: `length` steps each, or offsets (count + 1,) into `length` flat
// slots.
struct SequenceLayout {
  const void* offsets;
  bool wide;  // 64-bit offsets
  int64_t stride;
  int64_t count, length;
  int64_t pitch;  // of dense rows, from a sequence's first step to the next one's; of dense
                  // columns, from a step to the next one
};

// First and last live step of a chunk, counted from its start; -1: none.
struct ChunkLive {
  int first, last;
};

struct AdvantageArgs {
  SequenceLayout seqs;
  Steps values, mask, bootstrap;
  Output advantages, returns;
  Output rewards, kl;  // rlhf_advantages' own, else absent
  bool carry;          // masked steps are as if absent, else they are zeros
  float gamma, decay;
  bool maps_only;       // the launch stores maps of chunks and nothing of their steps
  int lanes;            // a sequence's, where a warp holds several
  int64_t chunks_each;  // chunks of every sequence; 0 where packed
  void* maps;           // AffineMap of every chunk
  ChunkLive* live;      // of every chunk, if `scouted`
  bool scouted;
  Moments* parts;   // (blocks,)
  double* moments;  // (3,)
  unsigned* counter;
};

struct GaeArgs {
  AdvantageArgs base;
  Steps rewards, next_values, terminated, truncated, rho, c, lam, lam_returns;
  bool lam_per_step, lam_returns_per_step;
  double gamma;
  float decay_returns;
};

struct RlhfArgs {
  AdvantageArgs base;
  Steps scores, logprobs, ref_logprobs;
  Estimator estimator;
  ScoreAt score_at;
  ScalarArg kl_coef;
  float kl_clamp, reward_min, reward_max;
};

}  // namespace ppo::cuda
