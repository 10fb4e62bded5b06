// Rows of logits on the GPU: arguments, slices, softmax state and gradient.
//
// token_logprobs and logits_ppo_loss share it, so that a row's bits follow from its logits and V
// alone: not from grid, block, cluster, or the row's position in memory.
#pragma once

#include "../device/launch.h"
#include "../device/math.cuh"
#include "../device/reduce.cuh"

namespace ppo::cuda {

constexpr int kMaxSlices = 64;
constexpr int kSliceColumns = 2048;
constexpr int kScanVectors = 4;  // 16 bytes each, that a lane takes between two rescalings
constexpr int kGradVectors = 2;  // in the pass that writes
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLowest = -3.4028234663852886e38f;  // finite: without a logit, m - m is 0
// exp(-200) is 0 in fp32, so clamping there changes nothing but 0 * -inf. The clamp drops a NaN
// (fmaxf(NaN, x) = x); therefore the other factor comes from the unclamped argument.
constexpr float kZeroExp = -200.f;

// Logits (rows, V) with every row's token (label), mask and temperature.
struct LogitsRows {
  const void* logits;
  RowIndex at;
  RowValues tokens, mask, temperature;  // (rows,)
  int64_t ignore_index;
  float inv_temperature;  // of all rows, without a tensor of temperatures
  int vocab;

  template <class T>
  PPO_DEVICE const T* row(int64_t i) const {
    return static_cast<const T*>(logits) + at.offset(i);
  }
  PPO_DEVICE bool live(int64_t i) const {
    return (!mask || mask.is_set(i)) && tokens.integer(i) != ignore_index;
  }
  PPO_DEVICE float inv_temperature_at(int64_t i) const {
    return temperature ? 1.f / temperature.number(i) : inv_temperature;
  }
};

inline LogitsRows logits_rows(const char* op, const Tensor& logits, const Tensor& tokens,
                              const OptTensor& mask, const OptTensor& temperature,
                              int64_t ignore_index, double number_temperature) {
  check_logits(logits, tokens, mask, op);
  const size_t rank = tokens.sizes().size();
  PPO_CHECK(logits.sizes()[rank] < (int64_t(1) << 30), op, "V must be less than 2^30");
  PPO_CHECK(logits.is_cuda() == tokens.is_cuda(), op, "device of tokens");
  check_beside(tokens, mask, op, "mask");
  return {logits.const_data_ptr(),
          RowIndex(logits.sizes(), logits.strides(), rank),
          RowValues(tokens),
          RowValues(mask),
          row_values(op, tokens, temperature, "temperature"),
          ignore_index,
          float(1.0 / number_temperature),
          int(logits.sizes()[rank])};
}

// Rows of a bf16 gradient over fp32 logits: each starts where the logits' row does.
inline RowIndex bf16_rows(const Tensor& logits) {
  const auto sizes = logits.sizes(), strides = logits.strides();
  std::vector<int64_t> doubled(strides.begin(), strides.end());
  for (int64_t& stride : doubled) stride *= 2;
  return RowIndex(sizes, Sizes(doubled.data(), doubled.size()), sizes.size() - 1);
}

// Cut of a row into `slices` slices of `length` columns, the last one shorter; a warp takes one
// slice.
struct RowPlan {
  int slices;  // a power of two
  int length;  // a multiple of 8: slices start where the row does, modulo 16 bytes
};

PPO_HOST_DEVICE RowPlan row_plan(int vocab) {
  int slices = 1;
  while (slices < kMaxSlices && vocab > slices * kSliceColumns) slices *= 2;
  return {slices, ((vocab - 1) / slices + 8) / 8 * 8};
}

// Softmax state. With z = logit / temperature: max z, sum e^(z - max), sum (z - max) e^(z - max).
struct SoftmaxState {
  float max, sum, dot;
};

// State relative to the maximum top >= p.max.
PPO_DEVICE SoftmaxState rescaled(SoftmaxState p, float top) {
  const float shift = fmaxf(p.max - top, kZeroExp);
  const float r = fast_exp2(shift * kLog2e);
  return {top, p.sum * r, fmaf(shift, p.sum, p.dot) * r};
}

// State extended by a lane's next logits; absent ones are -inf.
template <int vectors, int n>
PPO_DEVICE SoftmaxState extended(SoftmaxState p, const float (&x)[vectors][n],
                                 float inv_temperature) {
  float top = x[0][0];
#pragma unroll
  for (int i = 1; i < vectors * n; ++i) top = fmaxf(top, x[i / n][i % n]);
  p = rescaled(p, fmaxf(p.max, top * inv_temperature));
#pragma unroll
  for (int i = 0; i < vectors * n; ++i) {
    const float d = fmaf(x[i / n][i % n], inv_temperature, -p.max);
    const float e = fast_exp2(d * kLog2e);
    p.sum += e;
    p.dot = fmaf(e, fmaxf(d, kZeroExp), p.dot);
  }
  return p;
}

// State of all lanes together, the same in every lane.
PPO_DEVICE SoftmaxState warp_merged(SoftmaxState p) {
  p = rescaled(p, warp_reduce(p.max, Max{}));
  return {p.max, warp_sum(p.sum), warp_sum(p.dot)};
}

// State of a row from those of its slices; called by a whole warp.
PPO_DEVICE SoftmaxState merged(const SoftmaxState* states, int slices) {
  const int lane = lane_id();
  const SoftmaxState none{kLowest, 0.f, 0.f};
  SoftmaxState p = lane < slices ? states[lane] : none;
  if (slices > 32) {
    const SoftmaxState q = states[lane + 32];
    const float top = fmaxf(p.max, q.max);
    const SoftmaxState a = rescaled(p, top), b = rescaled(q, top);
    p = {top, a.sum + b.sum, a.dot + b.dot};
  }
  return warp_merged(p);
}

// Offset of the row's start from 16-byte alignment, in elements.
template <class T>
PPO_DEVICE int phase_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kPerVector<T>);
}

