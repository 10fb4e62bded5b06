// Kernel of bf16_product_ (compiled for AVX512-BF16 alone, see bf16_product.cpp): blocks of the
// product in the manner of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix
// Multiplication". Both operands are packed as pairs along K, the form that vdpbf16ps takes.
//
// vdpbf16ps adds two products to each lane: a product of bf16 numbers is exact in fp32, each of
// the two sums is rounded to nearest even, subnormal operands and sums count as 0 (Intel's
// "Architecture Instruction Set Extensions Programming Reference", VDPBF16PS). An element's sum
// runs over each block of K in order, and the blocks' sums are added in order: a block's length
// bounds the rounding errors, and no blocking of rows or columns changes a bit.
namespace ppo::avx512bf16 {

constexpr int kLanes = 16;
// Rows and vectors of columns of a tile: 24 accumulators of the 32 registers.
constexpr int kTileRows = 8, kTileVectors = 3, kTileCols = kTileVectors * kLanes;
// Two numbers along K, the even one in the low half.
using Pair = uint32_t;
// Rows whose pairs are packed together where rows are contiguous.
constexpr int64_t kBandRows = 256;

PPO_INLINE __mmask16 first(int64_t n) {
  return n >= kLanes ? __mmask16(0xffff) : __mmask16((1u << (n < 0 ? 0 : n)) - 1u);
}

// An fp32 number as what its bf16 lacks. Both parts, rounded to nearest, leave 2^-16 of the
// number.
struct Rest {
  float of;
};

// Infinities and what overflows bf16 have no rest.
PPO_INLINE __m512 rest_n(const Rest* p, int64_t n) {
  const __m512 x = _mm512_maskz_loadu_ps(first(n), p);
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
  const __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
  const __m512 largest = _mm512_set1_ps(FLT_MAX);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(rest), largest, _CMP_LE_OQ), rest);
}

// n numbers as bf16, `stride` apart; lanes beyond them are 0.
PPO_INLINE __m256i narrow_n(const bf16* p, int64_t n) {
  return _mm256_maskz_loadu_epi16(first(n), p);
}
PPO_INLINE __m256i narrow_n(const float* p, int64_t n) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n), p));
}
PPO_INLINE __m256i narrow_n(const Rest* p, int64_t n) {
  return (__m256i)_mm512_cvtneps_pbh(rest_n(p, n));
}
template <class T>
PPO_INLINE __m256i narrow_n(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return narrow_n(p, n);
  T near[kLanes];
  for (int64_t i = 0; i < n && i < kLanes; ++i) near[i] = p[i * stride];
  return narrow_n(near, n);
}

// 32 numbers as bf16, or 16 pairs; those beyond n are 0.
PPO_INLINE __m512i pairs_n(const bf16* p, int64_t n) {
  const uint64_t live = n >= 32 ? 0xffffffffu : (uint64_t(1) << (n < 0 ? 0 : n)) - 1u;
  return _mm512_maskz_loadu_epi16(__mmask32(live), p);
}
PPO_INLINE __m512i pairs_n(const float* p, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first(n), p);
  const __m512 high = _mm512_maskz_loadu_ps(first(n - kLanes), p + kLanes);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
PPO_INLINE __m512i pairs_n(const Rest* p, int64_t n) {
  return (__m512i)_mm512_cvtne2ps_pbh(rest_n(p + kLanes, n - kLanes), rest_n(p, n));
}

// 16 x 16 transposition.
PPO_INLINE void transpose(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 4) {  // 4 x 4 within the 128-bit quarters
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // 4 x 4 of the quarters
    const __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x44);
    const __m512i d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xee);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[i + 8] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

// Rows [begin, end) of x and columns [k, k + depth) as pairs, in groups of `Group` vectors of 16
// rows: pair j of a group's row i is its element j·16·Group + i, and a group has `pairs` of them a
// row. Rows beyond the last and the missing half of a pair are 0.
template <int Group, class T>
inline void pack_along_k(const View& x, int64_t begin, int64_t end, int64_t k, int64_t depth,
                         Pair* out, int64_t pairs) {
  constexpr int64_t kPitch = Group * kLanes;
  for (int64_t row = begin; row < end; row += kPitch, out += pairs * kPitch) {
    for (int64_t lane = 0; lane < kPitch; lane += kLanes) {
      for (int64_t pair = 0; pair < pairs; pair += kLanes) {
        __m512i r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int64_t from = row + lane + i;
          r[i] = from < end ? pairs_n(at<T>(x, from, k + 2 * pair), depth - 2 * pair)
                            : _mm512_setzero_si512();
        }
        transpose(r);
        for (int i = 0; i < kLanes && pair + i < pairs; ++i) {
          _mm512_storeu_si512(out + (pair + i) * kPitch + lane, r[i]);
        }
      }
    }
  }
}

