// Eight consecutive steps at a time, the unit of the advantage recurrences (no include guard, see
// foreach_isa.h). Chunks are anchored at their sequence's first step. A Row has one sequence, its
// steps along the lanes of a vector; a Column has a sequence in every lane. Both do the same
// operations for every step, so a sequence's bits depend on neither.
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

// One and the same where a vector has one lane.
using Row = Chunk<F, kSteps / lanes<F>>;
template <class T>
using Column = Chunk<T, kSteps>;

template <class C>
constexpr int sequences = C::count * lanes<typename C::T> / kSteps;
template <class C>
using flags_t = Flags<typename C::T, C::count>;

// The steps [t, t + steps) of `seqs` sequences from `seq` on, whose first step is column `first`.
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

// The slots that exist.
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

// Lanes `stride` elements apart; the others are 0.
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

// Slots that do not exist read as 0, and are not touched.
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

// Whole chunks of the computation's own type, neighbours in the lanes' direction.
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

// Into an output, contiguous in the lanes' direction.
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

}  // namespace ppo::PPO_ISA
