// What tokens need of their whole sequence, in a launch of its own.
#pragma once

#include "../device/math.cuh"
#include "sequences.cuh"

namespace ppo::cuda {

// The weight of its tokens and, for gspo, its ratio.
struct SequenceTerm {
  float weight, ratio;
};

struct SequenceTermsArgs {
  SequenceMap map;
  Column mask, now, old;  // now and old: null where nobody asks for ratios
  bool means;             // tokens weigh 1 / tokens of their sequence, else 1
  float d_min, d_max;
  int lanes;  // threads of a sequence: a warp's or the block's
  SequenceTerm* terms;
};

constexpr int kSequenceSteps = 4;  // loads of a thread under way

// Tokens, and the sum of their clamped log-ratios in double, so that where the padding stands is
// lost in the rounding.
struct SequenceSums {
  double tokens = 0.0, d = 0.0;
};

PPO_DEVICE SequenceSums sequence_sums(const SequenceTermsArgs& a, int64_t s, int lane) {
  SequenceSums sums;
  const int64_t end = a.map.end(s);
  const auto at = [s](const Column& c, int64_t slot) { return slot * c.stride + s * c.skip; };
  for (int64_t slot = a.map.begin(s) + lane; slot < end; slot += kSequenceSteps * a.lanes) {
    float d[kSequenceSteps] = {};
    bool live[kSequenceSteps];
#pragma unroll
    for (int k = 0; k < kSequenceSteps; ++k) {
      const int64_t i = slot + k * a.lanes;
      live[k] = i < end;
      if (!live[k]) continue;
      if (a.mask.data) live[k] = static_cast<const uint8_t*>(a.mask.data)[at(a.mask, i)] != 0;
      if (a.old.data) {
        d[k] = read_float(a.now.data, a.now.dtype, at(a.now, i)) -
               read_float(a.old.data, a.old.dtype, at(a.old, i));
      }
    }
#pragma unroll
    for (int k = 0; k < kSequenceSteps; ++k) {
      sums.tokens += live[k];
      sums.d += live[k] ? double(clamp(d[k], a.d_min, a.d_max)) : 0.0;
    }
  }
  return sums;
}

template <class = void>
__global__ void __launch_bounds__(kTokenThreads)
    sequence_terms_kernel(const __grid_constant__ SequenceTermsArgs a) {
  double* scratch = shared_memory<double>();
  const bool alone = a.lanes == kWarp;  // a warp for every sequence
  const int64_t s =
      alone ? int64_t(blockIdx.x) * (kTokenThreads / kWarp) + warp_id() : int64_t(blockIdx.x);
  SequenceSums sums;
  if (s < a.map.count) sums = sequence_sums(a, s, int(threadIdx.x) % a.lanes);
  if (alone) {
    sums.tokens = warp_sum(sums.tokens);
    sums.d = warp_sum(sums.d);
  } else {
    sums.tokens = block_sum(sums.tokens, scratch);
    sums.d = block_sum(sums.d, scratch + kTokenThreads / kWarp);
  }
  if (s >= a.map.count || threadIdx.x % a.lanes != 0) return;
  const double n = sums.tokens > 0.0 ? sums.tokens : 1.0;
  a.terms[s] = {a.means ? float(1.0 / n) : 1.f, exp_parts(float(sums.d / n)).exp};
}

}  // namespace ppo::cuda
