// Tiles of the advantage recurrences: [step][lane] buffers, one sequence in each lane, filled from
// and emptied into tensors of any layout (no include guard, see foreach_isa.h).
//
// A lane works through its sequence from the end, so the steps of a tile are the last ones left of
// each sequence, and what lies before a sequence's first step is never needed: lanes whose
// sequence ends are given the next one between tiles.
namespace ppo::PPO_ISA {

constexpr int kTileSize = 1024;
template <class T>
constexpr int tile_steps = kTileSize / lanes<T>;

template <class T>
struct Cursor {
  int64_t seq[lanes<T>];    // -1: no sequence left for this lane
  int64_t first[lanes<T>];  // the column of its first step
  int64_t left[lanes<T>];   // its steps not yet done
  int active = 0;
  bool side_by_side = false;  // lane l is sequence seq[0] + l at the same step, for l < active

  int64_t column(int lane, int steps) const { return first[lane] + left[lane] - steps; }
  bool full() const { return active == lanes<T>; }
};

template <class S, class P>
void load_run(const P* p, int n, S* out) {
  using V = widest<S>;
  for (int i = 0; i < n; i += lanes<V>) store(out + i, load_first<V>(p + i, n - i));
}

// Rows of consecutive steps: each cache line is used whole, then turned in registers.
template <class T, class P>
void load_rows(const P* const* rows, const Cursor<T>& at, int steps, scalar_t<T>* out) {
  constexpr int W = lanes<T>;
  for (int t = 0; t < steps; t += W) {
    T block[W];
    if (at.full()) {
      for (int l = 0; l < W; ++l) block[l] = load_first<T>(rows[l] + t, steps - t);
    } else {
      for (int l = 0; l < W; ++l) {
        block[l] = at.seq[l] < 0 ? set1<T>(0) : load_first<T>(rows[l] + t, steps - t);
      }
    }
    transpose(block);
    for (int i = 0; i < W; ++i) store(out + (t + i) * W, block[i]);
  }
}

template <class T, class P>
void load_tile_from(const View& v, const Cursor<T>& at, int steps, scalar_t<T>* out) {
  constexpr int W = lanes<T>;
  using S = scalar_t<T>;
  const P* rows[W];
  for (int l = 0; l < W; ++l) {
    rows[l] = at.seq[l] < 0 ? nullptr : ppo::at<P>(v, at.seq[l], at.column(l, steps));
  }
  if (v.col_stride == 1 && W == 1) return load_run(rows[0], steps, out);
  if (v.col_stride == 1) return load_rows<T>(rows, at, steps, out);
  if (v.row_stride == 1 && at.side_by_side) {
    for (int t = 0; t < steps; ++t) {
      store(out + t * W, load_first<T>(rows[0] + t * v.col_stride, at.active));
    }
    return;
  }
  for (int l = 0; l < W; ++l) {
    for (int t = 0; t < steps; ++t) {
      out[t * W + l] = rows[l] ? load_first<S>(rows[l] + t * v.col_stride, 1) : S(0);
    }
  }
}

// The last `steps` steps of every lane; lanes without a sequence read as 0.
template <class T>
void load_tile(const View& v, const Cursor<T>& at, int steps, float* out) {
  switch (v.dtype) {
    case DType::f32:
      return load_tile_from<T, float>(v, at, steps, out);
    case DType::bf16:
      return load_tile_from<T, bf16>(v, at, steps, out);
    case DType::f16:
      return load_tile_from<T, fp16>(v, at, steps, out);
    default:
      return load_tile_from<T, uint8_t>(v, at, steps, out);
  }
}
template <class T>
void load_tile(const View& v, const Cursor<T>& at, int steps, double* out) {
  if (v.dtype == DType::f64) return load_tile_from<T, double>(v, at, steps, out);
  return load_tile_from<T, uint8_t>(v, at, steps, out);
}

// Into a contiguous output: consecutive steps, or consecutive sequences where time is major.
template <class T>
void store_tile(const scalar_t<T>* tile, const View& v, const Cursor<T>& at, int steps) {
  constexpr int W = lanes<T>;
  using S = scalar_t<T>;
  S* rows[W];
  for (int l = 0; l < W; ++l) {
    rows[l] =
        at.seq[l] < 0 ? nullptr : const_cast<S*>(ppo::at<S>(v, at.seq[l], at.column(l, steps)));
  }
  if (v.col_stride == 1 && W == 1) {
    std::memcpy(rows[0], tile, size_t(steps) * sizeof(S));
    return;
  }
  if (v.col_stride != 1) {
    for (int t = 0; t < steps; ++t) {
      store_first(rows[0] + t * v.col_stride, load<T>(tile + t * W), at.active);
    }
    return;
  }
  for (int t = 0; t < steps; t += W) {
    T block[W];
    for (int i = 0; i < W; ++i) block[i] = load<T>(tile + (t + i) * W);
    transpose(block);
    for (int l = 0; l < W; ++l) {
      if (at.seq[l] >= 0) store_first(rows[l] + t, block[l], steps - t);
    }
  }
}

}  // namespace ppo::PPO_ISA
