// Vectors of eight fp32 lanes (AVX2) or sixteen (AVX-512) (no include guard; contracts in simd.h).
namespace ppo::PPO_ISA {

#if PPO_ISA_WIDTH == 8
struct F {
  __m256 v;
};
struct M {
  __m256 v;
};

// Lanes are promoted in two halves of four; total() adds in lane order.
struct VectorAcc {
  __m256d lo, hi;
  // An implicit constructor would not inherit the pragma's target.
  PPO_INLINE VectorAcc() : lo(_mm256_setzero_pd()), hi(_mm256_setzero_pd()) {}
  PPO_INLINE void add(F x) {
    lo = _mm256_add_pd(lo, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
    hi = _mm256_add_pd(hi, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
  }
  PPO_INLINE void add_square(F x) {
    const __m256d a = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
    const __m256d b = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
    lo = _mm256_fmadd_pd(a, a, lo);
    hi = _mm256_fmadd_pd(b, b, hi);
  }
  PPO_INLINE double total() const {
    double part[4];
    _mm256_storeu_pd(part, _mm256_add_pd(lo, hi));
    return (part[0] + part[1]) + (part[2] + part[3]);
  }
};

template <>
struct Lane<F> {
  static constexpr int count = 8;
  using Scalar = float;
  using Mask = M;
  using Accumulator = VectorAcc;
};

PPO_INLINE __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n < 8 ? int(n) : 8), lane);
}
PPO_INLINE M first_n_as(Tag<F>, int64_t n) { return {_mm256_castsi256_ps(first_lanes(n))}; }

// There is no masked 1- or 2-byte load before AVX-512: short tails go through the stack.
template <class P>
struct Staged {
  alignas(16) P part[8] = {};
  Staged() = default;
  PPO_INLINE Staged(const P* p, int64_t n) {
    __builtin_memcpy(part, p, n < 8 ? n * sizeof(P) : sizeof part);
  }
};

PPO_INLINE F set1_as(Tag<F>, float x) { return {_mm256_set1_ps(x)}; }
PPO_INLINE F load_as(Tag<F>, const float* p) { return {_mm256_loadu_ps(p)}; }
PPO_INLINE F load_as(Tag<F>, const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
PPO_INLINE F load_as(Tag<F>, const fp16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PPO_INLINE F load_n_as(Tag<F>, const float* p, int64_t n, float fill) {
  const __m256i m = first_lanes(n);
  const __m256 x = _mm256_maskload_ps(p, m);
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(m))};
}
template <class P>
PPO_INLINE F load_n_as(Tag<F>, const P* p, int64_t n, float fill) {
  const Staged<P> staged(p, n);
  const __m256 x = load_as(Tag<F>{}, staged.part).v;
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(first_lanes(n)))};
}

PPO_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
PPO_INLINE void store(bf16* p, F x) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  const __m256i r = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
PPO_INLINE void store(fp16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
PPO_INLINE void store_n(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), x.v); }
template <class P>
PPO_INLINE void store_n(P* p, F x, int64_t n) {
  Staged<P> staged;
  store(staged.part, x);
  __builtin_memcpy(p, staged.part, n < 8 ? n * sizeof(P) : sizeof staged.part);
}

PPO_INLINE M mask_as(Tag<F>, const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(
      _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_setzero_si256()))};
}
PPO_INLINE M mask_n_as(Tag<F>, const uint8_t* p, int64_t n) {
  const Staged<uint8_t> staged(p, n);
  return mask_as(Tag<F>{}, staged.part);
}
PPO_INLINE void store_mask(uint8_t* p, M m) {
  const __m256i lanes = _mm256_castps_si256(m.v);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const __m128i bytes = _mm_and_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
}
PPO_INLINE void store_mask_n(uint8_t* p, M m, int64_t n) {
  Staged<uint8_t> staged;
  store_mask(staged.part, m);
  __builtin_memcpy(p, staged.part, n < 8 ? n * sizeof(uint8_t) : sizeof staged.part);
}