// Loads x = row[col, col + 16 bytes), -inf from `end` on, which is not reached if `inside`. Rows
// with a phase are read `across` 16-byte boundaries: two aligned loads, and the bytes between.
// Both loads hold an element of the row, so all of their bytes can be read.
template <class T, bool across, bool inside>
PPO_DEVICE void load_columns(const T* row, int phase, int end, int col,
                             float (&x)[kPerVector<T>]) {
  constexpr int n = kPerVector<T>;
  if (inside || col + n <= end) {
    const T* at = row + (col - phase);
    const uint4 low = *reinterpret_cast<const uint4*>(at);
    if constexpr (across) {
      const uint4 high = *reinterpret_cast<const uint4*>(at + n);
      unpack<T>(shifted(low, high, phase * int(sizeof(T))), x);
    } else {
      unpack<T>(low, x);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = -INFINITY;
    if (col < end) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = col + i < end ? widen(row[col + i]) : x[i];
    }
  }
}

// State extended by the next `vectors` times 16 bytes of each lane, from column `at` on.
template <int vectors, bool across, bool inside, class T>
PPO_DEVICE SoftmaxState scan_step(SoftmaxState p, const T* row, int phase, int end, int at,
                                  float inv_temperature) {
  constexpr int n = kPerVector<T>;
  float x[vectors][n];
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    load_columns<T, across, inside>(row, phase, end, at + (kWarp * v + lane_id()) * n, x[v]);
  }
  return extended(p, x, inv_temperature);
}

template <class T, bool across>
PPO_DEVICE SoftmaxState lane_state(const T* row, int phase, int first, int end,
                                   float inv_temperature) {
  constexpr int n = kPerVector<T>;
  SoftmaxState p{kLowest, 0.f, 0.f};
  int at = first;
  for (; at + kWarp * kScanVectors * n <= end; at += kWarp * kScanVectors * n) {
    p = scan_step<kScanVectors, across, true>(p, row, phase, end, at, inv_temperature);
  }
  for (; at < end; at += kWarp * n) {
    p = scan_step<1, across, false>(p, row, phase, end, at, inv_temperature);
  }
  return p;
}

// State of columns [first, end) of a row, the same in every lane; called by a whole warp.
template <class T>
PPO_DEVICE SoftmaxState slice_state(const T* row, int first, int end, float inv_temperature) {
  const int phase = phase_of(row);
  const SoftmaxState p = phase == 0 ? lane_state<T, false>(row, 0, first, end, inv_temperature)
                                    : lane_state<T, true>(row, phase, first, end, inv_temperature);
  return warp_merged(p);
}

// Results of a row's softmax. A row without a finite logit, or with NaN or +inf, is not sound.
struct Outcome {
  bool sound;
  float max, log_sum, logprob, entropy;
};

// Results from a row's state; legal: the label is one of the V columns.
PPO_DEVICE Outcome outcome(SoftmaxState row, float label_logit, float inv_temperature,
                           bool legal) {
  const bool sound = row.sum > 0.f;
  const float sum = sound ? row.sum : 1.f, own = logf(sum), entropy = own - row.dot / sum;
  const float top = sound ? row.max : NAN;
  const float z = legal ? fmaf(label_logit, inv_temperature, -top) : NAN;
  // The label's own share of the sum is e^z. Rounding lowers the sum below it and the entropy
  // below 0 where the label is certain and z, then the rounding of the maximum, is not 0.
  const float log_sum = z > own ? z : own;
  return {sound, top, log_sum, z - log_sum,
          legal && sound ? (entropy < 0.f ? 0.f : entropy) : NAN};
}

// Gradient of a row: d loss / d logit_j = p_j (slope ln p_j + offset), but label_term at the
// label. With g and h the loss's derivatives by log-probability and entropy H, and temperature T:
// offset = -(g + h H)/T, slope = -h/T.
struct GradientTerms {
  float max, log_sum, inv_temperature, slope, offset, label_term;
  int label;
  bool zero;  // a row of zeros, that need not be read
};

