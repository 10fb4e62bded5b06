// One pass over a range of tokens: gradients and undivided sums (no include guard).
#include "../math.h"
#include "loss_core.h"

namespace ppo::PPO_ISA {

template <class T>
struct PolicySums {
  T loss, policy, entropy, kl, d, d_sq, k3, ratio, ratio_sq;
  T clip_low, clip_high, clip_dual, clip_eps, ratio_min, ratio_max;

  PPO_INLINE PolicySums() {
    loss = policy = entropy = kl = d = d_sq = k3 = ratio = ratio_sq = set1<T>(0);
    clip_low = clip_high = clip_dual = clip_eps = set1<T>(0);
    ratio_min = set1<T>(__builtin_inff());
    ratio_max = set1<T>(-__builtin_inff());
  }
  PPO_INLINE void add(mask_t<T> live, const PolicyTerms<T>& x, T token_entropy, T weight) {
    const T kept = select(live, x.ratio, set1<T>(0));
    loss = vfma(weight, x.loss, loss);
    policy = vfma(weight, x.policy, policy);
    entropy = entropy + token_entropy;
    kl = kl + x.kl;
    d = d + x.d;
    d_sq = vfma(x.d, x.d, d_sq);
    k3 = k3 + x.k3;
    ratio = ratio + kept;
    ratio_sq = vfma(kept, kept, ratio_sq);
    add_if(clip_low, x.clip_low);
    add_if(clip_high, x.clip_high);
    add_if(clip_dual, x.clip_dual);
    add_if(clip_eps, x.clip_eps);
    ratio_min = vmin(select(live, x.ratio, ratio_min), ratio_min);
    ratio_max = vmax(select(live, x.ratio, ratio_max), ratio_max);
  }
  void flush(double* stats) const {
    stats[kLoss] += double(reduce_add(loss));
    stats[kPolicyLoss] += double(reduce_add(policy));
    stats[kEntropy] += double(reduce_add(entropy));
    stats[kRefKl] += double(reduce_add(kl));
    stats[kKlK1] -= double(reduce_add(d));
    stats[kKlK2] += 0.5 * double(reduce_add(d_sq));
    stats[kKlK3] += double(reduce_add(k3));
    stats[kRatio] += double(reduce_add(ratio));
    stats[kRatioSq] += double(reduce_add(ratio_sq));
    stats[kClipLow] += double(reduce_add(clip_low));
    stats[kClipHigh] += double(reduce_add(clip_high));
    stats[kClipDual] += double(reduce_add(clip_dual));
    stats[kClipEps] += double(reduce_add(clip_eps));
    stats[kRatioMin] = vmin(double(reduce_min(ratio_min)), stats[kRatioMin]);
    stats[kRatioMax] = vmax(double(reduce_max(ratio_max)), stats[kRatioMax]);
  }
};

template <class T>
struct PolicyBuffers {
  Buffer<T> logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs;
  uint8_t mask[kBlock];
};

// Rows of one piece. Absent old_logprobs are the current ones.
template <class T>
struct PolicyRows {
  const scalar_t<T>*logprobs, *old_logprobs, *advantages, *is_weights, *entropy, *ref_logprobs;
  const uint8_t* mask;
  scalar_t<T>*grad_logprobs, *grad_entropy;
  T weight, grad_weight, seq_ratio;

