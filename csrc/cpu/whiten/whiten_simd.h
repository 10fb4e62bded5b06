// Kernels of moments and whitening over a range of flat slots (no include guard, see
// foreach_isa.h).
namespace ppo::PPO_ISA {

// Widest lane type with a given scalar, for loops over consecutive elements.
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

template <class S>
struct MomentSum {
  using V = widest<S>;
  double count;
  S pivot;
  Acc<V> sum, squares;

  // An implicit constructor would not inherit the pragma's target.
  PPO_INLINE MomentSum() : count(0), pivot(0) {}

  // Adds the elements of x[0, n) whose `live` (bytes or S) is not 0; all if `live` is null.
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

// Consecutive slots of one row, converted to S.
template <class S>
struct WhitenPiece {
  static constexpr int64_t kMost = 1024;
  const S* x;
  const uint8_t* mask;
  int64_t size;
  alignas(64) S buffer[kMost];
  uint8_t mask_buffer[kMost];

  void read(const WhitenArgs& a, int64_t slot, int64_t last) {
    const int64_t row = slot / a.cols, col = slot % a.cols;
    size = a.cols - col < last - slot ? a.cols - col : last - slot;
    if (size > kMost) size = kMost;
    x = fetch(a.x.row(row, a.x_size), 0, col, size, buffer);
    mask = a.mask.view.data ? fetch_bytes(a.mask.row(row, 1), 0, col, size, mask_buffer) : nullptr;
  }
};

template <class S>
void moment_block(const WhitenArgs& a, int64_t first, int64_t last, double* out) {
  WhitenPiece<S> piece;
  MomentSum<S> sum;
  for (int64_t slot = first; slot < last; slot += piece.size) {
    piece.read(a, slot, last);
    sum.add(piece.x, piece.mask, piece.size);
  }
  sum.write(out);
}

template <class S>
void whiten_block(const WhitenArgs& a, int64_t first, int64_t last) {
  using V = widest<S>;
  // The mean is in two parts: rounding it once would shift every element alike.
  const V high = set1<V>(S(a.mean)), low = set1<V>(S(a.mean - double(S(a.mean))));
  const V scale = set1<V>(S(a.scale)), add = set1<V>(S(a.add)), zero = set1<V>(0);
  S* out = static_cast<S*>(a.out);
  WhitenPiece<S> piece;
  for (int64_t slot = first; slot < last; slot += piece.size) {
    piece.read(a, slot, last);
    for (int64_t i = 0; i < piece.size; i += lanes<V>) {
      const int64_t left = piece.size - i;
      V y = vfma((load_first<V>(piece.x + i, left) - high) - low, scale, add);
      if (a.flat) y = add;
      if (piece.mask) y = select(load_first<V>(piece.mask + i, left) != zero, y, zero);
      store_first(out + slot + i, y, left);
    }
  }
}

}  // namespace ppo::PPO_ISA
