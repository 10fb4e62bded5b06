// Chunks of eight consecutive steps, the unit of the advantage recurrences, and the scan tree
// inside them (no include guard, see foreach_isa.h). Chunks start at their sequence's first step.
// A Row holds one sequence, steps along the lanes of a vector; a Column holds one sequence per
// lane. Both do the same operations for every step, so a sequence gets the same bits from either.
namespace ppo::PPO_ISA {

constexpr int kSteps = 8;

template <class Lanes, int N>
struct Chunk {
  using T = Lanes;
  static constexpr int count = N;
  Lanes r[N];
};
template <class Lanes, int N>
struct Flags {
  mask_t<Lanes> r[N];
};

// With one lane per vector, Row and Column are the same type.
using Row = Chunk<F, kSteps / lanes<F>>;
template <class T>
using Column = Chunk<T, kSteps>;

template <class C>
constexpr int sequences = C::count * lanes<typename C::T> / kSteps;
template <class C>
using flags_t = Flags<typename C::T, C::count>;

// Steps [t, t + steps) of the sequences [seq, seq + seqs), which start at column `first`.
struct Place {
  int64_t seq, first, t, steps, seqs;

  template <class C>
  PPO_INLINE bool full() const {
    return steps == kSteps && seqs == sequences<C>;
  }
};

#define PPO_EACH(op)                                                               \
  template <class T, int N>                                                        \
  PPO_INLINE Chunk<T, N> operator op(const Chunk<T, N>& a, const Chunk<T, N>& b) { \
    Chunk<T, N> c;                                                                 \
    for (int i = 0; i < N; ++i) c.r[i] = a.r[i] op b.r[i];                         \
    return c;                                                                      \
  }
PPO_EACH(+)
PPO_EACH(-)
PPO_EACH(*)
#undef PPO_EACH
#define PPO_EACH(op)                                                               \
  template <class T, int N>                                                        \
  PPO_INLINE Flags<T, N> operator op(const Flags<T, N>& a, const Flags<T, N>& b) { \
    Flags<T, N> c;                                                                 \
    for (int i = 0; i < N; ++i) c.r[i] = a.r[i] op b.r[i];                         \
    return c;                                                                      \
  }
PPO_EACH(&)
PPO_EACH(|)
#undef PPO_EACH

template <class C>
PPO_INLINE C splat(typename C::T x) {
  C c;
  for (auto& lanes : c.r) lanes = x;
  return c;
}
template <class T, int N>
PPO_INLINE Chunk<T, N> vfma(const Chunk<T, N>& a, const Chunk<T, N>& b, const Chunk<T, N>& c) {
  Chunk<T, N> d;
  for (int i = 0; i < N; ++i) d.r[i] = vfma(a.r[i], b.r[i], c.r[i]);
  return d;
}
template <class T, int N>
PPO_INLINE Chunk<T, N> select(const Flags<T, N>& m, const Chunk<T, N>& a, const Chunk<T, N>& b) {
  Chunk<T, N> c;
  for (int i = 0; i < N; ++i) c.r[i] = select(m.r[i], a.r[i], b.r[i]);
  return c;
}
template <class T, int N>
PPO_INLINE Flags<T, N> nonzero(const Chunk<T, N>& a) {
  Flags<T, N> m;
  for (int i = 0; i < N; ++i) m.r[i] = a.r[i] != set1<T>(0);
  return m;
}
template <class T, int N>
PPO_INLINE bool all(const Flags<T, N>& m) {
  bool yes = true;
  for (int i = 0; i < N; ++i) yes &= all(m.r[i]);
  return yes;
}
template <class T, int N>
PPO_INLINE bool any(const Flags<T, N>& m) {
  bool yes = false;
  for (int i = 0; i < N; ++i) yes |= any(m.r[i]);
  return yes;
}

// Flags of the slots that exist.
template <class C>
PPO_INLINE flags_t<C> present(const Place& at) {
  using T = typename C::T;
  flags_t<C> m;
  if constexpr (C::count == 1) {
    m.r[0] = first_n<T>(at.steps);
  } else {
    for (int i = 0; i < kSteps; ++i) m.r[i] = first_n<T>(i < at.steps ? at.seqs : 0);
  }
  return m;
}

// Loads n lanes, `stride` elements apart; the other lanes are 0.
template <class T, class P>
PPO_INLINE T load_apart(const P* p, int64_t stride, int64_t n) {
  if (stride == 1 || lanes<T> == 1) return load_first<T>(p, n);
  scalar_t<T> x[lanes<T>] = {};
  for (int64_t l = 0; l < n; ++l) x[l] = load_first<scalar_t<T>>(p + l * stride, 1);
  return load<T>(x);
}

template <class C, class P>
PPO_INLINE C load_as(const View& v, const Place& at) {
  using T = typename C::T;
  const P* p = ppo::at<P>(v, at.seq, at.first + at.t);
  C c;
  if constexpr (C::count == 1) {
    c.r[0] = load_apart<T>(p, v.col_stride, at.steps);
  } else {
    for (int i = 0; i < kSteps; ++i) {
      c.r[i] = load_apart<T>(p + (i < at.steps ? i : 0) * v.col_stride, v.row_stride,
                             i < at.steps ? at.seqs : 0);
    }
  }
  return c;
}

// Loads a chunk; slots that do not exist read as 0 and are not touched.
template <class C>
C load_chunk(const View& v, const Place& at) {
  if constexpr (sizeof(scalar_t<typename C::T>) == 8) {
    if (v.dtype == DType::f64) return load_as<C, double>(v, at);
  } else {
    switch (v.dtype) {
      case DType::f32:
        return load_as<C, float>(v, at);
      case DType::bf16:
        return load_as<C, bf16>(v, at);
      case DType::f16:
        return load_as<C, fp16>(v, at);
      default:
        break;
    }
  }
  return load_as<C, uint8_t>(v, at);
}

// Whether whole chunks can be loaded as they are: the computation's own type, contiguous along the
// lanes.
template <class C>
PPO_INLINE bool direct(const View& v) {
  using T = typename C::T;
  constexpr DType own = sizeof(scalar_t<T>) == 8 ? DType::f64 : DType::f32;
  return v.dtype == own && (lanes<T> == 1 || (C::count == 1 ? v.col_stride : v.row_stride) == 1);
}
template <class C, class S>
PPO_INLINE C load_direct(const S* p, int64_t stride) {
  C c;
  for (auto& x : c.r) x = load<typename C::T>(p), p += stride;
  return c;
}
template <class C, class S>
PPO_INLINE void store_direct(S* p, int64_t stride, const C& c) {
  for (const auto& x : c.r) store(p, x), p += stride;
}

// Stores a chunk to an output, contiguous along the lanes.
template <class C>
PPO_INLINE void store_chunk(const View& v, const Place& at, const C& c) {
  using T = typename C::T;
  auto* p = const_cast<scalar_t<T>*>(ppo::at<scalar_t<T>>(v, at.seq, at.first + at.t));
  if constexpr (C::count == 1) {
    store_first(p, c.r[0], at.steps);
  } else {
    for (int i = 0; i < at.steps; ++i) store_first(p + i * v.col_stride, c.r[i], at.seqs);
  }
}

// Sklansky level s: every step in the first half of a 2s-block reads the first step of the second
// half. Column: register `half_of(i, s)`. Row: shuffle `later_half`, blended by `earlier_half`.
PPO_INLINE constexpr bool is_earlier(int i, int s) { return (i & s) == 0; }
PPO_INLINE constexpr int half_of(int i, int s) { return (i | s) & ~(s - 1); }

template <int s, class T>
PPO_INLINE void fold(const Column<T>& a, Column<T>& b) {
  for (int i = 0; i < kSteps; ++i) {
    if (is_earlier(i, s)) b.r[i] = vfma(a.r[i], b.r[half_of(i, s)], b.r[i]);
  }
}
template <int s, class T>
PPO_INLINE void fold_factors(Column<T>& a) {
  for (int i = 0; i < kSteps; ++i) {
    if (is_earlier(i, s)) a.r[i] = a.r[i] * a.r[half_of(i, s)];
  }
}
template <int s, class T>
PPO_INLINE void fold_cut(Flags<T, kSteps>& cut, const Column<T>& a, Column<T>& b) {
  for (int i = 0; i < kSteps; ++i) {
    if (!is_earlier(i, s)) continue;
    b.r[i] = select(cut.r[i], b.r[i], vfma(a.r[i], b.r[half_of(i, s)], b.r[i]));
    cut.r[i] = cut.r[i] | cut.r[half_of(i, s)];
  }
}
// x shifted by one step: step i gets step i + 1, the last step gets `carried`.
template <class T>
PPO_INLINE Column<T> next_step(const Column<T>& x, T carried) {
  Column<T> y;
  for (int i = 0; i + 1 < kSteps; ++i) y.r[i] = x.r[i + 1];
  y.r[kSteps - 1] = carried;
  return y;
}
// The same shift for a chunk at p whose successor follows in memory.
template <class T, class S>
PPO_INLINE Column<T> next_in_memory(const Column<T>& x, const S*, T carried) {
  return next_step(x, carried);
}
template <class T>
PPO_INLINE T first_step(const Column<T>& x) {
  return x.r[0];
}
// For every step, x at the first flagged step from there on; `carried` if there is none.
template <class T>
PPO_INLINE Column<T> first_flagged(const Flags<T, kSteps>& m, const Column<T>& x, T carried) {
  Column<T> y;
  for (int i = kSteps - 1; i >= 0; --i) y.r[i] = carried = select(m.r[i], x.r[i], carried);
  return y;
}

#if PPO_ISA_WIDTH == 8
template <int s>
PPO_INLINE void fold(const Row& a, Row& b) {
  b.r[0] = fold_half<s>(a.r[0], b.r[0]);
}
template <int s>
PPO_INLINE void fold_factors(Row& a) {
  a.r[0] = earlier_half<s>(a.r[0], a.r[0] * later_half<s>(a.r[0]));
}
template <int s>
PPO_INLINE void fold_cut(Flags<F, 1>& cut, const Row& a, Row& b) {
  Row folded = b;
  fold<s>(a, folded);
  b = select(cut, b, folded);
  cut.r[0] = or_later<s>(cut.r[0]);
}
PPO_INLINE Row next_step(const Row& x, F carried) { return {{shift_in(x.r[0], carried)}}; }
PPO_INLINE Row next_in_memory(const Row&, const float* p, F) { return {{load<F>(p + 1)}}; }
PPO_INLINE F first_step(const Row& x) { return first_lane(x.r[0]); }
PPO_INLINE Row first_flagged(const Flags<F, 1>& m, const Row& x, F carried) {
  const int set = mask_bits(m.r[0]);
  if ((set & (set + 1)) == 0) return {{select(m.r[0], x.r[0], carried)}};  // the first so many
  float y[kSteps], last[kSteps];
  store(y, x.r[0]);
  store(last, carried);
  for (int i = kSteps - 1; i >= 0; --i) y[i] = last[0] = (set >> i) & 1 ? y[i] : last[0];
  return {{load<F>(y)}};
}
#endif

}  // namespace ppo::PPO_ISA
