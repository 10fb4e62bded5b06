// Value loss kernel: gradients and undivided sums from one pass over a range of tokens (no include
// guard, see foreach_isa.h).
#include "pieces.h"

namespace ppo::PPO_ISA {

template <class T>
struct ValueSums {
  T loss;
  int64_t clipped = 0;
  // Sums in double: explained variance is a small difference of them.
  Acc<T> ret, ret_sq, err, err_sq;

  PPO_INLINE ValueSums() { loss = set1<T>(0); }
  void flush(double* stats) const {
    stats[kVfLoss] += double(reduce_add(loss));
    stats[kVfClip] += double(clipped);
    stats[kRet] += ret.total();
    stats[kRetSq] += ret_sq.total();
    stats[kErr] += err.total();
    stats[kErrSq] += err_sq.total();
  }
};

template <class T>
struct ValueBuffers {
  Buffer<T> values, old_values, returns;
  uint8_t mask[kBlock];
};

// Inputs and outputs of one piece. Absent old_values are the values.
template <class T>
struct ValueRows {
  const scalar_t<T>*values, *old_values, *returns;
  const uint8_t* mask;
  scalar_t<T>* grad;
  T weight, grad_weight;

  ValueRows(const ValueLossArgs& a, const Piece& p, ValueBuffers<T>& b) {
    values = fetch_piece<T>(a.values, p, b.values);
    old_values = fetch_piece<T>(a.old_values, p, b.old_values);
    if (!old_values) old_values = values;
    returns = fetch_piece<T>(a.returns, p, b.returns);
    mask = fetch_mask(a.base.mask, p, b.mask);
    grad = a.grad_values ? static_cast<scalar_t<T>*>(a.grad_values) + p.flat : nullptr;
    const double* w = a.base.weight;
    const double token_weight = w ? w[p.sequence] : 1.0;
    weight = set1<T>(scalar_t<T>(token_weight));
    grad_weight = set1<T>(scalar_t<T>(token_weight * a.base.inverse_denom));
  }
};

// Loss and half its gradient, both divided by the options' scale, and whether the clip is active.
template <class T>
struct ValueTerms {
  T loss, half_grad;
  mask_t<T> clipped;
};

// Clipped value loss of OpenAI's ppo2 (max), or its clipped prediction alone (SB3). Comparisons
// and minima ignore a NaN, so a NaN old value is written to the results explicitly.
template <class T>
PPO_INLINE ValueTerms<T> value_terms(Form form, T clip, T value, T old, T target) {
  const T zero = set1<T>(0), e = value - target;
  if (form == Form::unclipped) return {e * e, e, first_n<T>(0)};
  const T lo = old - clip, hi = old + clip;
  const T bounded_e = vmin(hi, vmax(lo, value)) - target;
  const T plain = e * e, bounded = bounded_e * bounded_e;
  const mask_t<T> known = lo <= hi;
  if (form == Form::max) {
    const mask_t<T> active = bounded > plain;
    const T loss = select(active, bounded, plain), half_grad = select(active, zero, e);
    return {select(known, loss, old), select(known, half_grad, old), active};
  }
  const mask_t<T> outside = (value < lo) | (value > hi);
  const T half_grad = select(outside, zero, bounded_e);
  return {select(known, bounded, old), select(known, half_grad, old), outside};
}

template <class T>
struct ValueStep {
  const ValueOptions& o;
  const ValueRows<T>& rows;
  ValueSums<T>& sums;

  template <LaneMask which>
  PPO_INLINE void tokens(Lanes<T, which> at) const {
    const T value = at.read(rows.values), old = at.read(rows.old_values);
    const T target = at.read(rows.returns), scale = set1<T>(scalar_t<T>(o.scale));
    const T clip = set1<T>(scalar_t<T>(o.clip));
    const ValueTerms<T> x = value_terms(o.form, clip, value, old, target);
    sums.loss = vfma(rows.weight, scale * x.loss, sums.loss);
    sums.clipped += count(x.clipped);
    sums.ret.add(target);
    sums.ret_sq.add_square(target);
    sums.err.add(target - old);
    sums.err_sq.add_square(target - old);
    if (rows.grad) at.write(rows.grad, rows.grad_weight * ((scale + scale) * x.half_grad));
  }
  template <LaneMask which>
  PPO_INLINE void nothing(Lanes<T, which> at) const {
    if (rows.grad) at.write(rows.grad, set1<T>(0));
  }
};

// Processes slots [first, last), at most kRun<T>; adds their sums to stats.
template <class T>
void value_run(const ValueLossArgs& a, int64_t first, int64_t last, double* stats) {
  ValueBuffers<T> buffers;
  ValueSums<T> sums;
  for (int64_t slot = first; slot < last;) {
    const Piece piece = piece_at(a.base.seqs, slot, last);
    const ValueRows<T> rows(a, piece, buffers);
    each_lanes<T>(rows.mask, piece.size, ValueStep<T>{a.options, rows, sums});
    slot += piece.size;
  }
  sums.flush(stats);
}

// Writes the gradients of slots [first, last), a block; adds their sums to stats (kNStats).
template <class T>
void value_block(const ValueLossArgs& a, int64_t first, int64_t last, double* stats) {
  for (; first < last; first += kRun<T>) {
    value_run<T>(a, first, first + kRun<T> < last ? first + kRun<T> : last, stats);
  }
}

// A name for PPO_SELECT: F is a different type for every instruction set.
inline void value_block_f(const ValueLossArgs& a, int64_t first, int64_t last, double* stats) {
  value_block<F>(a, first, last, stats);
}

}  // namespace ppo::PPO_ISA
