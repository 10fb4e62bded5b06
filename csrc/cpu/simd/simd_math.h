// Elementary functions over lanes (no include guard, see simd.h).
namespace ppo::PPO_ISA {

// exp(r) - 1 for |r| <= ln2/2: r + r^2 q(r), q minimax of degree 4, relative error of exp 4e-9.
template <class T>
PPO_INLINE T expm1_reduced(T r) {
  T q = set1<T>(0x1.6a2256p-10f);
  q = vfma(q, r, set1<T>(0x1.123b02p-7f));
  q = vfma(q, r, set1<T>(0x1.5558f8p-5f));
  q = vfma(q, r, set1<T>(0x1.555490p-3f));
  q = vfma(q, r, set1<T>(0x1.fffffcp-2f));
  return vfma(q * r, r, r);
}

// x = n ln2 + r; ln2 in two parts, the first short enough that n times it is exact.
template <class T>
struct Reduced {
  T n, r;
};
template <class T>
PPO_INLINE Reduced<T> reduce_exp(T x) {
  const T n = round_even(x * set1<T>(0x1.715476p+0f));
  const T r = vfma(n, set1<T>(-0x1.62e4p-1f), x);
  return {n, vfma(n, set1<T>(-0x1.7f7d1cp-20f), r)};
}

// exp over the whole range, subnormal results included.
template <class T>
PPO_INLINE T vexp(T x) {
  const T bounded = vmin(set1<T>(89.f), vmax(set1<T>(-105.f), x));  // keeps a NaN
  const auto [n, r] = reduce_exp(bounded);
  const T half = round_even(n * set1<T>(0.5f));
  return ((expm1_reduced(r) + set1<T>(1.f)) * pow2(half)) * pow2(n - half);
}

// exp of it is exactly 0: below it nothing changes, and 0 * x stays 0 where a logit is -inf.
template <class T>
constexpr scalar_t<T> kLowest = sizeof(scalar_t<T>) == 8 ? -750 : -105;

// exp for x in [-105, 1] (or NaN), cheaper; what is below the normal range (x < -87.3) may give 0,
// and exp(-105) does.
template <class T>
PPO_INLINE T vexp_neg(T x) {
  const auto [n, r] = reduce_exp(x);
  const T e = (expm1_reduced(r) + set1<T>(1.f)) * pow2(n);
  return select(x < set1<T>(-87.3f), set1<T>(0.f), e);
}

#if PPO_ISA_WIDTH == 16
// scalef underflows and overflows by itself.
PPO_INLINE F vexp(F x) {
  const auto [n, r] = reduce_exp(vmin(set1<F>(89.f), vmax(set1<F>(-105.f), x)));
  return scalef(expm1_reduced(r) + set1<F>(1.f), n);
}
PPO_INLINE F vexp_neg(F x) {
  const auto [n, r] = reduce_exp(x);
  return scalef(expm1_reduced(r) + set1<F>(1.f), n);
}
#endif

template <class T>
PPO_INLINE T vexpm1(T x) {
  const T bounded = vmin(set1<T>(89.f), vmax(set1<T>(-30.f), x));
  const auto [n, r] = reduce_exp(bounded);
  // 2 (2^(n-1) e + (2^(n-1) - 1/2)): 2^128 itself would overflow.
  const T scale = pow2(n - set1<T>(1.f));
  const T half = vfma(scale, expm1_reduced(r), scale - set1<T>(0.5f));
  return select(x == set1<T>(0.f), x, half + half);
}

template <>
PPO_INLINE double vexp(double x) {
  return ::exp(x);
}
template <>
PPO_INLINE double vexp_neg(double x) {
  return ::exp(x);
}
template <>
PPO_INLINE double vexpm1(double x) {
  return ::expm1(x);
}
PPO_INLINE float vlog(float x) { return ::logf(x); }
PPO_INLINE double vlog(double x) { return ::log(x); }

}  // namespace ppo::PPO_ISA
