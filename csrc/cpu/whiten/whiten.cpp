// ppo_fast::moments.cpu and whiten.cpu: arguments and threads around the kernels of whiten_simd.h.
#include "../../ops/whiten.h"

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
  if (!x) return {RowIndex(), View{}};
  PPO_CHECK(x->is_cpu(), "whiten", "expected CPU tensors");
  const auto sizes = x->sizes(), strides = x->strides();
  const size_t rank = sizes.size();
  const int64_t cols = rank ? sizes[rank - 1] : 1, step = rank ? strides[rank - 1] : 1;
  return {RowIndex(sizes, strides, rank ? rank - 1 : 0),
          {x->const_data_ptr(), dtype_of(*x), 1, cols, 0, step}};
}

WhitenArgs arguments(const Tensor& x, const OptTensor& mask) {
  WhitenArgs a{flat_view(x), flat_view(mask), x.element_size(), 1, 0.0, 1.0, 0.0, false, nullptr};
  a.cols = a.x.view.cols;
  if (x.is_contiguous() && (!mask || mask->is_contiguous())) {
    a.cols = x.numel();
    a.x.view.col_stride = a.mask.view.col_stride = 1;  // a dimension of size 1 may have any stride
  }
  return a;
}

struct WhitenOnCpu {
  static void check(const char* op, const Tensor& x, const OptTensor& mask) {
    check_like(x, mask, op, "mask");
  }

  static Tensor moments(const Tensor& x, const OptTensor& mask) {
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

  static Tensor whiten(const Tensor& x, const OptTensor& mask, const Tensor& moments,
                       const WhitenOptions& o) {
    const View m = view_of(moments);
    const double n = read_at(m, 0, 0), free = o.unbiased ? n - 1.0 : n;
    const double var = free > 0.0 ? read_at(m, 0, 2) / free : 0.0;
    WhitenArgs a = arguments(x, mask);
    a.mean = read_at(m, 0, 1);
    a.scale = o.eps_at_std ? 1.0 / (std::sqrt(var) + o.eps) : 1.0 / std::sqrt(var + o.eps);
    a.add = o.shift_mean ? 0.0 : a.mean;
    a.flat = var == 0.0;
    Tensor out = empty(x.sizes(), compute_dtype(x));
    a.out = out.mutable_data_ptr();
    const auto kernel =
        is_double(x) ? PPO_SELECT(whiten_block<double>) : PPO_SELECT(whiten_block<float>);
    parallel_for(x.numel(), 2 * kMomentBlock,
                 [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
    return out;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, CPU, m) {
  m.impl("moments.cpu", TORCH_BOX(&moments<WhitenOnCpu>));
  m.impl("whiten.cpu", TORCH_BOX(&whiten<WhitenOnCpu>));
}

}  // namespace ppo
