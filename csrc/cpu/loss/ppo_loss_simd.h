// Policy loss kernel: gradients and undivided sums from one pass over a range of tokens (no
// include guard, see foreach_isa.h).
#include "../../math.h"
#include "pieces.h"

namespace ppo::PPO_ISA {

// Whether a KL term may have a weight, so that the loss needs a sum of its own for it.
template <Variant variant, bool is_usual>
constexpr bool kWeighsKl = !is_usual && variant != Variant::penalty && variant != Variant::linear;

template <class T>
struct PolicySums {
  // Sums of the current piece, unweighted; then of the pieces before it, weighted if the loss is.
  T policy, entropy, kl, weighted_kl;
  T loss_before, policy_before, entropy_before, kl_before;
  T d, d_sq, k3, ratio, ratio_sq, ratio_min, ratio_max;
  int64_t clip_low = 0, clip_high = 0, clip_dual = 0, clip_eps = 0;

  PPO_INLINE PolicySums() {
    policy = entropy = kl = weighted_kl = set1<T>(0);
    loss_before = policy_before = entropy_before = kl_before = set1<T>(0);
    d = d_sq = k3 = ratio = ratio_sq = set1<T>(0);
    ratio_min = set1<T>(__builtin_inff());
    ratio_max = set1<T>(-__builtin_inff());
  }
  template <bool weighs_kl, LaneMask which>
  PPO_INLINE void add(Lanes<T, which> at, const PolicyTerms<T>& x, T token_entropy) {
    const T kept = at.only(x.ratio);
    const bool every = which == LaneMask::every;
    policy = policy + x.policy;
    entropy = entropy + token_entropy;
    kl = kl + x.kl;
    if constexpr (weighs_kl) weighted_kl = weighted_kl + x.weighted_kl;
    d = d + x.d;
    d_sq = vfma(x.d, x.d, d_sq);
    k3 = k3 + x.k3;
    ratio = ratio + kept;
    ratio_sq = vfma(kept, kept, ratio_sq);
    clip_low += count(x.clip_low);
    clip_high += count(x.clip_high);
    clip_dual += count(x.clip_dual);
    clip_eps += count(x.clip_eps);
    ratio_min = vmin(every ? x.ratio : select(at.live, x.ratio, ratio_min), ratio_min);
    ratio_max = vmax(every ? x.ratio : select(at.live, x.ratio, ratio_max), ratio_max);
  }
  // Closes a piece: all of its tokens have the same weight.
  template <Variant variant, bool is_usual>
  PPO_INLINE void close_piece(T weight, const PolicyConsts<T>& c) {
    // The linear variant's policy term holds its KL.
    const T term = kWeighsKl<variant, is_usual> ? weighted_kl : kl;
    const T with_kl = variant == Variant::linear ? policy : vfma(c.kl_coef, term, policy);
    const T loss = vfma(-c.entropy_coef, entropy, with_kl);
    loss_before = vfma(weight, loss, loss_before);
    policy_before = vfma(weight, policy, policy_before);
    entropy_before = entropy_before + entropy;
    kl_before = kl_before + kl;
    policy = entropy = kl = weighted_kl = set1<T>(0);
  }
  void flush(double* stats) const {
    stats[kLoss] += double(reduce_add(loss_before));
    stats[kPolicyLoss] += double(reduce_add(policy_before));
    stats[kEntropy] += double(reduce_add(entropy_before));
    stats[kRefKl] += double(reduce_add(kl_before));
    stats[kKlK1] -= double(reduce_add(d));
    stats[kKlK2] += 0.5 * double(reduce_add(d_sq));
    stats[kKlK3] += double(reduce_add(k3));
    stats[kRatio] += double(reduce_add(ratio));
    stats[kRatioSq] += double(reduce_add(ratio_sq));
    stats[kClipLow] += double(clip_low);
    stats[kClipHigh] += double(clip_high);
    stats[kClipDual] += double(clip_dual);
    stats[kClipEps] += double(clip_eps);
    stats[kRatioMin] = vmin(double(reduce_min(ratio_min)), stats[kRatioMin]);
    stats[kRatioMax] = vmax(double(reduce_max(ratio_max)), stats[kRatioMax]);
  }
};

template <class T>
struct PolicyBuffers {
  Buffer<T> logprobs, old_logprobs, advantages, is_weights, entropy, ref_logprobs;
  uint8_t mask[kBlock];
};

// Inputs and outputs of one piece. Absent old_logprobs are the current ones.
template <class T>
struct PolicyRows {
  const scalar_t<T>*logprobs, *old_logprobs, *advantages, *is_weights, *entropy, *ref_logprobs;
  const uint8_t* mask;
  scalar_t<T>*grad_logprobs, *grad_entropy;
  T weight, grad_weight, seq_ratio;
  mask_t<T> seq_held;

