// Token maths of the losses, shared by the CPU's vectors, fp64 and CUDA (no include guard).
//
// Everything is a template over a lane type T and uses only the vocabulary of cpu/simd/simd.h, and
// goes into the namespace of its includer: set1, select, first_n, vfma, vabs, vmin, vmax,
// round_even, pow2 and the operators. cuda/device/math.cuh provides the same words for one float.
// Include loss_options.h first.
namespace ppo::PPO_ISA {

// torch.clamp: a NaN stays NaN.
template <class T>
PPO_INLINE T clamp(T x, T lo, T hi) {
  return vmin(hi, vmax(lo, x));
}

// exp(x), exp(x) - 1 and exp(x) - 1 - x from one range reduction, each to 1-2 ulp of itself.
template <class T>
struct ExpParts {
  T exp, expm1, k3;
};

// With x = n ln2 + r: expm1(r) = r + r^2 q(r), q interpolated at the Chebyshev nodes of
// |r| <= 0.3466 (relative error 1e-8). Where n = 0, r^2 q(r) is k3 itself: nothing cancels near
// 0, and exp(0) is exactly 1. Half of 2^n is applied first: 2^128 overflows before exp does.
// Below exp(-86.6), where that half would be subnormal, exp is 0.
template <class T, bool inside>
PPO_INLINE ExpParts<T> exp_parts_fp32(T x) {
  const T lowest = set1<T>(-86.6f), zero = set1<T>(0.f);
  const T bounded = inside ? x : clamp(x, lowest, set1<T>(89.f));
  const T n = round_even(bounded * set1<T>(0x1.715476p+0f));
  // ln2 in two parts, the first short enough that n times it is exact.
  const T r = vfma(n, set1<T>(-0x1.7f7d1cp-20f), vfma(n, set1<T>(-0x1.62e4p-1f), bounded));
  // Estrin's order: the latency of this chain bounds the speed of the losses.
  const T r2 = r * r;
  const T q0 = vfma(set1<T>(1.66666672e-1f), r, set1<T>(0.5f));
  const T q1 = vfma(set1<T>(8.33331048e-3f), r, set1<T>(4.16664667e-2f));
  const T q2 = vfma(set1<T>(1.98909888e-4f), r, set1<T>(1.39336474e-3f));
  const T q = r2 * vfma(vfma(q2, r2, q1), r2, q0);
  const T p = r + q;
  const T half = pow2(n - set1<T>(1.f));
  const T exp = vfma(half, p, half), expm1 = vfma(half, p, half - set1<T>(0.5f));
  const mask_t<T> near = n == zero;
  const T em1 = select(near, p, expm1 + expm1);
  const T e = exp + exp;
  return {inside ? e : select(x < lowest, zero, e), em1, select(near, q, em1 - x)};
}

// `inside` promises |x| <= kExpInside, or NaN.
constexpr float kExpInside = 86.f;
template <class T, bool inside = false>
PPO_INLINE ExpParts<T> exp_parts(T x) {
  if constexpr (sizeof(scalar_t<T>) == 8) {  // libm is exact enough for fp64
    const T em1 = ::expm1(x);
    return {::exp(x), em1, em1 - x};
  } else {
    return exp_parts_fp32<T, inside>(x);
  }
}

// Constants of a policy loss, broadcast to every lane.
template <class T>
struct PolicyConsts {
  T clip_lo, clip_hi, dual_clip, d_min, d_max, entropy_coef, kl_coef, kl_clamp, kl_ratio_clip;
  T adv_mean_hi, adv_mean_lo, adv_rstd;

