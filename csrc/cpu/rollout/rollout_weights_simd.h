// Kernels of rollout_weights over a segment of a sequence (no include guard, see foreach_isa.h).
#include "../../math.h"
#include "../loss/pieces.h"

namespace ppo::PPO_ISA {

template <class T>
struct RolloutConsts {
  T low, high, x_low, x_high, k3, most;
  bool masks;

  PPO_INLINE explicit RolloutConsts(const RolloutArgs& a)
      : low(of(a.low)),
        high(of(a.high)),
        x_low(of(a.token.low)),
        x_high(of(a.token.high)),
        k3(of(a.token.k3)),
        most(of(kMaxLogRatio)),
        masks(a.form == RolloutForm::mask) {}
  PPO_INLINE static T of(double x) { return set1<T>(scalar_t<T>(x)); }
};

// Sums in double: they decide about whole sequences, and statistics are small differences of them.
template <class T>
struct RolloutLaneSums {
  Acc<T> bounded, excess, bounded_sq, k3, ratio_sq, old, rollout, weight, weight_sq;
  T x_min, x_max, abs_min, k3_min, weight_min, weight_max;
  int64_t tokens = 0, missing = 0, rejected = 0, below = 0, above = 0;

  // An implicit constructor would not inherit the pragma's target.
  PPO_INLINE RolloutLaneSums() {
    x_min = abs_min = k3_min = weight_min = set1<T>(__builtin_inff());
    x_max = weight_max = set1<T>(-__builtin_inff());
  }
  void write(RolloutSums& out) const {
    out.tokens = double(tokens), out.missing = double(missing), out.rejected = double(rejected);
    out.below = double(below), out.above = double(above);
    out.bounded = bounded.total(), out.excess = excess.total();
    out.bounded_sq = bounded_sq.total(), out.k3 = k3.total(), out.ratio_sq = ratio_sq.total();
    out.old = old.total(), out.rollout = rollout.total();
    out.weight = weight.total(), out.weight_sq = weight_sq.total();
    out.x_min = reduce_min(x_min), out.x_max = reduce_max(x_max);
    out.abs_min = reduce_min(abs_min), out.k3_min = reduce_min(k3_min);
    out.weight_min = reduce_min(weight_min), out.weight_max = reduce_max(weight_max);
  }
};

// Inputs and outputs of one piece.
template <class T>
struct RolloutRows {
  const scalar_t<T>*old_logprobs, *rollout_logprobs;
  scalar_t<T>* weights;
  uint8_t* kept;
};

template <bool of_tokens, class T>
struct RolloutStep {
  const RolloutConsts<T>& c;
  const RolloutRows<T>& rows;
  RolloutLaneSums<T>& sums;

  template <LaneMask which>
  PPO_INLINE void tokens(Lanes<T, which> at) const {
    T old = at.read(rows.old_logprobs), rollout = at.read(rows.rollout_logprobs);
    T x = old - rollout;
    const mask_t<T> missing = x != x;
    if (any(missing)) {
      x = select(missing, set1<T>(0), x);
      const T known = select(finite(old), old, select(finite(rollout), rollout, set1<T>(0)));
      old = select(missing, known, old), rollout = select(missing, known, rollout);
      sums.missing += count(missing);
    }
    const T bounded = clamp(x, -c.most, c.most);
    if (any(bounded != x)) sums.excess.add(x - bounded);
    const ExpParts<T> e = exp_parts<T, true>(bounded);
    const mask_t<T> held = (bounded >= c.x_low) & (bounded <= c.x_high) & (e.k3 <= c.k3);
    const mask_t<T> kept = at.live & held;
    sums.tokens += count(at.live);
    sums.rejected += count(at.live & !held);
    sums.bounded.add(bounded);
    sums.bounded_sq.add_square(bounded);
    sums.k3.add(e.k3);
    sums.ratio_sq.add_square(at.only(e.exp));
    sums.old.add(old);
    sums.rollout.add(rollout);
    least(at, bounded, sums.x_min);
    most(at, bounded, sums.x_max);
    least(at, vabs(bounded), sums.abs_min);
    least(at, e.k3, sums.k3_min);
    if (of_tokens) weigh(at, e.exp);
    if (which == LaneMask::tail) {
      store_mask_n(rows.kept + at.i, kept, at.left);
    } else {
      store_mask(rows.kept + at.i, kept);
    }
  }
  template <LaneMask which>
  PPO_INLINE void nothing(Lanes<T, which> at) const {
    if (of_tokens) at.write(rows.weights, set1<T>(0));
    store_mask(rows.kept + at.i, at.live);
  }

