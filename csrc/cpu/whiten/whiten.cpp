// ppo_fast::moments.cpu and whiten.cpu: arguments and threads around the kernels of whiten_simd.h.
#include "../../tensor/rows.h"

namespace ppo {

constexpr int64_t kMomentBlock = 1 << 14;

// A tensor of any rank, addressed by its flat slot: rows of `cols` elements.
struct FlatView {
  RowIndex rows;
  View view;  // of a row; null data where absent

  // View whose row 0 is row i.
  View row(int64_t i, size_t element_size) const {
    View v = view;
    v.data = static_cast<const char*>(view.data) + size_t(rows.offset(i)) * element_size;
    return v;
  }
};

struct WhitenArgs {
  FlatView x, mask;
  size_t x_size;  // of an element, in bytes
  int64_t cols;
  // whiten: y = (x - mean) * scale + add where kept; y = add if `flat`.
  double mean, scale, add;
  bool flat;
  void* out;
};

}  // namespace ppo

#define PPO_KERNEL "../whiten/whiten_simd.h"
#include "../simd/foreach_isa.h"

namespace ppo {
namespace {

FlatView flat_view(const OptTensor& x) {
  if (!x) return {RowIndex({}, {}, 0), View{}};
  PPO_CHECK(x->is_cpu(), "whiten", "expected CPU tensors");
  const auto sizes = x->sizes(), strides = x->strides();
  const size_t rank = sizes.size();
  const int64_t cols = rank ? sizes[rank - 1] : 1, step = rank ? strides[rank - 1] : 1;
  return {RowIndex(sizes, strides, rank ? rank - 1 : 0),
          {x->const_data_ptr(), dtype_of(*x), 1, cols, 0, step}};
}

WhitenArgs arguments(const Tensor& x, const OptTensor& mask) {
  check_like(x, mask, "whiten", "mask");
  WhitenArgs a{flat_view(x), flat_view(mask), x.element_size(), 1, 0.0, 1.0, 0.0, false, nullptr};
  a.cols = a.x.view.cols;
  if (x.is_contiguous() && (!mask || mask->is_contiguous())) {
    a.cols = x.numel();
    a.x.view.col_stride = a.mask.view.col_stride = 1;  // a dimension of size 1 may have any stride
  }
  return a;
}

Tensor moments(const Tensor x, const OptTensor mask) {
  const WhitenArgs a = arguments(x, mask);
  const int64_t n = x.numel(), blocks = (n + kMomentBlock - 1) / kMomentBlock;
  const auto kernel =
      is_double(x) ? PPO_SELECT(moment_block<double>) : PPO_SELECT(moment_block<float>);
  std::vector<double> partials(3 * size_t(blocks));
  parallel_for(blocks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t last = (i + 1) * kMomentBlock;
      kernel(a, i * kMomentBlock, last < n ? last : n, &partials[3 * size_t(i)]);
    }
  });
  const int64_t three = 3;
  Tensor out = empty(Sizes(&three, 1), ScalarType::Double);
  merge_moments(partials, data<double>(out));
  return out;
}

// codes: [shift_mean, unbiased, eps_at_std]; params: [eps]
Tensor whiten(const Tensor x, const OptTensor mask, const Tensor moments,
              const std::vector<int64_t> codes, const std::vector<double> params) {
  check_options(codes, 3, params, 1, "whiten");
  const View m = view_of(moments);
  PPO_CHECK(m.rows == 1 && m.cols == 3 && m.dtype == DType::f64, "whiten",
            "moments must be float64 (3,)");
  const double n = read_at(m, 0, 0), free = codes[1] ? n - 1.0 : n, eps = params[0];
  const double var = free > 0.0 ? read_at(m, 0, 2) / free : 0.0;
  WhitenArgs a = arguments(x, mask);
  a.mean = read_at(m, 0, 1);
  a.scale = codes[2] ? 1.0 / (std::sqrt(var) + eps) : 1.0 / std::sqrt(var + eps);
  a.add = codes[0] ? 0.0 : a.mean;
  a.flat = var == 0.0;
  Tensor out = empty(x.sizes(), compute_dtype(x));
  a.out = out.mutable_data_ptr();
  const auto kernel =
      is_double(x) ? PPO_SELECT(whiten_block<double>) : PPO_SELECT(whiten_block<float>);
  parallel_for(x.numel(), 2 * kMomentBlock,
               [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("moments.cpu", TORCH_BOX(&moments));
  m.impl("whiten.cpu", TORCH_BOX(&whiten));
}

}  // namespace ppo
