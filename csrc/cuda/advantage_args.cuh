// What the advantage kernels are given, by value: plain data (the twin of cpu/advantage_args.h).
#pragma once

#include "../options.h"
#include "moments.cuh"
#include "runtime.cuh"
#include "scalar.cuh"

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
struct Sequences {
  const void* offsets;
  bool wide;  // 64-bit offsets
  int64_t count, length;
};

// Chunks of sequences, where each has a block of its own: `each` for every sequence, or packed (0),
// see chunks_before().
struct ChunkGrid {
  int64_t count, each;
};

// The passes over chunks that do not fit one block's walk along a sequence.
enum class Pass : int {
  whole,  // a block walks along a sequence
  maps,   // a block leaves its chunk's map
  apply,  // a block has the later chunks' maps
};

// Written by one launch for the next, indexed by ChunkGrid.
struct ChunkMap {
  float a, b, a_ret, b_ret;
  int cut;
};
struct ChunkLive {
  int first, last;  // live steps, counted from the chunk's start; -1: none
};

struct AdvantageArgs {
  Sequences seqs;
  Steps values, mask, bootstrap;
  Output advantages, returns;
  bool carry;  // masked steps are as if absent, else they are zeros
  float gamma, decay;
  Pass pass;
  int lanes;  // a sequence's, where a warp holds several
  ChunkGrid chunks;
  ChunkMap* maps;
  ChunkLive* live;
  double* parts;    // (blocks, 3)
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
  Output rewards, kl;
  Estimator estimator;
  ScoreAt score_at;
  ScalarArg kl_coef;
  float kl_clamp, reward_min, reward_max;
};

}  // namespace ppo::cuda
