// ppo_fast::bf16_product_.cpu: out = a · b, or out + a · b, of bf16 operands in fp32, on CPUs with
// AVX512-BF16. An fp32 operand `a` is two bf16 numbers an element, which takes two products.
// torch's own CPU product of bf16 tensors rounds its result to bf16, and its library exports
// neither oneDNN's C functions nor a product of bf16 with an fp32 result that is fast on every
// such CPU.
#include "../../tensor/views.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

// Blocks of the product that a thread takes at a time, and how much of K they are packed for: both
// packed operands stay in a core's second cache.
constexpr int64_t kBlockRows = 512, kBlockCols = 384, kBlockDepth = 256;

struct ProductArgs {
  View a, b;   // (M, K) and (N, K), any strides
  float* out;  // (M, N)
  int64_t out_stride;
  bool add;
};

}  // namespace
}  // namespace ppo

#if PPO_X86
#define PPO_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#include "bf16_product_simd.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace ppo {
namespace {

#if PPO_X86
int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Height of `count` equal blocks of n rows, in whole multiples of `unit`.
int64_t equal(int64_t n, int64_t count, int64_t unit) {
  return parts(parts(n, count), unit) * unit;
}

void run(const ProductArgs& p) {
  using namespace avx512bf16;
  const int64_t rows = p.a.rows, cols = p.b.rows;
  if (rows == 0 || cols == 0) return;
  // No blocking changes an element's bits, so blocks may follow the number of threads.
  const int64_t threads = torch::stable::get_num_threads();
  int64_t down = parts(rows, kBlockRows), across = parts(cols, kBlockCols);
  while (down * across < threads && rows > down * kLanes) down *= 2;
  const int64_t height = equal(rows, down, kLanes), width = equal(cols, across, kTileCols);
  down = parts(rows, height);
  across = parts(cols, width);
  const int64_t blocks = down * across, workers = threads < blocks ? threads : blocks;
  const int64_t size = (height + width) * kBlockDepth / 2;  // pairs of one worker
  const std::array<int64_t, 1> all = {workers * size};
  const Tensor memory = empty(Sizes(all.data(), 1), ScalarType::Float);
  Pair* const packed = static_cast<Pair*>(memory.mutable_data_ptr());
  parallel_for(workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t i = w * blocks / workers; i < (w + 1) * blocks / workers; ++i) {
        product_block(p, i % down * height, height, i / down * width, width, packed + w * size);
      }
    }
  });
}
#else
void run(const ProductArgs&) {}
#endif

void bf16_product_(Tensor a, Tensor b, Tensor out, bool add) {
  constexpr const char* op = "bf16_product_";
  PPO_CHECK(bf16_dot(), op, "this CPU has no AVX512-BF16, or PPO_FAST_ISA is not avx512");
  const View x = view_of(a), y = view_of(b).transposed(), z = view_of(out);
  PPO_CHECK(a.sizes().size() == 2 && b.sizes().size() == 2 && out.sizes().size() == 2 &&
                x.cols == y.cols && z.rows == x.rows && z.cols == y.rows,
            op, "a must be (M, K), b (K, N) and out (M, N)");
  PPO_CHECK((x.dtype == DType::bf16 || x.dtype == DType::f32) && y.dtype == DType::bf16, op,
            "a must be bfloat16 or float32 and b bfloat16");
  PPO_CHECK(z.dtype == DType::f32 && (z.cols <= 1 || z.col_stride == 1), op,
            "out must be float32 with contiguous rows");
  run({x, y, data<float>(out), z.row_stride, add});
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("bf16_product_.cpu", TORCH_BOX(&ppo::bf16_product_));
}
