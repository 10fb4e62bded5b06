// Kernels over a segment of a student's and a teacher's rows of logits: sums of a divergence, and
// its gradient (no include guard, see foreach_isa.h).
//
// P and Q are log-probabilities, of the student and the teacher, p and q the probabilities, m the
// mixture (1 - beta) p + beta q.
#include "logprobs_simd.h"

namespace ppo::PPO_ISA {

// Terms are summed in blocks, lane by lane, and blocks in double: few roundings reach a sum,
// however many columns there are.
constexpr int64_t kTermBlock = 256;

// Log-probabilities from logits.
template <class T>
struct LogProbs {
  T inv_temperature, neg_max, log_sum;
  PPO_INLINE explicit LogProbs(const SideState& s)
      : inv_temperature(set1<T>(scalar_t<T>(s.inv_temperature))),
        neg_max(set1<T>(scalar_t<T>(-s.row_max))),
        log_sum(set1<T>(scalar_t<T>(s.log_sum))) {}
  PPO_INLINE T of(T x) const { return vfma(x, inv_temperature, neg_max) - log_sum; }
};

// A log-probability whose exponential is exactly 0 where it is lower still; a NaN stays.
template <class T>
PPO_INLINE T floored(T ln) {
  return vmax(set1<T>(kLowest<T>), ln);
}

// e^a (a - b): 0 where a is -inf, infinite where b alone is.
template <class T>
PPO_INLINE T kl_of(T a, T b) {
  const T never = set1<T>(-__builtin_inff()), term = vexp_neg(floored(a)) * (a - b);
  return select(a == never, set1<T>(0), select(b == never, -never, term));
}

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)]: f + f^2 q(f), q minimax of degree 8, relative
// error 6e-9.
template <class T>
PPO_INLINE T log1p_reduced(T f) {
  T q = set1<T>(-0x1.383660p-4f);
  q = vfma(q, f, set1<T>(0x1.084adap-3f));
  q = vfma(q, f, set1<T>(-0x1.0f374ep-3f));
  q = vfma(q, f, set1<T>(0x1.22712ap-3f));
  q = vfma(q, f, set1<T>(-0x1.542760p-3f));
  q = vfma(q, f, set1<T>(0x1.99a3fap-3f));
  q = vfma(q, f, set1<T>(-0x1.000426p-2f));
  q = vfma(q, f, set1<T>(0x1.555550p-2f));
  q = vfma(q, f, set1<T>(-0x1.fffff8p-2f));
  return vfma(q * f, f, f);
}

// e^x, and ln(w + v e^x) where v = 1 - w and x <= 0: exactly 0 at x = 0, else to 1-2 ulp.
template <class T>
struct Mixed {
  T exp, log;
};
template <class T>
PPO_INLINE Mixed<T> mixed(T x, T v, T w) {
  const T one = set1<T>(1);
  // Below e^-87, where 2^n would be subnormal, the exponential is e^-87.
  const auto [n, r] = reduce_exp(vmax(set1<T>(-87.f), x));
  const T scale = pow2(n), part = expm1_reduced(r);
  const T e = vfma(scale, part, scale), expm1 = vfma(scale, part, scale - one);
  const T sum = vfma(v, e, w);
  const auto near = near_one(sum);
  // Where the sum is near 1 its distance from 1 is known better than the sum.
  const T f = select(near.scale == one, v * expm1, near.scale * sum - one);
  const T high = vfma(near.k, set1<T>(0x1.62e4p-1f), log1p_reduced(f));
  return {e, vfma(near.k, set1<T>(0x1.7f7d1cp-20f), high)};
}
template <>
PPO_INLINE Mixed<double> mixed(double x, double v, double w) {
  const double d = v * ::expm1(x);
  return {::exp(x), d > -0.25 ? ::log1p(d) : ::log(w + v * ::exp(x))};
}

// ln(p / m) and ln(q / m) of finite log-probabilities, the larger of p and q, and the smaller over
// the larger. Only the difference of P and Q matters, so no probability that is 0 is divided by.
template <class T>
struct Mixture {
  T beta, rest;
  PPO_INLINE explicit Mixture(double b)
      : beta(set1<T>(scalar_t<T>(b))), rest(set1<T>(scalar_t<T>(1.0 - b))) {}

  // The larger one's logarithm is -ln(w + v e^-d) >= 0, d the distance and w the weight of the
  // larger one; the smaller one's is d less.
  struct Logs {
    T high, low, exp;
    mask_t<T> teacher_higher;
    PPO_INLINE T student() const { return select(teacher_higher, low, high); }
    PPO_INLINE T teacher() const { return select(teacher_higher, high, low); }
  };
  PPO_INLINE Logs of(T P, T Q) const {
    const T d = Q - P, far = vabs(d);
    const mask_t<T> above = d > set1<T>(0);
    const Mixed<T> mix = mixed(-far, select(above, rest, beta), select(above, beta, rest));
    const T high = -mix.log;
    return {high, high - far, mix.exp, above};
  }
};

// Sums of p ln(p / q) and q ln(q / p), which a kind has one or both of; for jsd of p ln(p / m) and
// q ln(q / m).
template <Divergence kind, class T>
struct Terms {
  static constexpr bool has_kl = kind != Divergence::forward;
  static constexpr bool has_other = kind != Divergence::reverse;
  T kl = set1<T>(0), other = set1<T>(0);

  PPO_INLINE Terms() {}
  PPO_INLINE void add(T P, T Q, const Mixture<T>& mixture) {
    if constexpr (kind == Divergence::jsd) {
      const T a = floored(P), b = floored(Q);
      const auto logs = mixture.of(a, b);
      const T larger = vexp_neg(vmax(b, a)), smaller = larger * logs.exp;
      const T high = larger * logs.high, low = smaller * logs.low;
      kl = kl + select(logs.teacher_higher, low, high);
      other = other + select(logs.teacher_higher, high, low);
    } else {
      if constexpr (has_kl) kl = kl + kl_of(P, Q);
      if constexpr (has_other) other = other + kl_of(Q, P);
    }
  }
};