PPO_DEVICE GradientTerms gradient_terms(float g, float h, const Outcome& row, int64_t label,
                                        float label_logit, float inv_temperature, bool legal) {
  const float shifted = fmaf(label_logit, inv_temperature, -row.max);
  // A label at -inf stays impossible: no gradient through its log-probability.
  if (legal && shifted == -INFINITY) g = 0.f;
  const float offset = legal ? -fmaf(h, row.entropy, g) * inv_temperature : NAN,
              slope = -h * inv_temperature;
  const float ln_p = shifted - row.log_sum;
  const ExpParts<float> e = exp_parts(ln_p);
  // offset p + g/T of a likely label would cancel.
  const float label_term = fmaf(-g, e.expm1, -h * (e.exp * (fmaxf(ln_p, kZeroExp) + row.entropy)));
  return {row.max,
          row.log_sum,
          inv_temperature,
          slope,
          offset,
          label_term * inv_temperature,
          legal ? int(label) : -1,
          g == 0.f && h == 0.f};
}

PPO_DEVICE float gradient(const GradientTerms& t, float x) {
  const float ln_p = fmaf(x, t.inv_temperature, -t.max) - t.log_sum;
  return fast_exp2(ln_p * kLog2e) * fmaf(t.slope, fmaxf(ln_p, kZeroExp), t.offset);
}

// Stores the gradient of x, whose first element is the row's column `col` < end. Either all of it
// is `inside` [first, end), or columns outside are left alone.
template <Memory memory, bool inside, class O>
PPO_DEVICE void store_gradient(O* to, int first, int end, int col, float (&x)[kPerVector<O>],
                               const GradientTerms& t) {
  constexpr int n = kPerVector<O>;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = gradient(t, x[i]);
  if (unsigned(t.label - col) < unsigned(n)) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = t.label == col + i ? t.label_term : x[i];
  }
  if (inside || (col >= first && col + n <= end)) {
    store_vector<memory>(to + col, pack<O>(x));
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (col + i >= first && col + i < end) to[col + i] = narrow<O>(x[i]);
    }
  }
}

// Gradient of the next `vectors` times 16 bytes of `to` of each thread, from column `at` on.
// `together`: the row is also read in 16-byte vectors; `inside`: that, and all columns are in
// [first, end).
template <Memory from, Memory into, int vectors, bool inside, class T, class O, class Between>
PPO_DEVICE void gradient_step(const T* row, O* to, int first, int end, int at, bool together,
                              const GradientTerms& t, int thread, int threads,
                              const Between& between) {
  constexpr int n = kPerVector<O>, loaded = kPerVector<T>;
  float x[vectors][n] = {};
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    const int col = at + (v * threads + thread) * n;
    if (inside || (together && col >= first && col + n <= end)) {
#pragma unroll
      for (int i = 0; i < n; i += loaded) {
        unpack<T>(load_vector<from>(row + col + i), reinterpret_cast<float (&)[loaded]>(x[v][i]));
      }
    } else if (col < end) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        x[v][i] = col + i >= first && col + i < end ? widen(row[col + i]) : 0.f;
      }
    }
  }
  between();
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    const int col = at + (v * threads + thread) * n;
    if (inside || col < end) store_gradient<into, inside>(to, first, end, col, x[v], t);
  }
}

// Writes the gradient to[first, end) of row[first, end), by `threads` threads of which this is
// number `thread`, in whole 16-byte vectors of `to` except at the ends. The row lies in memory
// `from`, its gradient in `into`. `to` may be `row`; where
// it is narrower and starts at the same address, `between` must keep everybody's loads before
// anybody's stores.
template <Memory from, Memory into, class T, class O, class Between>
PPO_DEVICE void write_gradient(const T* row, O* to, int first, int end, const GradientTerms& t,
                               int thread, int threads, const Between& between) {
  constexpr int n = kPerVector<O>;
  const int before = phase_of(to + first);
  const bool together = phase_of(row + first) == before % kPerVector<T>;
  const int many = kGradVectors * threads * n, one = threads * n;
  int at = first - before;
  const auto inside = [&](int columns) { return together && at >= first && at + columns <= end; };
  while (at < end) {
    if (inside(many)) {
      gradient_step<from, into, kGradVectors, true>(row, to, first, end, at, together, t, thread,
                                                    threads, between);
      at += many;
    } else if (inside(one)) {
      gradient_step<from, into, 1, true>(row, to, first, end, at, together, t, thread, threads,
                                         between);
      at += one;
    } else {
      gradient_step<from, into, 1, false>(row, to, first, end, at, together, t, thread, threads,
                                          between);
      at += one;
    }
  }
}

// Writes zeros to[first, end), the gradient of a row without one.
template <Memory into, class O>
PPO_DEVICE void write_zeros(O* to, int first, int end, int thread, int threads) {
  constexpr int n = kPerVector<O>;
  for (int col = first - phase_of(to + first) + thread * n; col < end; col += threads * n) {
    if (col >= first && col + n <= end) {
      store_vector<into>(to + col, make_uint4(0, 0, 0, 0));
    } else {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (col + i >= first && col + i < end) to[col + i] = O{};
      }
    }
  }
}

}  // namespace ppo::cuda
