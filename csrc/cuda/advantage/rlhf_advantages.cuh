// Steps of rlhf_advantages: KL-shaped rewards plus the score.
#pragma once

#include "../device/math.cuh"
#include "steps.cuh"

namespace ppo::cuda {

struct RlhfSource {
  using Args = RlhfArgs;
  static constexpr bool extras = false;
  static constexpr Dense dense = Dense::no;
  static constexpr bool needs_last = true;
  static constexpr int resident = 2;

  struct Row {
    int64_t slot;  // the step that takes the score, or -1
    bool pad;      // it is masked: it carries a return and no advantage
    float score, kl_coef;
  };
  struct Raw {
    Quad logprobs, ref, value, score;
  };
  struct Kl {
    float reward[kGroupSteps], kl[kGroupSteps];
  };

  const RlhfArgs& args;

  // `last`: the sequence's last live step, or -1.
  PPO_DEVICE Row open(const Sequence& s, int64_t last) const {
    Row row{-1, false, 0.f, float(read(args.kl_coef))};
    if (args.score_at == ScoreAt::per_token || last < 0) return row;
    row.pad = args.score_at == ScoreAt::first_pad && last + 1 < s.steps;
    row.slot = last + row.pad;
    row.score = clipped(number_of(args.scores, s, 0.f));
    return row;
  }

  PPO_DEVICE Raw load(const Row& row, const Sequence& s, int64_t t, uint32_t flags) const {
    const int exist = s.exist(t), n = flags ? exist : 0;
    const bool holds_pad = row.pad && row.slot >= t && row.slot < t + exist;
    Raw raw{};
    raw.logprobs = load_quad<dense>(args.logprobs, s, t, n);
    raw.ref = load_quad<dense>(args.ref_logprobs, s, t, n);
    raw.value = load_quad<dense>(args.base.values, s, t, holds_pad ? exist : n);
    if (args.score_at == ScoreAt::per_token) raw.score = load_quad<dense>(args.scores, s, t, n);
    return raw;
  }

  PPO_DEVICE StepGroupOf<false> decode(const Row& row, const Sequence& s, int64_t t,
                                       uint32_t flags, const Raw& raw) const {
    const int n = s.exist(t);
    StepGroupOf<false> u;
    u.live = flag_bits(flags);
    const bool here = row.slot >= t && row.slot < t + n;
    const unsigned slot = here ? 1u << (row.slot - t) : 0u;
    u.kept = u.live | slot;
    u.moves = args.base.carry ? u.kept : (1u << n) - 1u;
    cuda::decode<dense>(raw.value, args.base.values.dtype, u.value);
    float kl[kGroupSteps], score[kGroupSteps];
    shape(row, raw, u.live, kl, u.reward);
    cuda::decode<dense>(raw.score, args.scores.dtype, score);
    const bool per_token = args.score_at == ScoreAt::per_token;
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      u.value[i] = u.kept >> i & 1 ? u.value[i] : 0.f;
      const bool added = (per_token ? u.live : slot) >> i & 1;
      const float more = per_token ? clipped(score[i]) : row.score;
      u.reward[i] = added ? u.reward[i] + more : u.reward[i];
    }
    if (n == 0 || args.base.maps_only) return u;
    store_steps<dense>(args.base.rewards, s, t, n, u.reward);
    store_steps<dense>(args.base.kl, s, t, n, kl);
    return u;
  }

 private:
  PPO_DEVICE float clipped(float score) const {
    return clamp(score, args.reward_min, args.reward_max);
  }

  PPO_DEVICE void shape(const Row& row, const Raw& raw, unsigned live, float* kl,
                        float* reward) const {
    PolicyOptions options{};
    options.estimator = args.estimator;
    options.kl_clamp = args.kl_clamp;
    const PolicyConsts<float> consts(options);
    float logprobs[kGroupSteps], ref[kGroupSteps];
    cuda::decode<dense>(raw.logprobs, args.logprobs.dtype, logprobs);
    cuda::decode<dense>(raw.ref, args.ref_logprobs.dtype, ref);
    const bool k3 = args.estimator == Estimator::k3;
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      const bool keep = live >> i & 1;
      const float x = keep ? logprobs[i] - ref[i] : 0.f;
      const ExpParts<float> minus = k3 ? exp_parts(-x) : ExpParts<float>{0.f, 0.f, 0.f};
      kl[i] = keep ? kl_term(options, consts, x, minus, 0.f).value : 0.f;
      reward[i] = keep ? -row.kl_coef * kl[i] : 0.f;
    }
  }
};

}  // namespace ppo::cuda
