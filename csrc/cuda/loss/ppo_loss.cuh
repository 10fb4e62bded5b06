// Policy loss kernel: loss, gradients and statistics from one pass over the tokens.
#pragma once

#include "loss.cuh"

namespace ppo::cuda {

// Absent tensors have null data. Gradients are contiguous, null if not requested.
struct PolicyLossArgs {
  LossArgs base;
  PolicyArg policy;
  Column logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs;
  float *grad_logprobs, *grad_entropy;
};

// Inputs of a thread's slots; T is Raw or Values.
template <class T>
struct PolicyInputs {
  T logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs;
};

// Sums over a thread's slots in one tile, in fp32 except for counts and for sums that overflow.
struct TokenSums {
  float loss = 0.f, policy = 0.f, entropy = 0.f, kl = 0.f, d = 0.f, d_sq = 0.f, k3 = 0.f;
  float ratio = 0.f;
  double ratio_sq = 0.0;
  int clip_low = 0, clip_high = 0, clip_dual = 0, clip_eps = 0;

  PPO_DEVICE void flush(double (&stats)[16]) const {
    stats[kLoss] += double(loss);
    stats[kPolicyLoss] += double(policy);
    stats[kEntropy] += double(entropy);
    stats[kRefKl] += double(kl);
    stats[kKlK1] -= double(d);
    stats[kKlK2] += 0.5 * double(d_sq);
    stats[kKlK3] += double(k3);
    stats[kRatio] += double(ratio);
    stats[kRatioSq] += ratio_sq;
    stats[kClipLow] += double(clip_low);
    stats[kClipHigh] += double(clip_high);
    stats[kClipDual] += double(clip_dual);
    stats[kClipEps] += double(clip_eps);
  }
};

template <Variant variant, bool is_usual>
struct PolicyStep {
  static constexpr LossLayout kLayout = {0, kNTokens, kNSeqs, kLoss, kLossDenom, true};
  const PolicyLossArgs& a;
  PolicyOptions o;
  PolicyConsts<float> c;

  PPO_DEVICE explicit PolicyStep(const PolicyLossArgs& args)
      : a(args), o(args.policy.options), c(args.policy.consts) {
    if (is_usual) {
      o.estimator = Estimator::k3;
      o.straight_through = o.has_dual = false;
    }
  }
  PPO_DEVICE void resolve() { c = cuda::resolve(a.policy); }
  PPO_DEVICE PolicyInputs<Raw> load(const Slots& s) const {
    return {load_raw(a.logprobs, s),   load_raw(a.old_logprobs, s),
            load_raw(a.advantages, s), is_usual ? Raw{} : load_raw(a.is_weights, s),
            load_raw(a.entropy, s),    load_raw(a.ref_logprobs, s)};
  }
  PPO_DEVICE PolicyInputs<Values> values(const Slots& s, const PolicyInputs<Raw>& in) const {
    return {values_of(a.logprobs, s, in.logprobs),
            values_of(a.old_logprobs, s, in.old_logprobs),
            values_of(a.advantages, s, in.advantages),
            is_usual ? Values{} : values_of(a.is_weights, s, in.is_weights),
            values_of(a.entropy, s, in.entropy),
            values_of(a.ref_logprobs, s, in.ref_logprobs)};
  }

  PPO_DEVICE PolicyToken<float> token(const PolicyInputs<Values>& in, int k,
                                      const SequenceTerm& sequence) const {
    PolicyToken<float> t;
    t.logprobs = in.logprobs.at[k];
    t.old_logprobs = a.old_logprobs.data ? in.old_logprobs.at[k] : t.logprobs;
    t.advantage = in.advantages.at[k];
    if (o.whiten) t.advantage = whiten_advantage(c, t.advantage);
    t.is_weight = !is_usual && a.is_weights.data ? in.is_weights.at[k] : 1.f;
    t.ref_logprobs = in.ref_logprobs.at[k];
    t.seq_ratio = sequence.ratio;
    t.seq_held = sequence.held;
    return t;
  }

  PPO_DEVICE void tokens(const Slots& s, uint32_t live, int64_t first_seq,
                         const PolicyInputs<Raw>& raw, LossSums<16>& all) const {
    SequenceTerm terms[kItems];
    terms_of(a.base, s, first_seq, terms);
    const PolicyInputs<Values> in = values(s, raw);
    float grad[kItems], grad_entropy[kItems];
    TokenSums sums;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      grad[k] = grad_entropy[k] = 0.f;
      if (!(live >> k & 1u)) continue;
      const float weight = terms[k].weight;
      const PolicyToken<float> t = token(in, k, terms[k]);
      const PolicyTerms<float> x = policy_terms<variant, is_usual>(o, c, t);
      const float entropy = in.entropy.at[k];
      // The linear variant's policy term holds its KL.
      const float with_kl =
          variant == Variant::linear ? x.policy : vfma(c.kl_coef, x.weighted_kl, x.policy);
      sums.loss += weight * vfma(-c.entropy_coef, entropy, with_kl);
      sums.policy += weight * x.policy;
      sums.entropy += entropy;
      sums.kl += x.kl;
      sums.d += x.d;
      sums.d_sq = vfma(x.d, x.d, sums.d_sq);
      sums.k3 += x.k3;
      sums.ratio += x.ratio;
      sums.ratio_sq += double(x.ratio) * double(x.ratio);
      sums.clip_low += x.clip_low;
      sums.clip_high += x.clip_high;
      sums.clip_dual += x.clip_dual;
      sums.clip_eps += x.clip_eps;
      all.ratio(x.ratio, x.ratio);
      grad[k] = weight * x.grad;
      grad_entropy[k] = -weight * c.entropy_coef;
    }
    sums.flush(all.sums);
    if (a.grad_logprobs) store_items(a.grad_logprobs, a.base.wide_grads, s, grad);
    if (a.grad_entropy) store_items(a.grad_entropy, a.base.wide_grads, s, grad_entropy);
  }
};

// `is_usual`: see usual() in ppo_loss.cu.
template <Variant variant, bool is_usual>
__global__ void __launch_bounds__(kTokenThreads, 2)
    ppo_loss_kernel(const __grid_constant__ PolicyLossArgs a) {
  loss_kernel<16>(a.base, PolicyStep<variant, is_usual>(a));
}

}  // namespace ppo::cuda
