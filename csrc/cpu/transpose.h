// In-register transpose of an 8x8 block of fp32, for AVX2 (no include guard, see foreach_isa.h).
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
#endif

}  // namespace ppo::PPO_ISA
