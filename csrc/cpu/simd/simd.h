// The lane vocabulary of kernels, once per instruction set (no include guard, see foreach_isa.h).
//
// A kernel is a template over T: `F` (lanes<F> fp32 lanes; in ppo::scalar F is float itself), or
// float or double as one lane. For each T:
//   lanes<T>  scalar_t<T>  mask_t<T>
//   set1<T>(s)  load<T>(p)  load_n<T>(p, n, fill)  store(p, x)  store_n(p, x, n)
//       p: fp32, bf16 or fp16 storage (double for T = double), any alignment; lanes >= n read as
//       `fill` and are neither read nor written
//   load_mask<T>(bytes)  load_mask_n<T>(bytes, n)  first_n<T>(n)      lanes >= n are false
//   store_mask(bytes, m)  store_mask_n(bytes, m, n)      as bytes of 0 and 1
//   + - * / and unary -;  < <= > >= == (false on NaN), != (true on NaN);  & | ! on masks
//   vfma(a, b, c) = a*b + c  select(mask, a, b)  vabs  vsqrt
//   vmin(a, b) = a < b ? a : b  vmax(a, b) = a > b ? a : b     so a NaN in either gives b
//   any(m)  all(m)  count(m)
//   reduce_add(x)  reduce_min(x)  reduce_max(x)     in one fixed order
//   vexp  vexpm1      1-2 ulp; -inf -> 0 / -1, overflow -> inf, NaN -> NaN
//   vexp_neg(x)       for x in [-105, 1], cheaper
//   vlog(float)  vlog(double)
//   near_one(x)       for x > 0: (scale, k), scale = 2^-k, with scale * x in [sqrt(1/2), sqrt(2))
//   Acc<T>            sum in double: add(x), add_square(x), total()
// With eight lanes also these of F, for steps along the lanes. A level s = 1, 2 or 4 sees blocks
// of 2s lanes, and in each its earlier and its later half:
//   later_half<s>(x)             the first lane of the later half, in every lane of the earlier
//   one earlier_half<s>(a, b)        b in the earlier halves, a in the later ones
//   fold_half<s>(a, x)           a * later_half<s>(x) + x in the earlier halves, x in the later
//   ones or_later<s>(m)               m | later_half<s>(m) in the earlier halves, m in the later
//   ones shift_in(x, last)            lane i + 1 in lane i, and `last`, which is the same in all
//   lanes first_lane(x)                the first lane in all lanes mask_bits(m) lane i as bit i
// The fp32 functions run the same operations in every lane and tail. Multiply-add is never
// contracted (-ffp-contract=off); vfma is fused wherever the instruction set can.
namespace ppo::PPO_ISA {

template <class T>
struct Lane;  // count, Scalar, Mask, Acc of lane type T
template <class T>
struct Tag {};

template <class T>
constexpr int lanes = Lane<T>::count;
template <class T>
using scalar_t = typename Lane<T>::Scalar;
template <class T>
using mask_t = typename Lane<T>::Mask;
template <class T>
using Acc = typename Lane<T>::Accumulator;

struct ScalarAcc {
  double sum = 0;
  template <class T>
  PPO_INLINE void add(T x) {
    sum += double(x);
  }
  template <class T>
  PPO_INLINE void add_square(T x) {
    sum += double(x) * double(x);
  }
  PPO_INLINE double total() const { return sum; }
};

template <>
struct Lane<float> {
  static constexpr int count = 1;
  using Scalar = float;
  using Mask = bool;
  using Accumulator = ScalarAcc;
};
template <>
struct Lane<double> {
  static constexpr int count = 1;
  using Scalar = double;
  using Mask = bool;
  using Accumulator = ScalarAcc;
};

PPO_INLINE float set1_as(Tag<float>, float x) { return x; }
PPO_INLINE double set1_as(Tag<double>, double x) { return x; }

template <class P>
PPO_INLINE float load_as(Tag<float>, const P* p) {
  return to_float(*p);
}
PPO_INLINE double load_as(Tag<double>, const double* p) { return *p; }
template <class P>
PPO_INLINE float load_n_as(Tag<float>, const P* p, int64_t n, float fill) {
  return n > 0 ? to_float(*p) : fill;
}
PPO_INLINE double load_n_as(Tag<double>, const double* p, int64_t n, double fill) {
  return n > 0 ? *p : fill;
}

template <class P>
PPO_INLINE void store(P* p, float x) {
  from_float(x, p);
}
PPO_INLINE void store(double* p, double x) { *p = x; }
template <class P, class T>
PPO_INLINE void store_n(P* p, T x, int64_t n) {
  if (n > 0) store(p, x);
}

PPO_INLINE bool mask_as(Tag<float>, const uint8_t* p) { return *p != 0; }
PPO_INLINE bool mask_as(Tag<double>, const uint8_t* p) { return *p != 0; }
PPO_INLINE bool mask_n_as(Tag<float>, const uint8_t* p, int64_t n) { return n > 0 && *p != 0; }
PPO_INLINE bool mask_n_as(Tag<double>, const uint8_t* p, int64_t n) { return n > 0 && *p != 0; }
PPO_INLINE void store_mask(uint8_t* p, bool m) { *p = m; }
PPO_INLINE void store_mask_n(uint8_t* p, bool m, int64_t n) {
  if (n > 0) *p = m;
}
PPO_INLINE bool first_n_as(Tag<float>, int64_t n) { return n > 0; }
PPO_INLINE bool first_n_as(Tag<double>, int64_t n) { return n > 0; }

template <class T>
PPO_INLINE T set1(scalar_t<T> x) {
  return set1_as(Tag<T>{}, x);
}
template <class T, class P>
PPO_INLINE T load(const P* p) {
  return load_as(Tag<T>{}, p);
}
template <class T, class P>
PPO_INLINE T load_n(const P* p, int64_t n, scalar_t<T> fill) {
  return load_n_as(Tag<T>{}, p, n, fill);
}
template <class T>
PPO_INLINE mask_t<T> load_mask(const uint8_t* p) {
  return mask_as(Tag<T>{}, p);
}
template <class T>
PPO_INLINE mask_t<T> load_mask_n(const uint8_t* p, int64_t n) {
  return mask_n_as(Tag<T>{}, p, n);
}
template <class T>
PPO_INLINE mask_t<T> first_n(int64_t n) {
  return first_n_as(Tag<T>{}, n);
}

PPO_INLINE double vfma(double a, double b, double c) { return __builtin_fma(a, b, c); }
// Baseline x86 has no fused instruction and libm's emulation is slow; one more rounding is
// acceptable.
#if PPO_ISA_WIDTH > 1 || !PPO_X86
PPO_INLINE float vfma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
PPO_INLINE float vfma(float a, float b, float c) { return a * b + c; }
#endif
PPO_INLINE float select(bool m, float a, float b) { return m ? a : b; }
PPO_INLINE double select(bool m, double a, double b) { return m ? a : b; }
PPO_INLINE float vmin(float a, float b) { return a < b ? a : b; }
PPO_INLINE double vmin(double a, double b) { return a < b ? a : b; }
PPO_INLINE float vmax(float a, float b) { return a > b ? a : b; }
PPO_INLINE double vmax(double a, double b) { return a > b ? a : b; }
PPO_INLINE float vabs(float a) { return __builtin_fabsf(a); }
PPO_INLINE double vabs(double a) { return __builtin_fabs(a); }
PPO_INLINE float vsqrt(float a) { return __builtin_sqrtf(a); }
PPO_INLINE double vsqrt(double a) { return __builtin_sqrt(a); }
PPO_INLINE bool any(bool m) { return m; }
PPO_INLINE bool all(bool m) { return m; }
PPO_INLINE int count(bool m) { return m; }
PPO_INLINE float reduce_add(float x) { return x; }
PPO_INLINE double reduce_add(double x) { return x; }
PPO_INLINE float reduce_min(float x) { return x; }
PPO_INLINE double reduce_min(double x) { return x; }
PPO_INLINE float reduce_max(float x) { return x; }
PPO_INLINE double reduce_max(double x) { return x; }

// Helpers of the elementary functions below. The integer n of pow2 is read from the low bits of n
// + 1.5 * 2^23.
PPO_INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
PPO_INLINE float pow2(float n) { return as_float((as_bits(n + 0x1.8p23f) << 23) + 0x3f800000u); }

template <class T>
struct NearOne {
  T scale, k;
};
constexpr int32_t kSqrtHalfBits = 0x3f3504f3;
PPO_INLINE NearOne<float> near_one(float x) {
  const int32_t k = (int32_t(as_bits(x)) - kSqrtHalfBits) >> 23;
  return {as_float(0x3f800000u - (uint32_t(k) << 23)), float(k)};
}

#if PPO_ISA_WIDTH == 1
using F = float;
#endif

// sum += x - pivot and squares += (x - pivot)^2, exact in double.
PPO_INLINE void add_deviation(ScalarAcc& sum, ScalarAcc& squares, double x, double pivot) {
  const double d = x - pivot;
  sum.sum += d;
  squares.sum += d * d;
}

}  // namespace ppo::PPO_ISA

