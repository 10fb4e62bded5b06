// Value loss kernel: loss, gradient and statistics from one pass over the tokens.
#pragma once

#include "loss.cuh"

namespace ppo::cuda {

// Absent tensors have null data. The gradient is contiguous, null if not requested.
struct ValueLossArgs {
  LossArgs base;
  Column values, old_values, returns;
  float* grad;
  Form form;
  float clip, scale;
};

struct ValueInputs {
  Raw values, old_values, returns;
};

// Loss and half its gradient, both divided by the scale, and whether the clip is active.
struct ValueTerms {
  float loss, half_grad;
  bool clipped;
};

// Clipped value loss of OpenAI's ppo2 (max), or its clipped prediction alone (SB3). Comparisons
// and minima ignore a NaN, so a NaN old value is written to the results explicitly.
PPO_DEVICE ValueTerms value_terms(Form form, float clip, float value, float old, float target) {
  const float e = value - target;
  if (form == Form::unclipped) return {e * e, e, false};
  const float lo = old - clip, hi = old + clip;
  const float bounded_e = clamp(value, lo, hi) - target;
  const float plain = e * e, bounded = bounded_e * bounded_e;
  if (!(lo <= hi)) return {old, old, false};
  if (form == Form::max) {
    const bool active = bounded > plain;
    return {active ? bounded : plain, active ? 0.f : e, active};
  }
  const bool outside = value < lo || value > hi;
  return {bounded, outside ? 0.f : bounded_e, outside};
}

struct ValueStep {
  static constexpr int kFirst = kVfNTokens;
  // The count of sequences uses D's place, which D takes afterwards.
  static constexpr LossLayout kLayout = {
      kFirst, 0, kVfLossDenom - kFirst, kVfLoss - kFirst, kVfLossDenom - kFirst, false};
  const ValueLossArgs& a;

  PPO_DEVICE void resolve() const {}
  PPO_DEVICE ValueInputs load(const Slots& s) const {
    return {load_raw(a.values, s), load_raw(a.old_values, s), load_raw(a.returns, s)};
  }

  PPO_DEVICE void tokens(const Slots& s, uint32_t live, int64_t first_seq, const ValueInputs& in,
                         LossSums<8>& all) const {
    SequenceTerm terms[kItems];
    terms_of(a.base, s, first_seq, terms);
    const Values values = values_of(a.values, s, in.values);
    const Values targets = values_of(a.returns, s, in.returns);
    const Values olds = a.old_values.data ? values_of(a.old_values, s, in.old_values) : values;
    float grad[kItems];
    double (&sums)[8] = all.sums;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      grad[k] = 0.f;
      if (!(live >> k & 1u)) continue;
      const float value = values.at[k], target = targets.at[k], old = olds.at[k];
      const ValueTerms x = value_terms(a.form, a.clip, value, old, target);
      // Sums in double: explained variance is a small difference of them.
      const double ret = double(target), err = double(target - old);
      sums[kVfLoss - kFirst] += double(terms[k].weight * (a.scale * x.loss));
      sums[kVfClip - kFirst] += double(x.clipped);
      sums[kRet - kFirst] += ret;
      sums[kRetSq - kFirst] = fma(ret, ret, sums[kRetSq - kFirst]);
      sums[kErr - kFirst] += err;
      sums[kErrSq - kFirst] = fma(err, err, sums[kErrSq - kFirst]);
      grad[k] = terms[k].weight * ((a.scale + a.scale) * x.half_grad);
    }
    if (a.grad) store_items(a.grad, a.base.wide_grads, s, grad);
  }
};

template <class = void>
__global__ void __launch_bounds__(kTokenThreads, 2)
    value_loss_kernel(const __grid_constant__ ValueLossArgs a) {
  loss_kernel<8>(a.base, ValueStep{a});
}

}  // namespace ppo::cuda