// The same where columns are not contiguous: of a band of rows at a time, as a page of memory
// holds few columns.
template <int Group, class T>
inline void pack_along_rows(const View& x, int64_t begin, int64_t end, int64_t k, int64_t depth,
                            Pair* out, int64_t pairs) {
  constexpr int64_t kPitch = Group * kLanes, kBand = kPitch * (kBandRows / kPitch);
  alignas(64) uint16_t order[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) order[i] = uint16_t(i / 2 + i % 2 * kLanes);
  const __m512i interleave = _mm512_load_si512(order);
  for (int64_t band = begin; band < end; band += kBand) {
    const int64_t stop = band + kBand < end ? band + kBand : end;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const T* from = at<T>(x, band, k + 2 * pair);
      Pair* to = out + (band - begin) * pairs + pair * kPitch;
      for (int64_t row = band; row < stop; row += kPitch, to += pairs * kPitch) {
        for (int64_t lane = 0; lane < kPitch; lane += kLanes, from += kLanes * x.row_stride) {
          const int64_t live = stop - row - lane;
          const __m256i even = narrow_n(from, x.row_stride, live);
          const int64_t odd_live = 2 * pair + 1 < depth ? live : 0;
          const __m256i odd = narrow_n(from + x.col_stride, x.row_stride, odd_live);
          const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
          _mm512_storeu_si512(to + lane, _mm512_permutexvar_epi16(interleave, both));
        }
      }
    }
  }
}

template <int Group, class T>
inline void pack(const View& x, int64_t begin, int64_t end, int64_t k, int64_t depth, Pair* out) {
  const int64_t pairs = (depth + 1) / 2;
  if (x.col_stride == 1) {
    pack_along_k<Group, T>(x, begin, end, k, depth, out, pairs);
  } else {
    pack_along_rows<Group, T>(x, begin, end, k, depth, out, pairs);
  }
}

// rows x cols of out, at most a tile, from `pairs` pairs along K; a and b as packed.
inline void tile(const Pair* a, const Pair* b, int64_t pairs, float* out, int64_t stride,
                 int64_t rows, int64_t cols, bool add) {
  __m512 sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      sum[i][v] = _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < pairs; ++k, a += kLanes, b += kTileCols) {
    __m512bh col[kTileVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) col[v] = (__m512bh)_mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(int(a[i]));
#pragma GCC unroll 3
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], row, col[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < kTileVectors; ++v) {
      const __mmask16 live = first(cols - v * kLanes);
      float* const to = out + i * stride + v * kLanes;
      const __m512 total =
          add ? _mm512_add_ps(_mm512_maskz_loadu_ps(live, to), sum[i][v]) : sum[i][v];
      _mm512_mask_storeu_ps(to, live, total);
    }
  }
}

// rows x cols of out from all packed rows and columns.
inline void tiles(const Pair* a, const Pair* b, int64_t pairs, float* out, int64_t stride,
                  int64_t rows, int64_t cols, bool add) {
  for (int64_t n = 0; n < cols; n += kTileCols) {
    for (int64_t m = 0; m < rows; m += kTileRows) {
      const int64_t half = m % kLanes;  // the tile's rows in their vector of 16
      tile(a + (m - half) * pairs + half, b + n * pairs, pairs, out + m * stride + n, stride,
           rows - m, cols - n, add);
    }
  }
}

// `height` rows of the product from row m0 on and `width` columns from n0 on, where it has them.
inline void product_block(const ProductArgs& p, int64_t m0, int64_t height, int64_t n0,
                          int64_t width, Pair* packed) {
  const int64_t m1 = m0 + height < p.a.rows ? m0 + height : p.a.rows;
  const int64_t n1 = n0 + width < p.b.rows ? n0 + width : p.b.rows;
  Pair* const cols = packed + height * kBlockDepth / 2;
  const bool both = p.a.dtype == DType::f32;
  int64_t k = 0;
  do {  // once for K = 0, whose sums are 0
    const int64_t depth = p.a.cols - k < kBlockDepth ? p.a.cols - k : kBlockDepth;
    pack<kTileVectors, bf16>(p.b, n0, n1, k, depth, cols);
    for (int part = 0; part < (both ? 2 : 1); ++part) {
      if (!both) {
        pack<1, bf16>(p.a, m0, m1, k, depth, packed);
      } else if (part == 0) {
        pack<1, float>(p.a, m0, m1, k, depth, packed);
      } else {
        pack<1, Rest>(p.a, m0, m1, k, depth, packed);
      }
      const bool add = p.add || k > 0 || part > 0;
      tiles(packed, cols, (depth + 1) / 2, p.out + m0 * p.out_stride + n0, p.out_stride, m1 - m0,
            n1 - n0, add);
    }
    k += kBlockDepth;
  } while (k < p.a.cols);
}

}  // namespace ppo::avx512bf16