  PPO_INLINE explicit PolicyConsts(const PolicyOptions& o)
      : clip_lo(of(1.0 - o.clip_low)),
        clip_hi(of(1.0 + o.clip_high)),
        dual_clip(of(o.dual_clip)),
        d_min(of(o.log_ratio_min)),
        d_max(of(o.log_ratio_max)),
        entropy_coef(of(o.entropy_coef)),
        kl_coef(of(o.kl_coef)),
        kl_clamp(of(o.kl_clamp)),
        kl_ratio_clip(of(o.kl_ratio_clip)),
        adv_mean_hi(of(o.adv_mean)),
        adv_mean_lo(of(o.adv_mean - double(scalar_t<T>(o.adv_mean)))),
        adv_rstd(of(o.adv_rstd)) {}
  PPO_INLINE static T of(double x) { return set1<T>(scalar_t<T>(x)); }
};

// Inputs of one token per lane. Absent old_logprobs are the current ones, an absent is_weight is
// 1, other absent inputs are 0. Masked lanes hold zeros, and any finite is_weight and seq_ratio.
// seq_held: the log-ratio's clamp holds the sequence's mean.
template <class T>
struct PolicyToken {
  T logprobs, old_logprobs, advantage, is_weight, ref_logprobs, seq_ratio;
  mask_t<T> seq_held;
};

// Loss terms of one token per lane, before the division by D: loss = policy + kl_coef weighted_kl
// - entropy_coef entropy (linear: the policy term holds the KL). grad = d loss / d logprobs.
template <class T>
struct PolicyTerms {
  T policy, kl, weighted_kl, grad, d, k3, ratio;
  mask_t<T> clip_low, clip_high, clip_dual, clip_eps;
};

// Whitened advantage. The mean is subtracted in two parts; rstd is 0 where the variance is.
template <class T>
PPO_INLINE T whiten_advantage(const PolicyConsts<T>& c, T advantage) {
  return ((advantage - c.adv_mean_hi) - c.adv_mean_lo) * c.adv_rstd;
}

template <class T>
struct KlTerm {
  T value, weighted, grad;  // grad: of `weighted`, with respect to x
};

// Estimators of KL from x, a difference of log-probabilities (Schulman 2020, "Approximating KL
// Divergence"). `minus` is exp_parts(-x), read for k3 only.
template <class T>
PPO_INLINE KlTerm<T> kl_term(const PolicyOptions& o, const PolicyConsts<T>& c, T x,
                             const ExpParts<T>& minus, T ratio) {
  const T zero = set1<T>(0.f), one = set1<T>(1.f);
  T k = x, g = one;
  if (o.estimator == Estimator::k3) {
    k = minus.k3, g = -minus.expm1;
  } else if (o.estimator == Estimator::k2) {
    k = set1<T>(0.5f) * x * x, g = x;
  } else if (o.estimator == Estimator::abs) {
    k = vabs(x), g = select(x > zero, one, select(x < zero, -one, x));
  }
  g = select(vabs(k) > c.kl_clamp, zero, g);
  if (o.straight_through) g = o.has_kl_ratio_clip ? x * vmin(c.kl_ratio_clip, ratio) : x;
  k = clamp(k, -c.kl_clamp, c.kl_clamp);
  return {k, k, g};
}

// ratio x; 0 times a ratio that overflows is 0, as the exact product would be.
template <class T>
PPO_INLINE T times_ratio(T ratio, T x) {
  const T zero = set1<T>(0.f);
  return select((x == zero) & (ratio >= zero), zero, ratio * x);
}

// The term under kl_weight: W k, its gradient W k' + W' k. W is the ratio, whose gradient is 0
// where `held` (TRL's use_bias_correction_kl), or exp(l - sg l), which is 1 (NeMo-RL).
template <class T>
PPO_INLINE KlTerm<T> weighted_kl(const PolicyOptions& o, const KlTerm<T>& k, T ratio,
                                 mask_t<T> held) {
  if (o.kl_weight == KlWeight::none) return k;
  if (o.kl_weight == KlWeight::score) return {k.value, k.value, k.grad + k.value};
  const T grad = k.grad + select(held, set1<T>(0.f), k.value);
  return {k.value, times_ratio(ratio, k.value), times_ratio(ratio, grad)};
}

// The variant's ratio, and where its log-ratio's clamp holds.
template <class T>
struct Ratio {
  T value;
  mask_t<T> held;
};

// Policy term and its gradient, and where the clip and the dual clip are active.
template <class T>
struct Surrogate {
  T policy, grad;
  mask_t<T> active, dual;
};

// Schulman et al. 2017 (clip, penalty); Ye et al. 2020 (dual clip); Zheng et al. 2025 (gspo);
// MiniMax-M1 2025 (cispo). A NaN ratio counts as unclipped, so the NaN shows in loss and gradient.
// An advantage of 0 times a ratio that overflows gives 0, as the exact product would; so does an
// is_weight of 0 times anything. given: the term is the is_weight and its gradient the advantage.
template <Variant variant, bool usual, class T>
PPO_INLINE Surrogate<T> surrogate(const PolicyOptions& o, const PolicyConsts<T>& c,
                                  const PolicyToken<T>& t, const Ratio<T>& r) {
  const T zero = set1<T>(0.f), ratio = r.value;
  const mask_t<T> never = first_n<T>(0);
  if constexpr (variant == Variant::given) return {t.is_weight, t.advantage, never, never};
  const T minus_a = -t.advantage;
  const T plain = minus_a * ratio, clipped = minus_a * clamp(ratio, c.clip_lo, c.clip_hi);
  const mask_t<T> active = clipped > plain;
  T policy = plain, grad = select(r.held, zero, plain);
  mask_t<T> dual = never, idle = (minus_a == zero) & (ratio >= zero);
  if constexpr (variant == Variant::clip || variant == Variant::gspo) {
    policy = select(active, clipped, plain);
    grad = select(active, zero, grad);
    if (o.has_dual) {
      const T cap = minus_a * c.dual_clip;
      dual = (minus_a > zero) & (policy > cap);
      policy = select(dual, cap, policy);
      grad = select(dual, zero, grad);
    }
  } else if constexpr (variant == Variant::cispo) {
    policy = clipped * t.logprobs;
    grad = clipped;
  } else if constexpr (variant == Variant::linear) {
    if (o.has_ref) {
      const T ref = exp_parts(clamp(t.ref_logprobs - t.old_logprobs, c.d_min, c.d_max)).exp;
      policy = minus_a * (ratio - c.kl_coef * (ratio - ref));
      grad = (set1<T>(1.f) - c.kl_coef) * grad;
      idle = idle & (ref >= zero);
    }
  }
  if constexpr (!usual) {
    const mask_t<T> dropped = t.is_weight == zero;
    policy = select(dropped, zero, select(idle, zero, policy) * t.is_weight);
    grad = select(dropped, zero, select(idle, zero, grad) * t.is_weight);
  }
  return {policy, grad, active, dual};
}

// `usual` promises that the log-ratio's clamp is within kExpInside, that there are no is_weights
// and no kl_weight.
template <Variant variant, bool usual, class T>
PPO_INLINE PolicyTerms<T> policy_terms(const PolicyOptions& o, const PolicyConsts<T>& c,
                                       const PolicyToken<T>& t) {
  const T zero = set1<T>(0.f);
  const T raw = t.logprobs - t.old_logprobs, d = clamp(raw, c.d_min, c.d_max);
  const ExpParts<T> e = exp_parts<T, usual>(d);
  const mask_t<T> held = (raw < c.d_min) | (raw > c.d_max);
  Ratio<T> ratio{e.exp, held};
  if (variant == Variant::gspo || (variant == Variant::given && o.by_sequence)) {
    ratio = {t.seq_ratio, t.seq_held};
  }
  const Surrogate<T> s = surrogate<variant, usual>(o, c, t, ratio);
  KlTerm<T> kl{zero, zero, zero};
  if constexpr (variant == Variant::penalty) {
    kl = kl_term(o, c, -d, e, ratio.value);
    kl.grad = select(ratio.held, zero, -kl.grad);
  } else if (o.has_ref) {
    const T x = t.logprobs - t.ref_logprobs;
    kl = kl_term(o, c, x, o.estimator == Estimator::k3 ? exp_parts(-x) : e, ratio.value);
    if constexpr (!usual) kl = weighted_kl(o, kl, ratio.value, ratio.held);
  }
  T grad = s.grad;
  if (variant != Variant::linear && (o.has_ref || variant == Variant::penalty)) {
    grad = vfma(c.kl_coef, kl.grad, grad);
  }
  const mask_t<T> below = ratio.value<c.clip_lo, above = ratio.value> c.clip_hi;
  const mask_t<T> low = s.active & below, high = s.active & above, outside = below | above;
  return {s.policy, kl.value, kl.weighted, grad, d, e.k3, ratio.value, low, high, s.dual, outside};
}

}  // namespace ppo::PPO_ISA
