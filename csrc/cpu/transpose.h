// In-register transposes of a lanes x lanes block of fp32 (no include guard, see foreach_isa.h).
namespace ppo::PPO_ISA {

PPO_INLINE void transpose(float*) {}
PPO_INLINE void transpose(double*) {}

#if PPO_ISA_WIDTH == 8
PPO_INLINE void transpose(F* r) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#elif PPO_ISA_WIDTH == 16
PPO_INLINE void transpose(F* r) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  // b[4g + c], 128-bit part k: rows 4g .. 4g + 3 of column 4k + c.
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_lo = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88);
    const __m512 odd_lo = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
    const __m512 even_hi = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88);
    const __m512 odd_hi = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0x88);
    r[c + 4].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88);
    r[c + 8].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0xdd);
    r[c + 12].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd);
  }
}
#endif

}  // namespace ppo::PPO_ISA
