// Vectors of eight fp32 lanes as pairs of NEON registers (no include guard; contracts in simd.h).
// The operations are those of AVX2's in x86.h, in the same order.
namespace ppo::PPO_ISA {

struct F {
  float32x4_t lo, hi;
};
struct M {
  uint32x4_t lo, hi;
};

// Lanes are promoted in two halves of four; total() adds in lane order.
struct VectorAcc {
  float64x2_t lo[2], hi[2];
  PPO_INLINE VectorAcc() {
    for (int i = 0; i < 2; ++i) lo[i] = hi[i] = vdupq_n_f64(0);
  }
  PPO_INLINE void add(F x) {
    lo[0] = vaddq_f64(lo[0], vcvt_f64_f32(vget_low_f32(x.lo)));
    lo[1] = vaddq_f64(lo[1], vcvt_high_f64_f32(x.lo));
    hi[0] = vaddq_f64(hi[0], vcvt_f64_f32(vget_low_f32(x.hi)));
    hi[1] = vaddq_f64(hi[1], vcvt_high_f64_f32(x.hi));
  }
  PPO_INLINE void add_square(F x) {
    const float64x2_t a = vcvt_f64_f32(vget_low_f32(x.lo)), b = vcvt_high_f64_f32(x.lo);
    const float64x2_t c = vcvt_f64_f32(vget_low_f32(x.hi)), d = vcvt_high_f64_f32(x.hi);
    lo[0] = vfmaq_f64(lo[0], a, a);
    lo[1] = vfmaq_f64(lo[1], b, b);
    hi[0] = vfmaq_f64(hi[0], c, c);
    hi[1] = vfmaq_f64(hi[1], d, d);
  }
  PPO_INLINE double total() const {
    return vaddvq_f64(vaddq_f64(lo[0], hi[0])) + vaddvq_f64(vaddq_f64(lo[1], hi[1]));
  }
};

template <>
struct Lane<F> {
  static constexpr int count = 8;
  using Scalar = float;
  using Mask = M;
  using Accumulator = VectorAcc;
};

PPO_INLINE M first_lanes(int64_t n) {
  constexpr int32_t lane[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  const int32x4_t limit = vdupq_n_s32(n < 8 ? int(n) : 8);
  return {vcltq_s32(vld1q_s32(lane), limit), vcltq_s32(vld1q_s32(lane + 4), limit)};
}
PPO_INLINE M first_n_as(Tag<F>, int64_t n) { return first_lanes(n); }

// There is no masked load or store: short tails go through the stack.
template <class P>
struct Staged {
  alignas(16) P part[8] = {};
  Staged() = default;
  PPO_INLINE Staged(const P* p, int64_t n) {
    if (n > 0) __builtin_memcpy(part, p, n < 8 ? n * sizeof(P) : sizeof part);
  }
};

PPO_INLINE F operator+(F a, F b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
PPO_INLINE F operator-(F a, F b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
PPO_INLINE F operator*(F a, F b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
PPO_INLINE F operator/(F a, F b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
PPO_INLINE F operator-(F a) { return {vnegq_f32(a.lo), vnegq_f32(a.hi)}; }
PPO_INLINE F vfma(F a, F b, F c) {
  return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)};
}
PPO_INLINE F vabs(F a) { return {vabsq_f32(a.lo), vabsq_f32(a.hi)}; }
PPO_INLINE F vsqrt(F a) { return {vsqrtq_f32(a.lo), vsqrtq_f32(a.hi)}; }

PPO_INLINE M operator<(F a, F b) { return {vcltq_f32(a.lo, b.lo), vcltq_f32(a.hi, b.hi)}; }
PPO_INLINE M operator<=(F a, F b) { return {vcleq_f32(a.lo, b.lo), vcleq_f32(a.hi, b.hi)}; }
PPO_INLINE M operator>(F a, F b) { return {vcgtq_f32(a.lo, b.lo), vcgtq_f32(a.hi, b.hi)}; }
PPO_INLINE M operator>=(F a, F b) { return {vcgeq_f32(a.lo, b.lo), vcgeq_f32(a.hi, b.hi)}; }
PPO_INLINE M operator==(F a, F b) { return {vceqq_f32(a.lo, b.lo), vceqq_f32(a.hi, b.hi)}; }
PPO_INLINE M operator&(M a, M b) { return {vandq_u32(a.lo, b.lo), vandq_u32(a.hi, b.hi)}; }
PPO_INLINE M operator|(M a, M b) { return {vorrq_u32(a.lo, b.lo), vorrq_u32(a.hi, b.hi)}; }
PPO_INLINE M operator!(M a) { return {vmvnq_u32(a.lo), vmvnq_u32(a.hi)}; }
PPO_INLINE M operator!=(F a, F b) { return !(a == b); }
PPO_INLINE F select(M m, F a, F b) {
  return {vbslq_f32(m.lo, a.lo, b.lo), vbslq_f32(m.hi, a.hi, b.hi)};
}
// fmin and fmax would give a NaN for a NaN in a.
PPO_INLINE F vmin(F a, F b) { return select(a < b, a, b); }
PPO_INLINE F vmax(F a, F b) { return select(a > b, a, b); }
PPO_INLINE bool any(M m) { return vmaxvq_u32(vorrq_u32(m.lo, m.hi)) != 0; }
PPO_INLINE bool all(M m) { return vminvq_u32(vandq_u32(m.lo, m.hi)) != 0; }
PPO_INLINE int mask_bits(M m) {
  constexpr uint32_t bit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint32x4_t lo = vandq_u32(m.lo, vld1q_u32(bit));
  return int(vaddvq_u32(vorrq_u32(lo, vandq_u32(m.hi, vld1q_u32(bit + 4)))));
}
PPO_INLINE int count(M m) { return -vaddvq_s32(vreinterpretq_s32_u32(vaddq_u32(m.lo, m.hi))); }

PPO_INLINE F set1_as(Tag<F>, float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
PPO_INLINE F load_as(Tag<F>, const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
PPO_INLINE uint16x8_t halves(const void* p) { return vld1q_u16(static_cast<const uint16_t*>(p)); }
PPO_INLINE F load_as(Tag<F>, const bf16* p) {
  const uint16x8_t x = halves(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)),
          vreinterpretq_f32_u32(vshll_high_n_u16(x, 16))};
}
PPO_INLINE F load_as(Tag<F>, const fp16* p) {
  const float16x8_t x = vreinterpretq_f16_u16(halves(p));
  return {vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)};
}
template <class P>
PPO_INLINE F load_n_as(Tag<F>, const P* p, int64_t n, float fill) {
  const Staged<P> staged(p, n);
  return select(first_lanes(n), load_as(Tag<F>{}, staged.part), set1_as(Tag<F>{}, fill));
}

PPO_INLINE void store(float* p, F x) {
  vst1q_f32(p, x.lo);
  vst1q_f32(p + 4, x.hi);
}
// Rounded to nearest even, in the upper half of each lane; a NaN becomes the positive quiet one.
PPO_INLINE uint32x4_t bf16_rounded(float32x4_t x) {
  const uint32x4_t b = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(x, x), up, vdupq_n_u32(0x7fc00000));
}
PPO_INLINE void store(bf16* p, F x) {
  const uint16x4_t lo = vshrn_n_u32(bf16_rounded(x.lo), 16);
  vst1q_u16(reinterpret_cast<uint16_t*>(p), vshrn_high_n_u32(lo, bf16_rounded(x.hi), 16));
}
PPO_INLINE void store(fp16* p, F x) {
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(x.lo), x.hi);
  vst1q_u16(reinterpret_cast<uint16_t*>(p), vreinterpretq_u16_f16(halves));
}
template <class P>
PPO_INLINE void store_n(P* p, F x, int64_t n) {
  Staged<P> staged;
  store(staged.part, x);
  if (n > 0) __builtin_memcpy(p, staged.part, n < 8 ? n * sizeof(P) : sizeof staged.part);
}

PPO_INLINE M mask_as(Tag<F>, const uint8_t* p) {
  const uint8x8_t bytes = vld1_u8(p);
  const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(vtst_u8(bytes, bytes)));
  return {vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(words))),
          vreinterpretq_u32_s32(vmovl_high_s16(words))};
}
PPO_INLINE M mask_n_as(Tag<F>, const uint8_t* p, int64_t n) {
  const Staged<uint8_t> staged(p, n);
  return mask_as(Tag<F>{}, staged.part);
}
PPO_INLINE void store_mask(uint8_t* p, M m) {
  const uint16x8_t words = vuzp1q_u16(vreinterpretq_u16_u32(m.lo), vreinterpretq_u16_u32(m.hi));
  vst1_u8(p, vand_u8(vmovn_u16(words), vdup_n_u8(1)));
}
PPO_INLINE void store_mask_n(uint8_t* p, M m, int64_t n) {
  Staged<uint8_t> staged;
  store_mask(staged.part, m);
  if (n > 0) __builtin_memcpy(p, staged.part, n < 8 ? n : 8);
}