  PolicyRows(const PolicyLossArgs& a, const PolicyConsts<T>& c, const Piece& p,
             PolicyBuffers<T>& b) {
    logprobs = fetch_piece<T>(a.logprobs, p, b.logprobs);
    old_logprobs = fetch_piece<T>(a.old_logprobs, p, b.old_logprobs);
    if (!old_logprobs) old_logprobs = logprobs;
    advantages = fetch_piece<T>(a.advantages, p, b.advantages);
    is_weights = fetch_piece<T>(a.is_weights, p, b.is_weights);
    entropy = fetch_piece<T>(a.entropy, p, b.entropy);
    ref_logprobs = fetch_piece<T>(a.ref_logprobs, p, b.ref_logprobs);
    mask = fetch_mask(a.base.mask, p, b.mask);
    grad_logprobs = offset(a.grad_logprobs, p);
    grad_entropy = offset(a.grad_entropy, p);
    const double* w = a.base.weight;
    const double token_weight = w ? w[p.sequence] : 1.0;
    weight = set1<T>(scalar_t<T>(token_weight));
    grad_weight = set1<T>(scalar_t<T>(token_weight * a.base.inverse_denom));
    seq_ratio = set1<T>(1);
    seq_held = first_n<T>(0);
    if (a.mean_log_ratio) {
      const T mean = set1<T>(scalar_t<T>(a.mean_log_ratio[p.sequence]));
      seq_ratio = exp_parts(clamp(mean, c.d_min, c.d_max)).exp;
      seq_held = (mean < c.d_min) | (mean > c.d_max);
    }
  }
  static scalar_t<T>* offset(void* grad, const Piece& p) {
    return grad ? static_cast<scalar_t<T>*>(grad) + p.flat : nullptr;
  }
};

template <Variant variant, bool is_usual, class T>
struct PolicyStep {
  const PolicyOptions& o;
  const PolicyConsts<T>& c;
  const PolicyRows<T>& rows;
  PolicySums<T>& sums;

