// What tells Rows from Columns: the tree that joins the steps of a chunk, and a step's neighbours
// (no include guard, see foreach_isa.h; after chunk.h).
namespace ppo::PPO_ISA {

// The neighbours of the later half of every 2s steps, for its earlier half: in a Column element
// `half_of(i, s)` for i, in a Row `later_half` where `earlier_half` is set.
PPO_INLINE constexpr bool is_earlier(int i, int s) { return (i & s) == 0; }
PPO_INLINE constexpr int half_of(int i, int s) { return (i | s) & ~(s - 1); }

template <int s, class T>
PPO_INLINE void fold(const Column<T>& a, Column<T>& b) {
  for (int i = 0; i < kSteps; ++i) {
    if (is_earlier(i, s)) b.r[i] = vfma(a.r[i], b.r[half_of(i, s)], b.r[i]);
  }
}
template <int s, class T>
PPO_INLINE void fold_factors(Column<T>& a) {
  for (int i = 0; i < kSteps; ++i) {
    if (is_earlier(i, s)) a.r[i] = a.r[i] * a.r[half_of(i, s)];
  }
}
template <int s, class T>
PPO_INLINE void fold_cut(Flags<T, kSteps>& cut, const Column<T>& a, Column<T>& b) {
  for (int i = 0; i < kSteps; ++i) {
    if (!is_earlier(i, s)) continue;
    b.r[i] = select(cut.r[i], b.r[i], vfma(a.r[i], b.r[half_of(i, s)], b.r[i]));
    cut.r[i] = cut.r[i] | cut.r[half_of(i, s)];
  }
}
// Step i + 1's, and `carried` for the last one.
template <class T>
PPO_INLINE Column<T> next_step(const Column<T>& x, T carried) {
  Column<T> y;
  for (int i = 0; i + 1 < kSteps; ++i) y.r[i] = x.r[i + 1];
  y.r[kSteps - 1] = carried;
  return y;
}
// The same where the next chunk follows in memory, at p.
template <class T, class S>
PPO_INLINE Column<T> next_in_memory(const Column<T>& x, const S*, T carried) {
  return next_step(x, carried);
}
template <class T>
PPO_INLINE T first_step(const Column<T>& x) {
  return x.r[0];
}
// x at the first flagged step from each on, and `carried` where there is none.
template <class T>
PPO_INLINE Column<T> first_flagged(const Flags<T, kSteps>& m, const Column<T>& x, T carried) {
  Column<T> y;
  for (int i = kSteps - 1; i >= 0; --i) y.r[i] = carried = select(m.r[i], x.r[i], carried);
  return y;
}

#if PPO_ISA_WIDTH == 8
template <int s>
PPO_INLINE __m256 later_half(__m256 x) {
  if constexpr (s == 1) return _mm256_movehdup_ps(x);
  if constexpr (s == 2) return _mm256_permute_ps(x, 0xfa);
  return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(4));
}
template <int s>
constexpr int kEarlier = s == 1   ? 0x55
                         : s == 2 ? 0x33
                                  : 0x0f;
template <int s>
PPO_INLINE __m256 earlier_half(__m256 later, __m256 earlier) {
  return _mm256_blend_ps(later, earlier, kEarlier<s>);
}

template <int s>
PPO_INLINE void fold(const Row& a, Row& b) {
  __m256& x = b.r[0].v;
#ifdef PPO_MASKED
  x = _mm256_mask3_fmadd_ps(a.r[0].v, later_half<s>(x), x, kEarlier<s>);
#else
  x = earlier_half<s>(x, _mm256_fmadd_ps(a.r[0].v, later_half<s>(x), x));
#endif
}
template <int s>
PPO_INLINE void fold_factors(Row& a) {
  __m256& x = a.r[0].v;
  x = earlier_half<s>(x, _mm256_mul_ps(x, later_half<s>(x)));
}
template <int s>
PPO_INLINE void fold_cut(Flags<F, 1>& cut, const Row& a, Row& b) {
  Row folded = b;
  fold<s>(a, folded);
  b = select(cut, b, folded);
  __m256& x = cut.r[0].v;
  x = earlier_half<s>(x, _mm256_or_ps(x, later_half<s>(x)));
}
PPO_INLINE Row next_step(const Row& x, F carried) {
  const __m256i one_on = _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 7);
  return {{{_mm256_blend_ps(_mm256_permutevar8x32_ps(x.r[0].v, one_on), carried.v, 0x80)}}};
}
PPO_INLINE Row next_in_memory(const Row&, const float* p, F) { return {{load<F>(p + 1)}}; }
PPO_INLINE F first_step(const Row& x) {
  return {_mm256_broadcastss_ps(_mm256_castps256_ps128(x.r[0].v))};
}
PPO_INLINE Row first_flagged(const Flags<F, 1>& m, const Row& x, F carried) {
  const int set = _mm256_movemask_ps(m.r[0].v);
  if ((set & (set + 1)) == 0) return {{select(m.r[0], x.r[0], carried)}};  // the first so many
  float y[kSteps], last[kSteps];
  store(y, x.r[0]);
  store(last, carried);
  for (int i = kSteps - 1; i >= 0; --i) y[i] = last[0] = (set >> i) & 1 ? y[i] : last[0];
  return {{load<F>(y)}};
}
#endif

}  // namespace ppo::PPO_ISA
