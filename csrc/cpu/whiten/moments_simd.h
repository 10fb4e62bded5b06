// Count, mean and sum of squared deviations of a stream (no include guard, see foreach_isa.h).
//
// Sums are of x - pivot, in double; the pivot is the first live element, so that equal elements
// give exactly zero deviation and a large common mean costs no digits.
namespace ppo::PPO_ISA {

// Loops over consecutive elements: the widest lane type with a given scalar.
template <class S>
struct WidestOf {
  using type = F;
};
template <>
struct WidestOf<double> {
  using type = double;
};
template <class S>
using widest = typename WidestOf<S>::type;

// The first n lanes from p as numbers, bytes as 0 and 1; the others are 0.
template <class T, class P>
PPO_INLINE T load_first(const P* p, int64_t n) {
  return n >= lanes<T> ? load<T>(p) : load_n<T>(p, n, 0);
}
template <class T>
PPO_INLINE T load_first(const uint8_t* p, int64_t n) {
  const auto set = n >= lanes<T> ? load_mask<T>(p) : load_mask_n<T>(p, n);
  return select(set, set1<T>(1), set1<T>(0));
}
template <class P, class T>
PPO_INLINE void store_first(P* p, T x, int64_t n) {
  if (n >= lanes<T>) {
    store(p, x);
  } else {
    store_n(p, x, n);
  }
}

// sum += x - pivot and squares += (x - pivot)^2, exact in double.
PPO_INLINE void add_deviation(ScalarAcc& sum, ScalarAcc& squares, double x, double pivot) {
  const double d = x - pivot;
  sum.sum += d;
  squares.sum += d * d;
}
#if PPO_ISA_WIDTH == 8
PPO_INLINE void add_deviation(VectorAcc& sum, VectorAcc& squares, F x, double pivot) {
  const __m256d p = _mm256_set1_pd(pivot);
  const __m256d lo = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)), p);
  const __m256d hi = _mm256_sub_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)), p);
  sum.lo = _mm256_add_pd(sum.lo, lo);
  sum.hi = _mm256_add_pd(sum.hi, hi);
  squares.lo = _mm256_fmadd_pd(lo, lo, squares.lo);
  squares.hi = _mm256_fmadd_pd(hi, hi, squares.hi);
}
#elif PPO_ISA_WIDTH == 16
PPO_INLINE void add_deviation(VectorAcc& sum, VectorAcc& squares, F x, double pivot) {
  const __m512d p = _mm512_set1_pd(pivot);
  const __m512d lo = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)), p);
  const __m512d hi = _mm512_sub_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)), p);
  sum.lo = _mm512_add_pd(sum.lo, lo);
  sum.hi = _mm512_add_pd(sum.hi, hi);
  squares.lo = _mm512_fmadd_pd(lo, lo, squares.lo);
  squares.hi = _mm512_fmadd_pd(hi, hi, squares.hi);
}
#endif

// (count, mean, M2) from the sums of deviations from a pivot.
inline void write_moments(double count, double pivot, double sum, double squares, double* out) {
  const double shift = count > 0 ? sum / count : 0.0, m2 = squares - shift * sum;
  out[0] = count;
  out[1] = count > 0 ? pivot + shift : 0.0;
  out[2] = m2 < 0 ? 0.0 : m2;
}

template <class S>
struct MomentSum {
  using V = widest<S>;
  double count;
  S pivot;
  Acc<V> sum, squares;

  // An implicit constructor would not inherit the pragma's target.
  PPO_INLINE MomentSum() : count(0), pivot(0) {}

  // Elements of x[0, n) whose `live` (bytes or S) is not 0; null: all of them.
  template <class Live>
  void add(const S* x, const Live* live, int64_t n) {
    if (count == 0 && !find_pivot(x, live, n)) return;
    if (live) {
      accumulate<true>(x, live, n);
    } else {
      accumulate<false>(x, live, n);
    }
  }

  void write(double* out) const { write_moments(count, pivot, sum.total(), squares.total(), out); }

 private:
  template <class Live>
  bool find_pivot(const S* x, const Live* live, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (live && live[i] == Live(0)) continue;
      pivot = x[i];
      return true;
    }
    return false;
  }

  template <bool masked, class Live>
  void accumulate(const S* x, const Live* live, int64_t n) {
    const V p = set1<V>(pivot), zero = set1<V>(0);
    // Locals stay in registers over the loop.
    Acc<V> s = sum, q = squares;
    int64_t seen = masked ? 0 : n;
    for (int64_t i = 0; i < n; i += lanes<V>) {
      V element = load_first<V>(x + i, n - i);
      if (masked) {
        const auto keep = load_first<V>(live + i, n - i) != zero;
        element = select(keep, element, p);
        seen += ppo::PPO_ISA::count(keep);
      } else if (n - i < lanes<V>) {
        element = select(first_n<V>(n - i), element, p);
      }
      add_deviation(s, q, element, double(pivot));
    }
    sum = s;
    squares = q;
    count += double(seen);
  }
};

}  // namespace ppo::PPO_ISA
