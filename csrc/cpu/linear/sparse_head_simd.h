// Kernels of the sparse head: dots with, and weighted sums of, rows of a matrix taken by index (no
// include guard, see foreach_isa.h). Memory is most of the work: rows are requested ahead of
// their use. Every dot and every element of a sum is added up in an order of its own, fixed by the
// columns and by the pairs: how many are taken together changes no bit.
namespace ppo::PPO_ISA {

// Rows whose dots run side by side, and rows that are added to a sum at a time.
constexpr int kDots = 8, kAddends = 4;

template <class P>
PPO_INLINE const P* row_at(const Gathered& m, int64_t i) {
  return static_cast<const P*>(m.data) + i * m.stride;
}

// Requests the line at `h` of the rows index[0 .. count).
template <int count, class P, class I>
PPO_INLINE void request([[maybe_unused]] const Gathered& m, [[maybe_unused]] const I* index,
                        [[maybe_unused]] int64_t h) {
#if PPO_ISA_WIDTH > 1
  // No pointers: an absent id's row is outside of the matrix, and a request of it has no effect.
  for (int i = 0; i < count; ++i) {
    const int64_t at = (int64_t(index[i]) * m.stride + h) * int64_t(sizeof(P));
    __builtin_prefetch(reinterpret_cast<const void*>(uintptr_t(m.data) + uintptr_t(at)));
  }
#endif
}

// Dots of x with `count` rows; requests the rows next[0 .. count).
template <int count, class T, class P>
inline void dots(const P* x, const P* const* rows, const Gathered& m, const int32_t* next,
                 scalar_t<T>* out) {
  constexpr int64_t kLine = 64 / sizeof(P);
  T sum[count];
  for (int i = 0; i < count; ++i) sum[i] = set1<T>(0);
  for (int64_t start = 0; start < m.cols; start += kLine) {
    request<count, P>(m, next, start);
    const int64_t end = start + kLine < m.cols ? start + kLine : m.cols;
    for (int64_t h = start; h < end; h += lanes<T>) {
      const T v = load_first<T>(x + h, m.cols - h);
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) {
        sum[i] = vfma(load_first<T>(rows[i] + h, m.cols - h), v, sum[i]);
      }
    }
  }
  for (int i = 0; i < count; ++i) out[i] = reduce_add(sum[i]);
}

// Logits of `count` pairs.
template <int count, class T, class P>
inline void pair_logits(const P* x, const Gathered& w, const int32_t* ids, const int32_t* next,
                        scalar_t<T>* out) {
  const P* rows[count];
  for (int i = 0; i < count; ++i) rows[i] = w.has(ids[i]) ? row_at<P>(w, ids[i]) : x;
  scalar_t<T> dot[count];
  dots<count, T>(x, rows, w, next, dot);
  for (int i = 0; i < count; ++i) {
    out[i] = w.has(ids[i]) ? dot[i] : ids[i] == kAbsent ? -__builtin_inff() : __builtin_nanf("");
  }
}

template <class T, class P>
inline void row_logits(const P* x, const Gathered& w, const int32_t* ids, int64_t n,
                       int64_t readable, scalar_t<T>* out) {
  int64_t i = 0;
  // The ids whose rows are requested meanwhile; beyond the last id, these again.
  const auto next = [&](int64_t count) {
    return ids + (i + 2 * count <= readable ? i + count : i);
  };
  for (; i + kDots <= n; i += kDots) pair_logits<kDots, T>(x, w, ids + i, next(kDots), out + i);
  if (i + 4 <= n) {
    pair_logits<4, T>(x, w, ids + i, next(4), out + i);
    i += 4;
  }
  for (; i < n; ++i) pair_logits<1, T>(x, w, ids + i, next(1), out + i);
}

// Logits of n pairs of one row x, -inf where absent, NaN where the id is wrong. `readable` ids
// follow, those of later rows included.
inline void sparse_row_logits(const void* x, const Gathered& w, const int32_t* ids, int64_t n,
                              int64_t readable, void* out) {
  float* const to = static_cast<float*>(out);
  switch (w.dtype) {
    case DType::f32:
      return row_logits<F>(static_cast<const float*>(x), w, ids, n, readable, to);
    case DType::bf16:
      return row_logits<F>(static_cast<const bf16*>(x), w, ids, n, readable, to);
    case DType::f16:
      return row_logits<F>(static_cast<const fp16*>(x), w, ids, n, readable, to);
    default:
      return row_logits<double>(static_cast<const double*>(x), w, ids, n, readable,
                                static_cast<double*>(out));
  }
}

// sum += Σ scale·row of `count` rows, in order; requests the rows next[0 .. count).
template <int count, class T, class P, class I>
inline void add_rows(const Gathered& m, const P* const* rows, const scalar_t<T>* scale,
                     const I* next, scalar_t<T>* sum) {
  constexpr int64_t kLine = 64 / sizeof(P);
  T factor[count];
  for (int i = 0; i < count; ++i) factor[i] = set1<T>(scale[i]);
  for (int64_t start = 0; start < m.cols; start += kLine) {
    request<count, P>(m, next, start);
    const int64_t end = start + kLine < m.cols ? start + kLine : m.cols;
    for (int64_t h = start; h < end; h += lanes<T>) {
      const int64_t left = m.cols - h;
      T total = load_first<T>(sum + h, left);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        total = vfma(factor[i], load_first<T>(rows[i] + h, left), total);
      }
      store_first(sum + h, total, left);
    }
  }
}

template <class T, class P, class I>
inline void row_sum(const Gathered& m, const I* index, const scalar_t<T>* scale, int64_t n,
                    int64_t readable, scalar_t<T>* sum, P* out) {
  for (int64_t h = 0; h < m.cols; ++h) sum[h] = 0;
  const P* rows[kAddends];
  scalar_t<T> factor[kAddends];
  int taken = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (scale[i] == 0 || !m.has(index[i])) continue;
    rows[taken] = row_at<P>(m, index[i]);
    factor[taken++] = scale[i];
    if (taken == kAddends) {
      const int64_t next = i + 1 + kAddends <= readable ? i + 1 : i + 1 - kAddends;
      add_rows<kAddends, T>(m, rows, factor, index + next, sum);
      taken = 0;
    }
  }
  for (int i = 0; i < taken; ++i) add_rows<1, T>(m, rows + i, factor + i, index + n - 1, sum);
  for (int64_t h = 0; h < m.cols; h += lanes<T>) {
    store_first(out + h, load_first<T>(sum + h, m.cols - h), m.cols - h);
  }
}

// Σ scale·row over n pairs, rounded once: those of scale 0, and indices that m lacks, take no
// part. `readable` indices follow; `sum` has room for m.cols numbers.
template <class I>
inline void sparse_row_sum(const Gathered& m, const I* index, const void* scale, int64_t n,
                           int64_t readable, void* sum, void* out) {
  const float* const s = static_cast<const float*>(scale);
  float* const t = static_cast<float*>(sum);
  switch (m.dtype) {
    case DType::f32:
      return row_sum<F>(m, index, s, n, readable, t, static_cast<float*>(out));
    case DType::bf16:
      return row_sum<F>(m, index, s, n, readable, t, static_cast<bf16*>(out));
    case DType::f16:
      return row_sum<F>(m, index, s, n, readable, t, static_cast<fp16*>(out));
    default:
      return row_sum<double>(m, index, static_cast<const double*>(scale), n, readable,
                             static_cast<double*>(sum), static_cast<double*>(out));
  }
}

}  // namespace ppo::PPO_ISA
