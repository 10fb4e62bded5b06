// What the advantage kernels are given: plain data, the same for every instruction set.
#pragma once

#include "../../options.h"
#include "../../tensor/types.h"

namespace ppo {

// Sequence s has `steps` steps, or with packed offsets the flat slots [offsets[s], offsets[s +
// 1]). A View of a packed tensor has row stride 0, so that (s, slot) addresses the flat slot.
struct Sequences {
  const int64_t* offsets;
  int64_t count, steps;

  int64_t first(int64_t s) const { return offsets ? offsets[s] : 0; }
  int64_t length(int64_t s) const { return offsets ? offsets[s + 1] - offsets[s] : steps; }
};

// Views are (sequence, step); an absent tensor has null data. gamma * lambda is formed in double.
struct Recursion {
  Sequences seqs;
  View values, mask, bootstrap;
  View advantages, returns;
  bool zero_masked, two_lambdas;
  double gamma, decay, decay_returns;
};

struct GaeArgs {
  Recursion base;
  View rewards, next_values, terminated, truncated, rho, c, lam, lam_returns;
  bool lam_per_step, lam_returns_per_step;
};

struct RlhfArgs {
  Recursion base;
  View scores, logprobs, ref_logprobs;
  View rewards, kl;
  Estimator estimator;
  ScoreAt score_at;
  double kl_coef, kl_clamp, reward_min, reward_max;
};

// Time-major, a unit is a multiple of kLineSequences wide (their steps share a cache line) but for
// the last one, and no wider than what is swept together.
constexpr int64_t kLineSequences = 16, kSlabSequences = 512;

// Sequences [begin, end) on one thread; (count, mean, M2) of their live advantages goes to
// `moments`.
struct Unit {
  int64_t begin, end;
  double* moments;
};

}  // namespace ppo
