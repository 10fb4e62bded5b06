// Kernel of few_rows_linear (no include guard, see foreach_isa.h). Lanes are rows of x: each
// element of the weight is broadcast to all rows of a block, so the weight needs no other layout.
// Every sum runs over K in order, in a lane of its own: a result depends on its row alone.
namespace ppo::PPO_ISA {

// Vectors of a block of rows, blocks and rows of the weight taken together: accumulators must stay
// in registers (24 of 32 with AVX-512, 12 of 16 with AVX2).
constexpr int kRowVectors = kRowBlock / lanes<F>;
constexpr int kBlocks = lanes<F> == kRowBlock ? 2 : 1;
constexpr int kTogether = kRowVectors <= 2 ? 12 / kRowVectors : 1;
// Elements of the weight between two prefetches of a row, and how far ahead they reach.
constexpr int64_t kLine = 16, kAhead = 64;

// Sums of `Together` rows of the weight, from `first` on, for `Blocks` blocks of rows of x.
template <int Together, int Blocks>
inline void few_rows_tile(const FewRowsArgs& a, int64_t block, int64_t first) {
  constexpr int kVectors = Blocks * kRowVectors;
  F sum[Together][kVectors];
  for (int i = 0; i < Together; ++i) {
    for (int v = 0; v < kVectors; ++v) sum[i][v] = set1<F>(0);
  }
  const int64_t size = a.depth * kRowBlock;  // of a block
  const float* x = a.x + block * size;
  const float* w = a.weight + first * a.weight_stride;
  for (int64_t start = 0; start < a.depth; start += kLine) {
#if PPO_ISA_WIDTH > 1
    // Near the end of the rows, the beginning of the next ones.
    const bool turn = start + kAhead >= a.depth;
    const float* ahead = w + start + kAhead + (turn ? Together * a.weight_stride - a.depth : 0);
    for (int i = 0; i < Together; ++i) __builtin_prefetch(ahead + i * a.weight_stride);
#endif
    const int64_t end = start + kLine < a.depth ? start + kLine : a.depth;
    for (int64_t k = start; k < end; ++k) {
      F rows[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        rows[v] = load<F>(x + v / kRowVectors * size + k * kRowBlock + v % kRowVectors * lanes<F>);
      }
#pragma GCC unroll 16
      for (int i = 0; i < Together; ++i) {
        const F one = set1<F>(w[i * a.weight_stride + k]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = vfma(rows[v], one, sum[i][v]);
      }
    }
  }
  const int64_t done = block * kRowBlock, left = a.rows - done;
  const int64_t live = left < Blocks * kRowBlock ? left : Blocks * kRowBlock;
  float* out = a.out + done * a.outputs + first;
  for (int i = 0; i < Together; ++i) {
    float lane[Blocks * kRowBlock];
    for (int v = 0; v < kVectors; ++v) store(lane + v * lanes<F>, sum[i][v]);
    for (int64_t r = 0; r < live; ++r) {
      out[r * a.outputs + i] = a.bias ? lane[r] + a.bias[first + i] : lane[r];
    }
  }
}

// The same for every block of rows: those of the weight are in the cache for all but the first.
template <int Together>
inline void few_rows_tiles(const FewRowsArgs& a, int64_t first) {
  const int64_t blocks = (a.rows + kRowBlock - 1) / kRowBlock;
  int64_t block = 0;
  for (; block + kBlocks <= blocks; block += kBlocks) {
    few_rows_tile<Together, kBlocks>(a, block, first);
  }
  if (block < blocks) few_rows_tile<Together, 1>(a, block, first);
}

// Columns [first, last) of the result, for every row.
inline void few_rows_outputs(const FewRowsArgs& a, int64_t first, int64_t last) {
  int64_t n = first;
  for (; n + kTogether <= last; n += kTogether) few_rows_tiles<kTogether>(a, n);
  for (; n < last; ++n) few_rows_tiles<1>(a, n);
}

}  // namespace ppo::PPO_ISA
