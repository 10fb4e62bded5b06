// logits_ppo_loss: a token's part between its row's softmax and its row's gradient, and the kernel
// that reads each row twice (torch-free).
#pragma once

#include "policy.cuh"
#include "rows.cuh"
#include "softmax.cuh"

namespace ppo::cuda {

// One launch: rows [0, n_rows), two strides each. By value in the kernels' parameters.
struct LogitsPpoArg {
  RowTensor logits, tokens, mask, temperature;                    // (rows, V), (rows,) ...
  RowTensor old_logprobs, advantages, is_weights, ref_logprobs, weights;  // (rows,)
  RowTensor out;                                                  // (rows, V)
  float *logprobs, *entropy;                                      // (rows,) contiguous
  int64_t n_rows, n_inner, ignore_index;
  int vocab;
  float inv_temperature;
  PolicyArg policy;
};

// What the loss takes of one token, fetched before its row is.
struct TokenInputs {
  bool live, legal;  // counts; and is one of the V
  int64_t token;
  float inv_t, old_logprob, advantage, is_weight, ref_logprob, weight;
};

PPO_DEVICE TokenInputs token_inputs(const LogitsPpoArg& a, Row row) {
  TokenInputs t{};
  t.token = integer_at(a.tokens, row);
  t.live = kept_at(a.mask, row) && t.token != a.ignore_index;
  if (!t.live) return t;
  t.legal = t.token >= 0 && t.token < a.vocab;
  const float heat = number_at(a.temperature, row, 1.f);
  t.inv_t = a.temperature.data == nullptr ? a.inv_temperature : 1.f / heat;
  t.old_logprob = number_at(a.old_logprobs, row, 0.f);
  t.advantage = number_at(a.advantages, row, 0.f);
  t.is_weight = number_at(a.is_weights, row, 1.f);
  t.ref_logprob = number_at(a.ref_logprobs, row, 0.f);
  t.weight = number_at(a.weights, row, 0.f);
  return t;
}

// Of a live token, given its row's softmax and its logit.
PPO_DEVICE GradientTerms token_gradient(const LogitsPpoArg& a, const PolicyConsts<float>& c,
                                        const TokenInputs& t, const Outcome& row, float label) {
  PolicyToken<float> token{row.logprob,
                           a.old_logprobs.data == nullptr ? row.logprob : t.old_logprob,
                           t.advantage,
                           t.is_weight,
                           t.ref_logprob,
                           1.f};
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
    const Row row = row_of(r, a.n_inner);
    const TokenInputs t = token_inputs(a, row);
    const T* from = row_pointer<T>(a.logits, row);
    O* to = const_cast<O*>(row_pointer<O>(a.out, row));
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
      write_gradient(from, to, 0, a.vocab, terms, team.thread, team.threads,
                     [&] { team.sync(); });
    } else {
      write_gradient(from, to, 0, a.vocab, terms, team.thread, team.threads, [] {});
    }
    team.sync();  // `parts` are read
  }
}

constexpr int kTwoReadThreads = 512;

// A row of one slice is a warp's, any other a block's.
template <class T, class O>
__global__ void __launch_bounds__(kTwoReadThreads)
    logits_ppo_two_reads(const __grid_constant__ LogitsPpoArg a) {
  Part* parts = shared_memory<Part>();
  const int warps = int(blockDim.x) / kWarp, thread = int(threadIdx.x);
  if (row_plan(a.vocab).slices == 1) {
    const int64_t first = int64_t(blockIdx.x) * warps + warp_id();
    two_reads<T, O>(a, {lane_id(), kWarp, first, int64_t(gridDim.x) * warps, false},
                    parts + warp_id());
  } else {
    two_reads<T, O>(a, {thread, int(blockDim.x), int64_t(blockIdx.x), int64_t(gridDim.x), true},
                    parts);
  }
}

}  // namespace ppo::cuda