  template <LaneMask which>
  PPO_INLINE void tokens(Lanes<T, which> at) const {
    const T zero = set1<T>(0), one = set1<T>(1);
    PolicyToken<T> t;
    t.logprobs = at.read(rows.logprobs);
    t.old_logprobs = at.read(rows.old_logprobs);
    t.advantage = at.read(rows.advantages);
    if (o.whiten) t.advantage = at.only(whiten_advantage(c, t.advantage));
    t.is_weight = rows.is_weights ? at.read(rows.is_weights) : one;
    t.ref_logprobs = o.has_ref ? at.read(rows.ref_logprobs) : zero;
    t.seq_ratio = which == LaneMask::every ? rows.seq_ratio : select(at.live, rows.seq_ratio, one);
    t.seq_held = rows.seq_held;
    const PolicyTerms<T> x = policy_terms<variant, is_usual>(o, c, t);
    sums.template add<kWeighsKl<variant, is_usual>>(at, x,
                                                    rows.entropy ? at.read(rows.entropy) : zero);
    if (rows.grad_logprobs) at.write(rows.grad_logprobs, rows.grad_weight * x.grad);
    if (rows.grad_entropy) at.write(rows.grad_entropy, -rows.grad_weight * c.entropy_coef);
  }
  template <LaneMask which>
  PPO_INLINE void nothing(Lanes<T, which> at) const {
    if (rows.grad_logprobs) at.write(rows.grad_logprobs, set1<T>(0));
    if (rows.grad_entropy) at.write(rows.grad_entropy, set1<T>(0));
  }
};

// The usual options of most trainers, compiled apart with fewer live registers.
inline bool usual(const PolicyLossArgs& a) {
  const PolicyOptions& o = a.policy;
  return o.estimator == Estimator::k3 && !o.straight_through && !o.has_dual &&
         o.kl_weight == KlWeight::none && !a.is_weights.data && o.log_ratio_min >= -kExpInside &&
         o.log_ratio_max <= kExpInside;
}

// Processes slots [first, last), at most kRun<T>; adds their sums to stats.
template <Variant variant, bool is_usual, class T>
void policy_run(const PolicyLossArgs& a, int64_t first, int64_t last, double* stats) {
  PolicyBuffers<T> buffers;
  PolicyOptions options = a.policy;
  if (is_usual) {
    options.estimator = Estimator::k3;
    options.straight_through = options.has_dual = false;
  }
  const PolicyConsts<T> consts(options);
  PolicySums<T> sums;
  for (int64_t slot = first; slot < last;) {
    const Piece piece = piece_at(a.base.seqs, slot, last);
    PolicyRows<T> rows(a, consts, piece, buffers);
    if (is_usual) rows.is_weights = nullptr;
    const PolicyStep<variant, is_usual, T> step{options, consts, rows, sums};
    each_lanes<T>(rows.mask, piece.size, step);
    sums.template close_piece<variant, is_usual>(rows.weight, consts);
    slot += piece.size;
  }
  sums.flush(stats);
}

template <Variant variant, bool is_usual, class T>
void policy_runs(const PolicyLossArgs& a, int64_t first, int64_t last, double* stats) {
  for (; first < last; first += kRun<T>) {
    const int64_t end = first + kRun<T> < last ? first + kRun<T> : last;
    policy_run<variant, is_usual, T>(a, first, end, stats);
  }
}

// Writes the gradients of slots [first, last), a block; adds their sums to stats (kNStats).
template <class T>
void policy_block(const PolicyLossArgs& a, int64_t first, int64_t last, double* stats) {
  switch (a.policy.variant) {
    case Variant::clip:
      if (usual(a)) return policy_runs<Variant::clip, true, T>(a, first, last, stats);
      return policy_runs<Variant::clip, false, T>(a, first, last, stats);
    case Variant::gspo:
      return policy_runs<Variant::gspo, false, T>(a, first, last, stats);
    case Variant::cispo:
      return policy_runs<Variant::cispo, false, T>(a, first, last, stats);
    case Variant::penalty:
      return policy_runs<Variant::penalty, false, T>(a, first, last, stats);
    case Variant::linear:
      return policy_runs<Variant::linear, false, T>(a, first, last, stats);
    case Variant::given:
      return policy_runs<Variant::given, false, T>(a, first, last, stats);
  }
}

// Mean log-ratio of sequence s over its `live` tokens; summed in double, so that the position of
// padding does not survive the rounding to T.
template <class T>
double mean_log_ratio(const PolicyLossArgs& a, int64_t s, int64_t live) {
  Buffer<T> logprobs, old_logprobs;
  uint8_t mask_buffer[kBlock];
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
      const int64_t left = size - i;
      const Lanes<T, LaneMask::tail> at{i, left, live_lanes<T>(mask, i, left)};
      sum.add(at.read(now) - at.read(old));
    }
    slot += size;
  }
  return sum.total() / double(live);
}

// Names for PPO_SELECT: F is a different type for every instruction set.
inline void policy_block_f(const PolicyLossArgs& a, int64_t first, int64_t last, double* stats) {
  policy_block<F>(a, first, last, stats);
}
inline double mean_log_ratio_f(const PolicyLossArgs& a, int64_t s, int64_t live) {
  return mean_log_ratio<F>(a, s, live);
}

}  // namespace ppo::PPO_ISA
