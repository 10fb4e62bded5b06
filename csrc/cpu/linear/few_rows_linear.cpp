// ppo_fast::few_rows_linear.cpu: x · weightᵀ + bias for a few rows of x, where reading the weight
// is most of the work. The weight is read once, as it lies. There is no other device's kernel, so
// the arguments are read here.
#include "../../tensor/views.h"

namespace ppo {

// Rows of x that one pass over a weight's rows serves.
constexpr int64_t kRowBlock = 16;
// Rows of the weight that a thread takes at a time.
constexpr int64_t kOutputBlock = 48;

struct FewRowsArgs {
  const float* x;       // (blocks, K, kRowBlock), rows beyond the last are 0
  const float* weight;  // (V, K)
  int64_t weight_stride;
  const float* bias;  // (V,), or null
  float* out;         // (R, V)
  int64_t rows, depth, outputs;
};

}  // namespace ppo

#define PPO_KERNEL "../linear/few_rows_linear_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

// x (R, K) as blocks of columns.
std::vector<float> row_blocks(const View& x) {
  const int64_t blocks = (x.rows + kRowBlock - 1) / kRowBlock;
  std::vector<float> out(size_t(blocks * x.cols * kRowBlock));
  float* to = out.data();
  for (int64_t first = 0; first < x.rows; first += kRowBlock) {
    const int64_t live = x.rows - first < kRowBlock ? x.rows - first : kRowBlock;
    const float* from = at<float>(x, first, 0);
    for (int64_t k = 0; k < x.cols; ++k, to += kRowBlock, from += x.col_stride) {
      for (int64_t r = 0; r < live; ++r) to[r] = from[r * x.row_stride];
    }
  }
  return out;
}

Tensor few_rows_linear(Tensor x, Tensor weight, OptTensor bias) {
  constexpr const char* op = "few_rows_linear";
  const View a = view_of(x), w = view_of(weight);
  PPO_CHECK(x.sizes().size() == 2 && weight.sizes().size() == 2 && a.cols == w.cols, op,
            "x must be (R, K) and weight (V, K)");
  PPO_CHECK(a.dtype == DType::f32 && w.dtype == DType::f32, op, "x and weight must be float32");
  PPO_CHECK(w.cols <= 1 || w.col_stride == 1, op, "the weight's rows must be contiguous");
  if (bias) {
    const View b = view_of(*bias);
    PPO_CHECK(bias->sizes().size() == 1 && b.cols == w.rows && b.dtype == DType::f32 &&
                  (b.cols <= 1 || b.col_stride == 1),
              op, "bias must be contiguous float32 (V,)");
  }
  const std::array<int64_t, 2> sizes = {a.rows, w.rows};
  Tensor out = empty(Sizes(sizes.data(), 2), ScalarType::Float);
  const std::vector<float> packed = row_blocks(a);
  const FewRowsArgs args{
      packed.data(),    static_cast<const float*>(w.data),
      w.row_stride,     bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
      data<float>(out), a.rows,
      a.cols,           w.rows};
  const auto kernel = PPO_SELECT(few_rows_outputs);
  const int64_t blocks = (w.rows + kOutputBlock - 1) / kOutputBlock;
  parallel_for(blocks, 2, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kOutputBlock;
    kernel(args, begin * kOutputBlock, last < args.outputs ? last : args.outputs);
  });
  return out;
}

}  // namespace
}  // namespace ppo

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("few_rows_linear.cpu", TORCH_BOX(&ppo::few_rows_linear));
}
