// What the advantage kernels are given, by value: plain data (the twin of cpu/advantage/args.h).
#pragma once

#include "../../options.h"
#include "../device/reduce.cuh"
#include "../device/tensor.cuh"

namespace ppo::cuda {

// Step t of sequence s stands at data + s * seq + (first slot of s + t) * step elements; the first
// slot is 0 unless sequences are packed, and `seq` is 0 where they are. Absent: null data.
struct Steps {
  const void* data;
  DType dtype;
  int64_t seq, step;
};

// An fp32 output, laid out as `Steps`.
struct Output {
  float* data;
  int64_t seq, step;
};

// `length` steps each, or with offsets (count + 1,) into `length` flat slots.
struct SequenceLayout {
  const void* offsets;
  bool wide;  // 64-bit offsets
  int64_t stride;
  int64_t count, length;
};

// What a block does: walk along a sequence (whole), or take one chunk of one and leave its map
// (maps), or apply to it the maps that were left for the later ones (apply).
enum class Pass : int { whole, maps, apply };

// The first and the last live step of a chunk, from its start; -1: none.
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
  Pass pass;
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