 private:
  PPO_INLINE static mask_t<T> finite(T x) { return vabs(x) < set1<T>(__builtin_inff()); }
  template <LaneMask which>
  PPO_INLINE static void least(Lanes<T, which> at, T x, T& so_far) {
    so_far = vmin(which == LaneMask::every ? x : select(at.live, x, so_far), so_far);
  }
  template <LaneMask which>
  PPO_INLINE static void most(Lanes<T, which> at, T x, T& so_far) {
    so_far = vmax(which == LaneMask::every ? x : select(at.live, x, so_far), so_far);
  }
  template <LaneMask which>
  PPO_INLINE void weigh(Lanes<T, which> at, T ratio) const {
    const mask_t<T> below = at.live & (ratio < c.low), above = at.live & (ratio > c.high);
    T w = clamp(ratio, c.low, c.high);
    if (c.masks) w = select(below | above, set1<T>(0), ratio);
    sums.below += count(below);
    sums.above += count(above);
    sums.weight.add(at.only(w));
    sums.weight_sq.add_square(at.only(w));
    least(at, w, sums.weight_min);
    most(at, w, sums.weight_max);
    at.write(rows.weights, w);
  }
};

template <class T>
struct RolloutBuffers {
  Buffer<T> old_logprobs, rollout_logprobs;
  uint8_t mask[kBlock];
};

// The segment's slots from `slot` on, at most kBlock.
inline Piece piece_of(const RolloutArgs& a, const RolloutSegment& segment, int64_t slot) {
  const int64_t left = segment.last - slot, s = segment.sequence;
  return {s, a.seqs.column(s, slot), slot, left < kBlock ? left : kBlock};
}

template <bool of_tokens, class T>
void rollout_pass(const RolloutArgs& a, const RolloutSegment& segment, RolloutSums& out) {
  RolloutBuffers<T> buffers;
  const RolloutConsts<T> consts(a);
  RolloutLaneSums<T> sums;
  for (int64_t slot = segment.first; slot < segment.last;) {
    const Piece p = piece_of(a, segment, slot);
    const RolloutRows<T> rows{fetch_piece<T>(a.old_logprobs, p, buffers.old_logprobs),
                              fetch_piece<T>(a.rollout_logprobs, p, buffers.rollout_logprobs),
                              static_cast<scalar_t<T>*>(a.weights) + slot, a.kept + slot};
    const uint8_t* mask = fetch_mask(a.mask, p, buffers.mask);
    each_lanes<T>(mask, p.size, RolloutStep<of_tokens, T>{consts, rows, sums});
    slot += p.size;
  }
  sums.write(out);
}

// Sums of the segment; its mask as far as tokens decide it; its weights where they are the
// tokens'.
template <class T>
void rollout_segment(const RolloutArgs& a, const RolloutSegment& segment, RolloutSums& out) {
  if (a.level == RolloutLevel::token) return rollout_pass<true, T>(a, segment, out);
  return rollout_pass<false, T>(a, segment, out);
}

template <class T>
struct SpreadStep {
  scalar_t<T>* weights;
  T weight;

  template <LaneMask which>
  PPO_INLINE void tokens(Lanes<T, which> at) const {
    at.write(weights, weight);
  }
  template <LaneMask which>
  PPO_INLINE void nothing(Lanes<T, which> at) const {
    at.write(weights, set1<T>(0));
  }
};

// Writes one weight to the segment's unmasked slots, 0 to the masked ones.
template <class T>
void spread_weight(const RolloutArgs& a, const RolloutSegment& segment, double weight) {
  uint8_t buffer[kBlock];
  for (int64_t slot = segment.first; slot < segment.last;) {
    const Piece p = piece_of(a, segment, slot);
    const uint8_t* mask = fetch_mask(a.mask, p, buffer);
    each_lanes<T>(
        mask, p.size,
        SpreadStep<T>{static_cast<scalar_t<T>*>(a.weights) + slot, set1<T>(scalar_t<T>(weight))});
    slot += p.size;
  }
}

// e^x in T, x clamped, by the operations of a token's.
template <class T>
double sequence_ratio(double x) {
  const T most = set1<T>(scalar_t<T>(kMaxLogRatio));
  return reduce_max(exp_parts<T, true>(clamp(set1<T>(scalar_t<T>(x)), -most, most)).exp);
}

// Names for PPO_SELECT: F is a different type for every instruction set.
inline void rollout_segment_f(const RolloutArgs& a, const RolloutSegment& s, RolloutSums& out) {
  rollout_segment<F>(a, s, out);
}
inline void spread_weight_f(const RolloutArgs& a, const RolloutSegment& s, double weight) {
  spread_weight<F>(a, s, weight);
}
inline double sequence_ratio_f(double x) { return sequence_ratio<F>(x); }

}  // namespace ppo::PPO_ISA
