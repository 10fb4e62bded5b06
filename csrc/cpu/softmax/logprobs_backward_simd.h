// The gradient with respect to one segment of a row of logits (see foreach_isa.h).
namespace ppo::PPO_ISA {

template <class T>
struct GradientLanes {
  T inv_temperature, neg_max, log_sum, slope, offset;
  PPO_INLINE T of(T x) const {
    const T ln_p = vmax(set1<T>(kLowest<T>), vfma(x, inv_temperature, neg_max) - log_sum);
    return vexp_neg(ln_p) * vfma(slope, ln_p, offset);
  }
};

// `out` may be `x`.
template <class T, class P>
inline void segment_gradient(const P* x, P* out, int64_t n, const RowGradient& row) {
  using S = scalar_t<T>;
  const GradientLanes<T> lane{set1<T>(S(row.inv_temperature)), set1<T>(S(-row.row_max)),
                              set1<T>(S(row.log_sum)), set1<T>(S(row.slope)),
                              set1<T>(S(row.offset))};
  int64_t i = 0;
  for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>) {
    const T a = lane.of(load<T>(x + i)), b = lane.of(load<T>(x + i + lanes<T>));
    const T c = lane.of(load<T>(x + i + 2 * lanes<T>)), d = lane.of(load<T>(x + i + 3 * lanes<T>));
    store(out + i, a);
    store(out + i + lanes<T>, b);
    store(out + i + 2 * lanes<T>, c);
    store(out + i + 3 * lanes<T>, d);
  }
  for (; i < n; i += lanes<T>) store_n(out + i, lane.of(load_n<T>(x + i, n - i, 0)), n - i);
}

inline void softmax_gradient(DType dtype, const void* x, void* out, int64_t n,
                             const RowGradient& row) {
  switch (dtype) {
    case DType::f32:
      return segment_gradient<F>(static_cast<const float*>(x), static_cast<float*>(out), n, row);
    case DType::bf16:
      return segment_gradient<F>(static_cast<const bf16*>(x), static_cast<bf16*>(out), n, row);
    case DType::f16:
      return segment_gradient<F>(static_cast<const fp16*>(x), static_cast<fp16*>(out), n, row);
    default:
      return segment_gradient<double>(static_cast<const double*>(x), static_cast<double*>(out), n,
                                      row);
  }
}

}  // namespace ppo::PPO_ISA
