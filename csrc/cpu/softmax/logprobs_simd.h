// Kernels over a segment of a row of logits: softmax state and gradient (no include guard, see
// foreach_isa.h).
namespace ppo::PPO_ISA {

// Logits are summed in blocks that stay in L1 between finding the maximum and the exponentials;
// block sums are added up separately, which keeps fp32 rounding at the level of V / kSumBlock
// terms.
constexpr int64_t kSumBlock = 256;
constexpr int64_t kPrefetchBytes = 2048;

template <class T>
constexpr scalar_t<T> kMostNegative = sizeof(scalar_t<T>) == 8 ? -DBL_MAX : -FLT_MAX;

template <class T, class P>
PPO_INLINE T block_max(const P* x, int64_t n) {
  const auto fill = -__builtin_inff();
  T a = set1<T>(fill), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 * lanes<T> <= n; i += 4 * lanes<T>) {
    a = vmax(a, load<T>(x + i));
    b = vmax(b, load<T>(x + i + lanes<T>));
    c = vmax(c, load<T>(x + i + 2 * lanes<T>));
    d = vmax(d, load<T>(x + i + 3 * lanes<T>));
  }
  for (; i < n; i += lanes<T>) a = vmax(a, load_n<T>(x + i, n - i, fill));
  return vmax(vmax(a, b), vmax(c, d));
}

// Prefetch of two vectors of a later step. The one-lane loop never waits for memory, and a
// prefetch would stop GCC's vectoriser.
template <class T, class P>
PPO_INLINE void prefetch([[maybe_unused]] const P* x) {
  if constexpr (lanes<T> > 1) {
    const char* ahead = reinterpret_cast<const char*>(x) + kPrefetchBytes;
    __builtin_prefetch(ahead);
    if constexpr (2 * lanes<T> * sizeof(P) > 64) __builtin_prefetch(ahead + 64);
  }
}

template <class T>
struct Sums {
  T sum, dot;  // of e^d and d e^d
  PPO_INLINE void add(T x, T inv_temperature, T neg_max) {
    const T d = vmax(set1<T>(kLowest<T>), vfma(x, inv_temperature, neg_max));
    const T e = vexp_neg(d);
    sum = sum + e;
    dot = vfma(d, e, dot);
  }
};

template <class T, class P>
PPO_INLINE Sums<T> block_sums(const P* x, int64_t n, T inv_temperature, T neg_max) {
  const auto fill = -__builtin_inff();
  Sums<T> a{set1<T>(0), set1<T>(0)}, b = a;
  int64_t i = 0;
  for (; i + 2 * lanes<T> <= n; i += 2 * lanes<T>) {
    prefetch<T>(x + i);
    a.add(load<T>(x + i), inv_temperature, neg_max);
    b.add(load<T>(x + i + lanes<T>), inv_temperature, neg_max);
  }
  for (; i < n; i += lanes<T>) a.add(load_n<T>(x + i, n - i, fill), inv_temperature, neg_max);
  return {a.sum + b.sum, a.dot + b.dot};
}

template <class T>
struct Running {
  scalar_t<T> inv_temperature;
  scalar_t<T> peak = -__builtin_inff();  // the largest logit so far
  scalar_t<T> max = kMostNegative<T>;  // z of peak, but finite: a logit of -inf minus max is -inf
  T sum = set1<T>(0), dot = set1<T>(0);

  PPO_INLINE explicit Running(scalar_t<T> inv) : inv_temperature(inv) {}

  // Rescales the sums to a new maximum; rare after the first blocks of a row.
  PPO_INLINE void raise(T block_peak) {
    peak = reduce_max(block_peak);
    const scalar_t<T> before = max;
    max = vmax(kMostNegative<T>, peak * inv_temperature);
    const T delta = set1<T>(vmax(kLowest<T>, before - max));
    const T scale = vexp_neg(delta);
    dot = vfma(delta, sum, dot) * scale;
    sum = sum * scale;
  }
  template <class P>
  PPO_INLINE void add_block(const P* x, int64_t n) {
    const T block_peak = block_max<T>(x, n);
    if (any(block_peak > set1<T>(peak))) raise(block_peak);
    const Sums<T> block = block_sums<T>(x, n, set1<T>(inv_temperature), set1<T>(-max));
    sum = sum + block.sum;
    dot = dot + block.dot;
  }
};

// A NaN or +inf logit leaves NaN sums; a segment of -inf alone leaves sum 0.
template <class T, class P>
inline SoftmaxState segment_state(const P* x, int64_t n, double inv_temperature) {
  Running<T> state{scalar_t<T>(inv_temperature)};
  int64_t i = 0;
  for (; i + kSumBlock <= n; i += kSumBlock) state.add_block(x + i, kSumBlock);
  if (i < n) state.add_block(x + i, n - i);
  Acc<T> sum, dot;
  sum.add(state.sum);
  dot.add(state.dot);
  return {double(state.max), sum.total(), dot.total()};
}

inline SoftmaxState softmax_state(DType dtype, const void* x, int64_t n, double inv_temperature) {
  switch (dtype) {
    case DType::f32:
      return segment_state<F>(static_cast<const float*>(x), n, inv_temperature);
    case DType::bf16:
      return segment_state<F>(static_cast<const bf16*>(x), n, inv_temperature);
    case DType::f16:
      return segment_state<F>(static_cast<const fp16*>(x), n, inv_temperature);
    default:
      return segment_state<double>(static_cast<const double*>(x), n, inv_temperature);
  }
}

template <class T>
struct GradientLanes {
  T inv_temperature, neg_max, log_sum, slope, offset;
  PPO_INLINE T of(T x) const {
    const T ln_p = vmax(set1<T>(kLowest<T>), vfma(x, inv_temperature, neg_max) - log_sum);
    return vexp_neg(ln_p) * vfma(slope, ln_p, offset);
  }
};

// `out` may be `x`.
template <class T, class P, class Q>
inline void segment_gradient(const P* x, Q* out, int64_t n, const RowGradient& row) {
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

// The same, fp32 (fp64 for fp64) from logits of any dtype.
inline void softmax_gradient_wide(DType dtype, const void* x, void* out, int64_t n,
                                  const RowGradient& row) {
  float* const to = static_cast<float*>(out);
  switch (dtype) {
    case DType::bf16:
      return segment_gradient<F>(static_cast<const bf16*>(x), to, n, row);
    case DType::f16:
      return segment_gradient<F>(static_cast<const fp16*>(x), to, n, row);
    default:
      return softmax_gradient(dtype, x, out, n, row);
  }
}

}  // namespace ppo::PPO_ISA