PPO_INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
PPO_INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
PPO_INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
PPO_INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
PPO_INLINE F operator-(F a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.f))}; }
PPO_INLINE F vfma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PPO_INLINE F vmin(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
PPO_INLINE F vmax(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
PPO_INLINE F vabs(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
PPO_INLINE F vsqrt(F a) { return {_mm256_sqrt_ps(a.v)}; }

PPO_INLINE M operator<(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
PPO_INLINE M operator<=(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
PPO_INLINE M operator>(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
PPO_INLINE M operator>=(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
PPO_INLINE M operator==(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
PPO_INLINE M operator!=(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
PPO_INLINE M operator&(M a, M b) { return {_mm256_and_ps(a.v, b.v)}; }
PPO_INLINE M operator|(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
PPO_INLINE M operator!(M a) {
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
PPO_INLINE F select(M m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
PPO_INLINE int mask_bits(M m) { return _mm256_movemask_ps(m.v); }
PPO_INLINE bool any(M m) { return mask_bits(m) != 0; }
PPO_INLINE bool all(M m) { return mask_bits(m) == 0xff; }
PPO_INLINE int count(M m) { return __builtin_popcount(unsigned(mask_bits(m))); }

// Fold halves: lane i with lane i + 4, then + 2, then + 1.
#define PPO_FOLD(name, op)                                                          \
  PPO_INLINE float name(F x) {                                                      \
    __m128 a = op##_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1)); \
    a = op##_ps(a, _mm_movehl_ps(a, a));                                            \
    return _mm_cvtss_f32(op##_ps(a, _mm_shuffle_ps(a, a, 1)));                      \
  }
PPO_FOLD(reduce_add, _mm_add)
PPO_FOLD(reduce_min, _mm_min)
PPO_FOLD(reduce_max, _mm_max)
#undef PPO_FOLD

PPO_INLINE F round_even(F x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PPO_INLINE F pow2(F n) {
  const __m256i i = _mm256_castps_si256(_mm256_add_ps(n.v, _mm256_set1_ps(0x1.8p23f)));
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(i, 23), _mm256_set1_epi32(0x3f800000)))};
}
PPO_INLINE NearOne<F> near_one(F x) {
  const __m256i k = _mm256_srai_epi32(
      _mm256_sub_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(kSqrtHalfBits)), 23);
  const __m256i scale = _mm256_sub_epi32(_mm256_set1_epi32(0x3f800000), _mm256_slli_epi32(k, 23));
  return {{_mm256_castsi256_ps(scale)}, {_mm256_cvtepi32_ps(k)}};
}

PPO_INLINE void add_deviation(VectorAcc& sum, VectorAcc& squares, F x, double pivot) {
  const __m256d p = _mm256_set1_pd(pivot);
  const __m256d lo = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)), p);
  const __m256d hi = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)), p);
  sum.lo = _mm256_add_pd(sum.lo, lo);
  sum.hi = _mm256_add_pd(sum.hi, hi);
  squares.lo = _mm256_fmadd_pd(lo, lo, squares.lo);
  squares.hi = _mm256_fmadd_pd(hi, hi, squares.hi);
}

template <int s>
PPO_INLINE F later_half(F x) {
  if constexpr (s == 1) return {_mm256_movehdup_ps(x.v)};
  if constexpr (s == 2) return {_mm256_permute_ps(x.v, 0xfa)};
  return {_mm256_permutevar8x32_ps(x.v, _mm256_set1_epi32(4))};
}
template <int s>
constexpr int kEarlier = s == 1   ? 0x55
                         : s == 2 ? 0x33
                                  : 0x0f;
template <int s>
PPO_INLINE F earlier_half(F later, F earlier) {
  return {_mm256_blend_ps(later.v, earlier.v, kEarlier<s>)};
}
template <int s>
PPO_INLINE F fold_half(F a, F x) {
#ifdef PPO_MASKED
  return {_mm256_mask3_fmadd_ps(a.v, later_half<s>(x).v, x.v, kEarlier<s>)};
#else
  return earlier_half<s>(x, vfma(a, later_half<s>(x), x));
#endif
}
template <int s>
PPO_INLINE M or_later(M m) {
  const F x = {m.v};
  return {earlier_half<s>(x, {_mm256_or_ps(m.v, later_half<s>(x).v)}).v};
}
PPO_INLINE F shift_in(F x, F last) {
  const __m256i one_on = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 7);
  return {_mm256_blend_ps(_mm256_permutevar8x32_ps(x.v, one_on), last.v, 0x80)};
}
PPO_INLINE F first_lane(F x) { return {_mm256_broadcastss_ps(_mm256_castps256_ps128(x.v))}; }

#else
struct F {
  __m512 v;
};
struct M {
  __mmask16 v;
};

// Lanes are promoted in two halves of eight; total() adds in a fixed tree.
struct VectorAcc {
  __m512d lo, hi;
  // An implicit constructor would not inherit the pragma's target.
  PPO_INLINE VectorAcc() : lo(_mm512_setzero_pd()), hi(_mm512_setzero_pd()) {}
  PPO_INLINE void add(F x) {
    lo = _mm512_add_pd(lo, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    hi = _mm512_add_pd(hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  PPO_INLINE void add_square(F x) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
    lo = _mm512_fmadd_pd(a, a, lo);
    hi = _mm512_fmadd_pd(b, b, hi);
  }
  PPO_INLINE double total() const {
    double part[8];
    _mm512_storeu_pd(part, _mm512_add_pd(lo, hi));
    return ((part[0] + part[1]) + (part[2] + part[3])) +
           ((part[4] + part[5]) + (part[6] + part[7]));
  }
};

template <>
struct Lane<F> {
  static constexpr int count = 16;
  using Scalar = float;
  using Mask = M;
  using Accumulator = VectorAcc;
};

PPO_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << (n < 0 ? 0 : n)) - 1u);
}
PPO_INLINE M first_n_as(Tag<F>, int64_t n) { return {first_lanes(n)}; }

PPO_INLINE F widen(Tag<bf16>, __m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
PPO_INLINE F widen(Tag<fp16>, __m256i x) { return {_mm512_cvtph_ps(x)}; }
PPO_INLINE __m256i narrow(Tag<fp16>, F x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PPO_INLINE __m256i narrow(Tag<bf16>, F x) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(up, 16), _mm512_set1_epi32(0x7fc0)));
}

PPO_INLINE F set1_as(Tag<F>, float x) { return {_mm512_set1_ps(x)}; }
PPO_INLINE F load_as(Tag<F>, const float* p) { return {_mm512_loadu_ps(p)}; }
template <class P>
PPO_INLINE F load_as(Tag<F>, const P* p) {
  return widen(Tag<P>{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PPO_INLINE F load_n_as(Tag<F>, const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p)};
}
template <class P>
PPO_INLINE F load_n_as(Tag<F>, const P* p, int64_t n, float fill) {
  const __mmask16 m = first_lanes(n);
  const F x = widen(Tag<P>{}, _mm256_maskz_loadu_epi16(m, p));
  return {_mm512_mask_blend_ps(m, _mm512_set1_ps(fill), x.v)};
}

PPO_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
template <class P>
PPO_INLINE void store(P* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(Tag<P>{}, x));
}
PPO_INLINE void store_n(float* p, F x, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}
template <class P>
PPO_INLINE void store_n(P* p, F x, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(Tag<P>{}, x));
}

