// Codes of the options, places of the losses' numbers, and slots of the statistics.
// Written by `python -m ppo_fast._boundary.emit`.
#pragma once

namespace ppo {

enum class Variant : int { clip, gspo, cispo, penalty, linear, given };
enum class Estimator : int { k1, k2, k3, abs };
enum class Reduction : int {
  token_mean,
  token_sum,
  seq_mean_token_mean,
  seq_mean_token_sum,
  seq_mean_token_sum_norm,
};
enum class KlWeight : int { none, ratio, score };
enum class Form : int { unclipped, max, clipped };
enum class Masked : int { carry, zero };
enum class ScoreAt : int { last_token, first_pad, per_token };
enum class Divergence : int { reverse, forward, jsd, mixed };
enum class RolloutLevel : int { none, token, sequence, geometric };
enum class RolloutForm : int { truncate, mask };

struct PolicyCodes {
  enum : int {
    variant,
    estimator,
    straight_through,
    reduction,
    kl_weight,
    by_sequence,
    n_grads,
    count,
  };
};
struct PolicyParams {
  enum : int {
    clip_low,
    clip_high,
    dual_clip,
    log_ratio_min,
    log_ratio_max,
    entropy_coef,
    kl_coef,
    kl_clamp,
    kl_ratio_clip,
    denom,
    count,
  };
};
struct ValueCodes {
  enum : int { form, reduction, n_grads, count };
};
struct ValueParams {
  enum : int { clip, scale, denom, count };
};
struct RolloutFields {
  enum : int {
    tokens,
    missing,
    rejected,
    weight,
    weight_sq,
    below,
    above,
    k1,
    k3,
    ratio_sq,
    seqs,
    rejected_seqs,
    seq_ratio_sq,
    log_ppl,
    rollout_log_ppl,
    ppl,
    rollout_ppl,
    ppl_ratio,
    weight_min,
    weight_max,
    count,
  };
};

enum Stat : int {
  kNTokens,
  kNSeqs,
  kLoss,
  kLossDenom,
  kPolicyLoss,
  kEntropy,
  kRefKl,
  kKlK1,
  kKlK2,
  kKlK3,
  kRatio,
  kRatioSq,
  kClipLow,
  kClipHigh,
  kClipDual,
  kClipEps,
  kVfNTokens,
  kVfLoss,
  kVfLossDenom,
  kVfClip,
  kRet,
  kRetSq,
  kErr,
  kErrSq,
  kRolloutTokens,
  kRolloutWeight,
  kRolloutWeightSq,
  kRolloutK3,
  kRolloutRejected,
  kRolloutMissing,
  kDivergence,
  kZLoss,
  kRatioMin,
  kRatioMax,
  kNStats,
};

}  // namespace ppo