// Fold halves: lane i with lane i + 4, then + 2, then + 1.
PPO_INLINE float reduce_add(F x) {
  const float32x4_t a = vaddq_f32(x.lo, x.hi);
  return vaddv_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a)));
}
#define PPO_FOLD(name, before, last)                                        \
  PPO_INLINE float name(F x) {                                              \
    const float32x4_t a = vbslq_f32(before##q_f32(x.lo, x.hi), x.lo, x.hi); \
    const float32x2_t lo = vget_low_f32(a), hi = vget_high_f32(a);          \
    const float32x2_t b = vbsl_f32(before##_f32(lo, hi), lo, hi);           \
    return last(vget_lane_f32(b, 0), vget_lane_f32(b, 1));                  \
  }
PPO_FOLD(reduce_min, vclt, vmin)
PPO_FOLD(reduce_max, vcgt, vmax)
#undef PPO_FOLD

PPO_INLINE F round_even(F x) { return {vrndnq_f32(x.lo), vrndnq_f32(x.hi)}; }
PPO_INLINE float32x4_t pow2_of(float32x4_t n) {
  const int32x4_t i = vreinterpretq_s32_f32(vaddq_f32(n, vdupq_n_f32(0x1.8p23f)));
  return vreinterpretq_f32_s32(vaddq_s32(vshlq_n_s32(i, 23), vdupq_n_s32(0x3f800000)));
}
PPO_INLINE F pow2(F n) { return {pow2_of(n.lo), pow2_of(n.hi)}; }
PPO_INLINE NearOne<F> near_one(F x) {
  const int32x4_t half = vdupq_n_s32(kSqrtHalfBits), one = vdupq_n_s32(0x3f800000);
  const int32x4_t lo = vshrq_n_s32(vsubq_s32(vreinterpretq_s32_f32(x.lo), half), 23);
  const int32x4_t hi = vshrq_n_s32(vsubq_s32(vreinterpretq_s32_f32(x.hi), half), 23);
  return {{vreinterpretq_f32_s32(vsubq_s32(one, vshlq_n_s32(lo, 23))),
           vreinterpretq_f32_s32(vsubq_s32(one, vshlq_n_s32(hi, 23)))},
          {vcvtq_f32_s32(lo), vcvtq_f32_s32(hi)}};
}

PPO_INLINE void add_deviation(VectorAcc& sum, VectorAcc& squares, F x, double pivot) {
  const float64x2_t p = vdupq_n_f64(pivot);
  const float64x2_t lo[2] = {vsubq_f64(vcvt_f64_f32(vget_low_f32(x.lo)), p),
                             vsubq_f64(vcvt_high_f64_f32(x.lo), p)};
  const float64x2_t hi[2] = {vsubq_f64(vcvt_f64_f32(vget_low_f32(x.hi)), p),
                             vsubq_f64(vcvt_high_f64_f32(x.hi), p)};
  for (int i = 0; i < 2; ++i) {
    sum.lo[i] = vaddq_f64(sum.lo[i], lo[i]);
    sum.hi[i] = vaddq_f64(sum.hi[i], hi[i]);
    squares.lo[i] = vfmaq_f64(squares.lo[i], lo[i], lo[i]);
    squares.hi[i] = vfmaq_f64(squares.hi[i], hi[i], hi[i]);
  }
}

template <int s>
PPO_INLINE F later_half(F x) {
  if constexpr (s == 1) return {vtrn2q_f32(x.lo, x.lo), vtrn2q_f32(x.hi, x.hi)};
  if constexpr (s == 2) return {vdupq_laneq_f32(x.lo, 2), vdupq_laneq_f32(x.hi, 2)};
  return {vdupq_laneq_f32(x.hi, 0), x.hi};
}
template <int s>
PPO_INLINE float32x4_t earlier_of(float32x4_t later, float32x4_t earlier) {
  if constexpr (s == 2) return vcombine_f32(vget_low_f32(earlier), vget_high_f32(later));
  return vbslq_f32(vreinterpretq_u32_u64(vdupq_n_u64(0xffffffff)), earlier, later);
}
template <int s>
PPO_INLINE F earlier_half(F later, F earlier) {
  if constexpr (s == 4) return {earlier.lo, later.hi};
  return {earlier_of<s>(later.lo, earlier.lo), earlier_of<s>(later.hi, earlier.hi)};
}
// The earlier halves of both registers side by side: one multiply-add for eight lanes.
template <int s>
PPO_INLINE F fold_half(F a, F x) {
  if constexpr (s == 1) {
    const float32x4_t later = vuzp2q_f32(x.lo, x.hi);
    const float32x4_t sum = vfmaq_f32(vuzp1q_f32(x.lo, x.hi), vuzp1q_f32(a.lo, a.hi), later);
    return {vzip1q_f32(sum, later), vzip2q_f32(sum, later)};
  }
  if constexpr (s == 2) {
    const float64x2_t lo = vreinterpretq_f64_f32(x.lo), hi = vreinterpretq_f64_f32(x.hi);
    const float32x4_t factors = vreinterpretq_f32_f64(
        vtrn1q_f64(vreinterpretq_f64_f32(a.lo), vreinterpretq_f64_f32(a.hi)));
    const float64x2_t later = vtrn2q_f64(lo, hi);
    const float32x4_t first = vreinterpretq_f32_f64(later);
    const float64x2_t sum = vreinterpretq_f64_f32(
        vfmaq_f32(vreinterpretq_f32_f64(vtrn1q_f64(lo, hi)), factors, vtrn1q_f32(first, first)));
    return {vreinterpretq_f32_f64(vtrn1q_f64(sum, later)),
            vreinterpretq_f32_f64(vtrn2q_f64(sum, later))};
  }
  return {vfmaq_laneq_f32(x.lo, a.lo, x.hi, 0), x.hi};
}
template <int s>
PPO_INLINE M or_later(M m) {
  const F x = {vreinterpretq_f32_u32(m.lo), vreinterpretq_f32_u32(m.hi)};
  const F later = later_half<s>(x);
  const M either = m | M{vreinterpretq_u32_f32(later.lo), vreinterpretq_u32_f32(later.hi)};
  const F y =
      earlier_half<s>(x, {vreinterpretq_f32_u32(either.lo), vreinterpretq_f32_u32(either.hi)});
  return {vreinterpretq_u32_f32(y.lo), vreinterpretq_u32_f32(y.hi)};
}
PPO_INLINE F shift_in(F x, F last) {
  return {vextq_f32(x.lo, x.hi, 1), vextq_f32(x.hi, last.hi, 1)};
}
PPO_INLINE F first_lane(F x) {
  const float32x4_t one = vdupq_laneq_f32(x.lo, 0);
  return {one, one};
}

}  // namespace ppo::PPO_ISA
