// One-lane float and double (no include guard, see simd.h for what each function promises).
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
// Baseline x86 has no fused instruction and libm's emulation is slow; one rounding more is fine
// here.
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

// Used by simd_math.h. The integer n of pow2 is read from the low bits of n + 1.5 * 2^23.
PPO_INLINE float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }
PPO_INLINE float pow2(float n) { return as_float((as_bits(n + 0x1.8p23f) << 23) + 0x3f800000u); }

#if PPO_ISA_WIDTH == 1
using F = float;
#endif

}  // namespace ppo::PPO_ISA
