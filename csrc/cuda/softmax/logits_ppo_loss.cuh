// logits_ppo_loss: a token's part between its row's softmax and its row's gradient, and the kernel
// that reads each row twice (torch-free).
#pragma once

#include "../device/policy.cuh"
#include "../device/rows.cuh"
#include "softmax.cuh"

namespace ppo::cuda {

// By value in the kernels' parameters.
struct LogitsPpoArg {
  const void* logits;  // (rows, V)
  void* out;
  RowIndex logits_at, out_at;
  RowValues tokens, mask, temperature;  // (rows,)
  RowValues old_logprobs, advantages, is_weights, ref_logprobs, weights;
  float *logprobs, *entropy;  // (rows,) contiguous
  int64_t n_rows, ignore_index;
  int vocab;
  float inv_temperature;
  PolicyArg policy;

  template <class T>
  PPO_DEVICE const T* row(int64_t i) const {
    return static_cast<const T*>(logits) + logits_at.offset(i);
  }
  template <class O>
  PPO_DEVICE O* out_row(int64_t i) const {
    return static_cast<O*>(out) + out_at.offset(i);
  }
  PPO_DEVICE bool live(int64_t i) const {
    return (!mask || mask.is_set(i)) && tokens.integer(i) != ignore_index;
  }
};

// What the loss takes of one token, fetched before its row is.
struct TokenInputs {
  bool live, legal;  // counts; and is one of the V
  int64_t token;
  float inv_t, old_logprob, advantage, is_weight, ref_logprob, weight;
};

PPO_DEVICE TokenInputs token_inputs(const LogitsPpoArg& a, int64_t row) {
  TokenInputs t{};
  t.live = a.live(row);
  if (!t.live) return t;
  t.token = a.tokens.integer(row);
  t.legal = t.token >= 0 && t.token < a.vocab;
  t.inv_t = a.temperature ? 1.f / a.temperature.number(row) : a.inv_temperature;
  t.old_logprob = a.old_logprobs ? a.old_logprobs.number(row) : 0.f;
  t.advantage = a.advantages.number(row);
  t.is_weight = a.is_weights ? a.is_weights.number(row) : 1.f;
  t.ref_logprob = a.ref_logprobs ? a.ref_logprobs.number(row) : 0.f;
  t.weight = a.weights.number(row);
  return t;
}

// Of a live token, given its row's softmax and its logit.
PPO_DEVICE GradientTerms token_gradient(const LogitsPpoArg& a, const PolicyConsts<float>& c,
                                        const TokenInputs& t, const Outcome& row, float label) {
  PolicyToken<float> token{row.logprob,   a.old_logprobs ? t.old_logprob : row.logprob,
                           t.advantage,   t.is_weight,
                           t.ref_logprob, 1.f};
  if (a.policy.moments) token.advantage = whiten_advantage(c, token.advantage);
  const float slope = policy_terms_of(a.policy.options, c, token).grad;
  GradientTerms terms = gradient_terms(t.weight * slope, -(t.weight * c.entropy_coef), row,
                                       t.token, label, t.inv_t, t.legal);
  // A clamp drops a NaN, and with it the slope: the row is NaN all the same.
  terms.zero = terms.zero && t.legal && row.sound;
  return terms;
}

PPO_DEVICE void store_outcome(const LogitsPpoArg& a, int64_t row, bool live, const Outcome& o) {
  a.logprobs[row] = live ? o.logprob : 0.f;
  a.entropy[row] = live ? o.entropy : 0.f;
}

// A team of warps takes whole rows, one after the other.
struct Team {
  int thread, threads;  // of this team
  int64_t first, step;  // rows
  bool whole_block;

  PPO_DEVICE void sync() const {
    if (whole_block) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
};

// Reads a row for its softmax, and once more, mostly out of the L2, for its gradient.
template <class T, class O>
PPO_DEVICE void two_reads(const LogitsPpoArg& a, const Team& team, Part* parts) {
  const PolicyConsts<float> c = resolve(a.policy);
  const RowPlan plan = row_plan(a.vocab);
  for (int64_t r = team.first; r < a.n_rows; r += team.step) {
    const TokenInputs t = token_inputs(a, r);
    const T* from = a.row<T>(r);
    O* to = a.out_row<O>(r);
    Outcome o{};
    GradientTerms terms{};
    terms.zero = true;
    if (t.live) {
      for (int s = team.thread / kWarp; s < plan.slices; s += team.threads / kWarp) {
        const int first = s * plan.length;
        const Part part = slice_part(from, first, min(first + plan.length, a.vocab), t.inv_t);
        if (lane_id() == 0) parts[s] = part;
      }
      const float label = t.legal ? widen(from[t.token]) : 0.f;
      team.sync();  // and every read of the label precedes the first write
      o = outcome(merged(parts, plan.slices), label, t.inv_t, t.legal);
      terms = token_gradient(a, c, t, o, label);
    }
    if (team.thread == 0) store_outcome(a, r, t.live, o);
    if (terms.zero) {
      write_zeros(to, 0, a.vocab, team.thread, team.threads);
    } else if constexpr (sizeof(O) < sizeof(T)) {
      write_gradient(from, to, 0, a.vocab, terms, team.thread, team.threads, [&] { team.sync(); });
    } else {
      write_gradient(from, to, 0, a.vocab, terms, team.thread, team.threads, [] {});
    }
    team.sync();  // `parts` are read
  }
}

constexpr int kTwoReadThreads = 256;

// A row of one slice is a warp's, any other a block's.
template <class T, class O>
__global__ void __launch_bounds__(kTwoReadThreads, 1)
    logits_ppo_two_reads(const __grid_constant__ LogitsPpoArg a) {
  Part* parts = shared_memory<Part>();
  const int warps = int(blockDim.x) / kWarp;
  Team team{int(threadIdx.x), int(blockDim.x), int64_t(blockIdx.x), int64_t(gridDim.x), true};
  if (row_plan(a.vocab).slices == 1) {
    parts += warp_id();
    team = {lane_id(), kWarp, team.first * warps + warp_id(), team.step * warps, false};
  }
  two_reads<T, O>(a, team, parts);
}

}  // namespace ppo::cuda