template <Divergence kind, class T, class S>
inline DivergenceSums segment_sums(const S* x, const S* y, int64_t n, const TwoSides& sides) {
  const LogProbs<T> student(sides.student), teacher(sides.teacher);
  const Mixture<T> mixture(sides.beta);
  const auto fill = -__builtin_inff();
  Acc<T> kl, other;
  for (int64_t first = 0; first < n; first += kTermBlock) {
    const int64_t end = n - first < kTermBlock ? n : first + kTermBlock;
    Terms<kind, T> a, b;
    int64_t i = first;
    for (; i + 2 * lanes<T> <= end; i += 2 * lanes<T>) {
      prefetch<T>(x + i);
      prefetch<T>(y + i);
      a.add(student.of(load<T>(x + i)), teacher.of(load<T>(y + i)), mixture);
      b.add(student.of(load<T>(x + i + lanes<T>)), teacher.of(load<T>(y + i + lanes<T>)), mixture);
    }
    for (; i < end; i += lanes<T>) {
      a.add(student.of(load_n<T>(x + i, end - i, fill)),
            teacher.of(load_n<T>(y + i, end - i, fill)), mixture);
    }
    if constexpr (Terms<kind, T>::has_kl) kl.add(a.kl + b.kl);
    if constexpr (Terms<kind, T>::has_other) other.add(a.other + b.other);
  }
  return {kl.total(), other.total()};
}

template <Divergence kind>
inline DivergenceSums divergence_sums(DType dtype, const void* x, const void* y, int64_t n,
                                      const TwoSides& sides) {
  switch (dtype) {
    case DType::f32:
      return segment_sums<kind, F>(static_cast<const float*>(x), static_cast<const float*>(y), n,
                                   sides);
    case DType::bf16:
      return segment_sums<kind, F>(static_cast<const bf16*>(x), static_cast<const bf16*>(y), n,
                                   sides);
    case DType::f16:
      return segment_sums<kind, F>(static_cast<const fp16*>(x), static_cast<const fp16*>(y), n,
                                   sides);
    default:
      return segment_sums<kind, double>(static_cast<const double*>(x),
                                        static_cast<const double*>(y), n, sides);
  }
}

// p (slope P + offset + by_kl L) - by_q q, where L is ln(p / q), or ln(p / m) for jsd: exactly 0
// where p is, but for the last term.
template <Divergence kind, class T>
struct DivergenceLanes {
  LogProbs<T> student, teacher;
  Mixture<T> mixture;
  T slope, offset, by_kl, by_q;

  PPO_INLINE explicit DivergenceLanes(const DivergenceGradient& g)
      : student(g.sides.student),
        teacher(g.sides.teacher),
        mixture(g.sides.beta),
        slope(set1<T>(scalar_t<T>(g.row.slope))),
        offset(set1<T>(scalar_t<T>(g.row.offset))),
        by_kl(set1<T>(scalar_t<T>(g.by_kl))),
        by_q(set1<T>(scalar_t<T>(g.by_q))) {}

  PPO_INLINE T of(T x, T y) const {
    const T P = floored(student.of(x)), Q = teacher.of(y), p = vexp_neg(P);
    T own = vfma(slope, P, offset);
    if constexpr (kind == Divergence::jsd) {
      own = p * vfma(by_kl, mixture.of(P, floored(Q)).student(), own);
    } else if constexpr (kind == Divergence::forward) {
      own = p * own;
    } else {
      own = select(p == set1<T>(0), p, p * vfma(by_kl, P - Q, own));
    }
    if constexpr (kind == Divergence::forward || kind == Divergence::mixed) {
      own = own - by_q * vexp_neg(floored(Q));
    }
    return own;
  }
};

// `out` may be `x`.
template <Divergence kind, class T, class S>
inline void segment_divergence(const S* x, const S* y, S* out, int64_t n,
                               const DivergenceGradient& row) {
  const DivergenceLanes<kind, T> lane(row);
  int64_t i = 0;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    prefetch<T>(x + i);
    prefetch<T>(y + i);
    const T a = lane.of(load<T>(x + i), load<T>(y + i));
    const T b = lane.of(load<T>(x + i + lanes<T>), load<T>(y + i + lanes<T>));
    store(out + i, a);
    store(out + i + lanes<T>, b);
  }
  for (; i < n; i += lanes<T>) {
    store_n(out + i, lane.of(load_n<T>(x + i, n - i, 0), load_n<T>(y + i, n - i, 0)), n - i);
  }
}

template <Divergence kind>
inline void divergence_gradient(DType dtype, const void* x, const void* y, void* out, int64_t n,
                                const DivergenceGradient& row) {
  switch (dtype) {
    case DType::f32:
      return segment_divergence<kind, F>(static_cast<const float*>(x),
                                         static_cast<const float*>(y), static_cast<float*>(out), n,
                                         row);
    case DType::bf16:
      return segment_divergence<kind, F>(static_cast<const bf16*>(x), static_cast<const bf16*>(y),
                                         static_cast<bf16*>(out), n, row);
    case DType::f16:
      return segment_divergence<kind, F>(static_cast<const fp16*>(x), static_cast<const fp16*>(y),
                                         static_cast<fp16*>(out), n, row);
    default:
      return segment_divergence<kind, double>(static_cast<const double*>(x),
                                              static_cast<const double*>(y),
                                              static_cast<double*>(out), n, row);
  }
}

}  // namespace ppo::PPO_ISA