#if PPO_ISA_WIDTH > 1
#if PPO_X86
#include "x86.h"
#else
#include "neon.h"
#endif
#endif

namespace ppo::PPO_ISA {

// Loads the first n lanes from p as numbers, bytes as 0 and 1; the other lanes are 0.
template <class T, class P>
PPO_INLINE T load_first(const P* p, int64_t n) {
  return n >= lanes<T> ? load<T>(p) : load_n<T>(p, n, 0);
}
template <class T>
PPO_INLINE T load_first(const uint8_t* p, int64_t n) {
  const auto set = n >= lanes<T> ? load_mask<T>(p) : load_mask_n<T>(p, n);
  return select(set, set1<T>(1), set1<T>(0));
}
template <class P, class T>
PPO_INLINE void store_first(P* p, T x, int64_t n) {
  if (n >= lanes<T>) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// (count, mean, M2) from the sums of deviations from a pivot.
inline void write_moments(double count, double pivot, double sum, double squares, double* out) {
  const double shift = count > 0 ? sum / count : 0.0, m2 = squares - shift * sum;
  out[0] = count;
  out[1] = count > 0 ? pivot + shift : 0.0;
  out[2] = m2 < 0 ? 0.0 : m2;
}

template <class Storage>
PPO_INLINE double element(const void* p, int64_t i) {
  return double(to_float(static_cast<const Storage*>(p)[i]));
}
template <>
PPO_INLINE double element<double>(const void* p, int64_t i) {
  return static_cast<const double*>(p)[i];
}

template <class Storage, class T>
inline void gather(const Storage* p, int64_t stride, int64_t n, T* out) {
  if (stride == 0) {
    const T x = T(element<Storage>(p, 0));
    for (int64_t i = 0; i < n; ++i) out[i] = x;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = T(element<Storage>(p, i * stride));
  }
}

// Widens n contiguous 2-byte elements.
template <class Storage>
inline void widen_row(const Storage* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + lanes<F> <= n; i += lanes<F>) store(out + i, load<F>(p + i));
  for (; i < n; ++i) out[i] = to_float(p[i]);
}

template <class Storage, class T>
inline const T* fetch_as(const View& v, int64_t row, int64_t col, int64_t n, T* buffer) {
  const Storage* p = at<Storage>(v, row, col);
  if constexpr (sizeof(Storage) == 2 && sizeof(T) == 4) {
    if (v.col_stride == 1) {
      widen_row(p, n, buffer);
      return buffer;
    }
  }
  gather(p, v.col_stride, n, buffer);
  return buffer;
}

// Pointer to elements (row, col) .. (row, col + n) as T: into the tensor itself if it is T and
// contiguous along the row, else into `buffer` (room for n), converted. Strides may be any, 0
// included.
template <class T>
inline const T* fetch(const View& v, int64_t row, int64_t col, int64_t n, T* buffer) {
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  if (v.dtype == own && v.col_stride == 1) return at<T>(v, row, col);
  switch (v.dtype) {
    case DType::f32:
      return fetch_as<float>(v, row, col, n, buffer);
    case DType::bf16:
      return fetch_as<bf16>(v, row, col, n, buffer);
    case DType::f16:
      return fetch_as<fp16>(v, row, col, n, buffer);
    default:
      return fetch_as<double>(v, row, col, n, buffer);
  }
}

// The same for a 1-byte mask or flag; non-zero is true.
inline const uint8_t* fetch_bytes(const View& v, int64_t row, int64_t col, int64_t n,
                                  uint8_t* buffer) {
  const uint8_t* p = at<uint8_t>(v, row, col);
  if (v.col_stride == 1) return p;
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * v.col_stride];
  return buffer;
}

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

// Argument whose exp is exactly 0. Clamping there keeps 0 * x at 0 where a logit is -inf.
template <class T>
constexpr scalar_t<T> kLowest = sizeof(scalar_t<T>) == 8 ? -750 : -105;

// exp for x in [-105, 1] or NaN, cheaper. Results below the normal range (x < -87.3) may be 0, and
// exp(-105) is.
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