PPO_INLINE M mask_as(Tag<F>, const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
}
PPO_INLINE M mask_n_as(Tag<F>, const uint8_t* p, int64_t n) {
  const __m128i bytes = _mm_maskz_loadu_epi8(first_lanes(n), p);
  return {_mm_test_epi8_mask(bytes, bytes)};
}
PPO_INLINE void store_mask(uint8_t* p, M m) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_maskz_set1_epi8(m.v, 1));
}
PPO_INLINE void store_mask_n(uint8_t* p, M m, int64_t n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), _mm_maskz_set1_epi8(m.v, 1));
}

PPO_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
PPO_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
PPO_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
PPO_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
PPO_INLINE F operator-(F a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.f))}; }
PPO_INLINE F vfma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PPO_INLINE F vmin(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
PPO_INLINE F vmax(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
PPO_INLINE F vabs(F a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.f), a.v)}; }
PPO_INLINE F vsqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }

PPO_INLINE M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PPO_INLINE M operator<=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
PPO_INLINE M operator>(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
PPO_INLINE M operator>=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
PPO_INLINE M operator==(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PPO_INLINE M operator!=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)}; }
PPO_INLINE M operator&(M a, M b) { return {__mmask16(a.v & b.v)}; }
PPO_INLINE M operator|(M a, M b) { return {__mmask16(a.v | b.v)}; }
PPO_INLINE M operator!(M a) { return {__mmask16(~a.v)}; }
PPO_INLINE F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
PPO_INLINE bool any(M m) { return m.v != 0; }
PPO_INLINE bool all(M m) { return m.v == 0xffff; }
PPO_INLINE int count(M m) { return __builtin_popcount(m.v); }

// Fold halves: lane i with lane i + 8, then + 4, + 2, + 1.
#define PPO_FOLD(name, op)                                                             \
  PPO_INLINE float name(F x) {                                                         \
    const __m256 a =                                                                   \
        _mm256_##op##_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1)); \
    __m128 b = _mm_##op##_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));  \
    b = _mm_##op##_ps(b, _mm_movehl_ps(b, b));                                         \
    return _mm_cvtss_f32(_mm_##op##_ps(b, _mm_shuffle_ps(b, b, 1)));                   \
  }
PPO_FOLD(reduce_add, add)
PPO_FOLD(reduce_min, min)
PPO_FOLD(reduce_max, max)
#undef PPO_FOLD

PPO_INLINE F round_even(F x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PPO_INLINE F scalef(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }
PPO_INLINE F pow2(F n) { return scalef(set1_as(Tag<F>{}, 1.f), n); }
PPO_INLINE NearOne<F> near_one(F x) {
  const __m512i k = _mm512_srai_epi32(
      _mm512_sub_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(kSqrtHalfBits)), 23);
  const __m512i scale = _mm512_sub_epi32(_mm512_set1_epi32(0x3f800000), _mm512_slli_epi32(k, 23));
  return {{_mm512_castsi512_ps(scale)}, {_mm512_cvtepi32_ps(k)}};
}

PPO_INLINE void add_deviation(VectorAcc& sum, VectorAcc& squares, F x, double pivot) {
  const __m512d p = _mm512_set1_pd(pivot);
  const __m512d lo = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), p);
  const __m512d hi = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)), p);
  sum.lo = _mm512_add_pd(sum.lo, lo);
  sum.hi = _mm512_add_pd(sum.hi, hi);
  squares.lo = _mm512_fmadd_pd(lo, lo, squares.lo);
  squares.hi = _mm512_fmadd_pd(hi, hi, squares.hi);
}

#endif

}  // namespace ppo::PPO_ISA