  PolicyRows(const PolicyArgs& a, const Piece& p, PolicyBuffers<T>& b) {
    logprobs = fetch_piece<T>(a.logprobs, p, b.logprobs);
    old_logprobs = fetch_piece<T>(a.old_logprobs, p, b.old_logprobs);
    if (!old_logprobs) old_logprobs = logprobs;
    advantages = fetch_piece<T>(a.advantages, p, b.advantages);
    is_weights = fetch_piece<T>(a.is_weights, p, b.is_weights);
    entropy = fetch_piece<T>(a.entropy, p, b.entropy);
    ref_logprobs = fetch_piece<T>(a.ref_logprobs, p, b.ref_logprobs);
    mask = fetch_mask(a.base.mask, p, b.mask);
    grad_logprobs = static_cast<scalar_t<T>*>(a.grad_logprobs) + p.flat;
    grad_entropy = a.grad_entropy ? static_cast<scalar_t<T>*>(a.grad_entropy) + p.flat : nullptr;
    const double* w = a.base.weight;
    const double token_weight = w ? w[p.sequence] : 1.0;
    weight = set1<T>(scalar_t<T>(token_weight));
    grad_weight = set1<T>(scalar_t<T>(token_weight * a.base.inverse_denom));
    const double mean = a.mean_log_ratio ? a.mean_log_ratio[p.sequence] : 0.0;
    seq_ratio = exp_parts(set1<T>(scalar_t<T>(mean))).exp;
  }
};

template <Variant variant, class T, bool whole>
PPO_INLINE void policy_step(const PolicyOptions& o, const PolicyConsts<T>& c,
                            const PolicyRows<T>& rows, Lanes<T, whole> at, PolicySums<T>& sums) {
  const T zero = set1<T>(0), one = set1<T>(1);
  const mask_t<T> live = at.live(rows.mask);
  PolicyToken<T> t;
  t.logprobs = at.read(rows.logprobs, live);
  t.old_logprobs = at.read(rows.old_logprobs, live);
  t.advantage = at.read(rows.advantages, live);
  if (o.whiten) t.advantage = select(live, whiten_advantage(c, t.advantage), zero);
  t.is_weight = rows.is_weights ? at.read(rows.is_weights, live) : one;
  t.entropy = rows.entropy ? at.read(rows.entropy, live) : zero;
  t.ref_logprobs = o.has_ref ? at.read(rows.ref_logprobs, live) : zero;
  t.seq_ratio = select(live, rows.seq_ratio, one);
  const PolicyTerms<T> x = policy_terms<variant>(o, c, t);
  sums.add(live, x, t.entropy, rows.weight);
  at.write(rows.grad_logprobs, select(live, rows.grad_weight * x.grad, zero));
  if (rows.grad_entropy) {
    at.write(rows.grad_entropy, select(live, -rows.grad_weight * c.entropy_coef, zero));
  }
}

// Slots [first, last), at most kRun<T> of them; adds their sums to stats.
template <Variant variant, class T>
void policy_run(const PolicyArgs& a, int64_t first, int64_t last, double* stats) {
  PolicyBuffers<T> buffers;
  const PolicyConsts<T> consts(a.options);
  PolicySums<T> sums;
  for (int64_t slot = first; slot < last;) {
    const Piece piece = piece_at(a.base.seqs, slot, last);
    const PolicyRows<T> rows(a, piece, buffers);
    int64_t i = 0;
    for (; i + lanes<T> <= piece.size; i += lanes<T>) {
      policy_step<variant>(a.options, consts, rows, Lanes<T, true>{i, lanes<T>}, sums);
    }
    if (i < piece.size) {
      policy_step<variant>(a.options, consts, rows, Lanes<T, false>{i, piece.size - i}, sums);
    }
    slot += piece.size;
  }
  sums.flush(stats);
}

template <Variant variant, class T>
void policy_runs(const PolicyArgs& a, int64_t first, int64_t last, double* stats) {
  for (; first < last; first += kRun<T>) {
    policy_run<variant, T>(a, first, first + kRun<T> < last ? first + kRun<T> : last, stats);
  }
}

// Gradients of slots [first, last), a block; adds their sums to stats (kNStats).
template <class T>
void policy_block(const PolicyArgs& a, int64_t first, int64_t last, double* stats) {
  switch (a.options.variant) {
    case Variant::clip:
      return policy_runs<Variant::clip, T>(a, first, last, stats);
    case Variant::gspo:
      return policy_runs<Variant::gspo, T>(a, first, last, stats);
    case Variant::cispo:
      return policy_runs<Variant::cispo, T>(a, first, last, stats);
    case Variant::penalty:
      return policy_runs<Variant::penalty, T>(a, first, last, stats);
    case Variant::linear:
      return policy_runs<Variant::linear, T>(a, first, last, stats);
  }
}

// Mean clamped log-ratio of sequence s over its `live` tokens, for gspo. In double, so that where
// the padding stands is lost in the rounding to T.
template <class T>
double mean_log_ratio(const PolicyArgs& a, int64_t s, int64_t live) {
  Buffer<T> logprobs, old_logprobs;
  uint8_t mask_buffer[kBlock];
  const PolicyConsts<T> c(a.options);
  Acc<T> sum;
  const SequenceMap& seqs = a.base.seqs;
  if (!a.old_logprobs.data || live == 0) return 0.0;
  for (int64_t slot = seqs.begin(s); slot < seqs.end(s);) {
    const int64_t left = seqs.end(s) - slot, size = left < kBlock ? left : kBlock;
    const Piece p{s, seqs.column(s, slot), slot, size};
    const scalar_t<T>* now = fetch_piece<T>(a.logprobs, p, logprobs);
    const scalar_t<T>* old = fetch_piece<T>(a.old_logprobs, p, old_logprobs);
    const uint8_t* mask = fetch_mask(a.base.mask, p, mask_buffer);
    for (int64_t i = 0; i < size; i += lanes<T>) {
      const Lanes<T, false> at{i, size - i};
      const mask_t<T> keep = at.live(mask);
      sum.add(clamp(at.read(now, keep) - at.read(old, keep), c.d_min, c.d_max));
    }
    slot += size;
  }
  return sum.total() / double(live);
}

// Names that PPO_SELECT can take: F is a different type for every instruction set.
inline void policy_block_f(const PolicyArgs& a, int64_t first, int64_t last, double* stats) {
  policy_block<F>(a, first, last, stats);
}
inline double mean_log_ratio_f(const PolicyArgs& a, int64_t s, int64_t live) {
  return mean_log_ratio<F>(a, s, live);
}

}  // namespace ppo::PPO_ISA
