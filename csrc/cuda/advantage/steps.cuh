// Groups of four consecutive steps of a sequence: loads and stores in any layout, and the
// recurrence over them.
#pragma once

#include "args.cuh"
#include "map.cuh"

namespace ppo::cuda {

struct Sequence {
  int64_t seq, first, steps;  // `first`: its first slot where packed, else 0
  int64_t at;                 // of dense steps: elements before the first
  uint32_t pitch = 0;         // of dense columns: from a step to the next one

  // Number of the four steps from t that exist.
  PPO_DEVICE int exist(int64_t t) const {
    const int64_t n = steps - t;
    return n >= kGroupSteps ? kGroupSteps : n > 0 ? int(n) : 0;
  }
};

PPO_DEVICE int64_t given_offset(const SequenceLayout& s, int64_t i) {
  return s.wide ? static_cast<const int64_t*>(s.offsets)[i * s.stride]
                : int64_t(static_cast<const int32_t*>(s.offsets)[i * s.stride]);
}
// Offset clamped to the slots, so that invalid offsets touch nothing outside.
PPO_DEVICE int64_t offset_at(const SequenceLayout& s, int64_t i) {
  const int64_t at = given_offset(s, i);
  return at < 0 ? 0 : at > s.length ? s.length : at;
}

PPO_DEVICE Sequence sequence_at(const SequenceLayout& s, int64_t seq) {
  if (seq >= s.count) return {0, 0, 0, 0};
  if (!s.offsets) return {seq, 0, s.length, seq * s.pitch};
  const int64_t first = offset_at(s, seq), end = offset_at(s, seq + 1);
  return {seq, first, end > first ? end - first : 0, first};
}

// x, of unknown origin to the compiler. A walk accesses memory in some fifty places; keeping a
// pointer for each from step to step would take more registers than there are.
PPO_DEVICE int64_t formed_anew(int64_t x) {
#ifndef PPO_EMULATE
  asm volatile("" : "+l"(x));
#endif
  return x;
}

PPO_DEVICE uint32_t formed_anew(uint32_t x) {
#ifndef PPO_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <class View>
PPO_DEVICE int64_t offset_of(const View& v, const Sequence& s, int64_t t) {
  return formed_anew(s.seq) * v.seq + (formed_anew(s.first) + t) * v.step;
}

template <class T>
PPO_DEVICE bool together(const T* p, int64_t step, int n) {
  return step == 1 && n == kGroupSteps &&
         reinterpret_cast<uintptr_t>(p) % (kGroupSteps * sizeof(T)) == 0;
}

// The same of dense rows.
PPO_DEVICE bool together(const Sequence& s, int n) {
  return n == kGroupSteps && s.at % kGroupSteps == 0;
}

// Calls f(i, offset) for the first n of the four steps from t, of dense columns.
template <class F>
PPO_DEVICE void for_column(const Sequence& s, int64_t t, int n, F f) {
  uint32_t at = uint32_t(s.at) + uint32_t(t) * s.pitch;
  if (n == kGroupSteps) {
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i, at += s.pitch) f(i, at);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i, at += s.pitch) {
    if (i < n) f(i, at);
  }
}

// Bits of four steps as loaded: fp32 words, or 2-byte elements in the first two words. Decoding
// waits for memory, loading does not.
struct alignas(16) Quad {
  uint32_t word[4];
};

// Loads the first n of the four steps from t; 0 elsewhere.
template <Dense kDense>
PPO_DEVICE Quad load_quad(const Steps& v, const Sequence& s, int64_t t, int n) {
  Quad q = {{0, 0, 0, 0}};
  if constexpr (kDense == Dense::columns) {
    const uint32_t* p = static_cast<const uint32_t*>(v.data);
    for_column(s, t, n, [&](int i, uint32_t at) { q.word[i] = p[at]; });
    return q;
  }
  if constexpr (kDense == Dense::rows) {
    const uint32_t* p = static_cast<const uint32_t*>(v.data) + (s.at + t);
    if (together(s, n)) return *reinterpret_cast<const Quad*>(p);
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) q.word[i] = i < n ? p[i] : 0;
    return q;
  }
  if (v.dtype == DType::f32) {
    const uint32_t* p = static_cast<const uint32_t*>(v.data) + offset_of(v, s, t);
    if (together(p, v.step, n)) return *reinterpret_cast<const Quad*>(p);
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      if (i < n) q.word[i] = p[i * v.step];
    }
    return q;
  }
  const uint16_t* p = static_cast<const uint16_t*>(v.data) + offset_of(v, s, t);
  if (together(p, v.step, n)) {
    const uint2 two = *reinterpret_cast<const uint2*>(p);
    q.word[0] = two.x;
    q.word[1] = two.y;
    return q;
  }
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) {
    if (i < n) q.word[i / 2] |= uint32_t(p[i * v.step]) << (i % 2 * 16);
  }
  return q;
}

template <Dense kDense>
PPO_DEVICE void decode(const Quad& q, DType dtype, float* x) {
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) {
    if (kDense != Dense::no || dtype == DType::f32) {
      x[i] = __uint_as_float(q.word[i]);
    } else {
      const uint16_t half = uint16_t(q.word[i / 2] >> (i % 2 * 16));
      x[i] = dtype == DType::bf16 ? widen(bf16{half}) : widen(fp16{half});
    }
  }
}

// Flag bytes of the first n of four steps; 0 for steps that do not exist. Without flags all
// existing steps are set.
template <Dense kDense>
PPO_DEVICE uint32_t load_flags(const Steps& v, const Sequence& s, int64_t t, int n) {
  const uint32_t exist = n == kGroupSteps ? ~0u : (1u << 8 * n) - 1u;
  if (!v.data) return 0x01010101u & exist;
  uint32_t bytes = 0;
  if constexpr (kDense == Dense::columns) {
    const uint8_t* p = static_cast<const uint8_t*>(v.data);
    for_column(s, t, n, [&](int i, uint32_t at) { bytes |= uint32_t(p[at]) << 8 * i; });
    return bytes;
  }
  constexpr bool rows = kDense == Dense::rows;
  const uint8_t* p = static_cast<const uint8_t*>(v.data) + (rows ? s.at + t : offset_of(v, s, t));
  const int64_t step = rows ? 1 : v.step;
  if (rows ? together(s, n) : together(p, step, n)) return *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) {
    if (i < n) bytes |= uint32_t(p[i * step]) << 8 * i;
  }
  return bytes;
}
// Bit i is set if flag i is.
PPO_DEVICE unsigned flag_bits(uint32_t bytes) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) bits |= unsigned((bytes >> 8 * i & 0xffu) != 0) << i;
  return bits;
}

// Number of a sequence, from `Steps` that repeat it.
PPO_DEVICE float number_of(const Steps& v, const Sequence& s, float absent) {
  if (!v.data) return absent;
  float x[kGroupSteps];
  decode<Dense::no>(load_quad<Dense::no>(v, s, 0, s.steps > 0), v.dtype, x);
  return x[0];
}

template <Dense kDense>
PPO_DEVICE void store_steps(const Output& v, const Sequence& s, int64_t t, int n, const float* x) {
  if constexpr (kDense == Dense::columns) {
    for_column(s, t, n, [&](int i, uint32_t at) { v.data[at] = x[i]; });
    return;
  }
  constexpr bool rows = kDense == Dense::rows;
  float* p = v.data + (rows ? s.at + t : offset_of(v, s, t));
  const int64_t step = rows ? 1 : v.step;
  if (rows ? together(s, n) : together(p, step, n)) {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) {
    if (i < n) p[i * step] = x[i];
  }
}

// Four steps, ready for the recurrence. Bit i of a mask is step i.
struct StepGroup {
  float reward[kGroupSteps], value[kGroupSteps];  // 0 where not kept
  unsigned live;                                  // has an advantage
  unsigned kept;                                  // has a return
  unsigned moves;                                 // joins the recurrence
};
template <bool kExtras>
struct StepGroupOf : StepGroup {};
template <>
struct StepGroupOf<true> : StepGroup {
  bool has_after;
  float after[kGroupSteps], rho[kGroupSteps], decay[kGroupSteps], decay_ret[kGroupSteps];
  unsigned terminated, cut;
};

PPO_DEVICE NextValue next_value_of(const StepGroup& u) {
  NextValue next{false, 0.f};
#pragma unroll
  for (int i = kGroupSteps - 1; i >= 0; --i) {
    if (u.moves >> i & 1) next = {true, u.value[i]};
  }
  return next;
}

// Maps from a group's end to each of its steps.
template <bool kExtras>
struct Suffixes {
  AffineMap<kExtras> map[kGroupSteps];  // without their cuts, which are
  unsigned cuts;                        // whether step i or a later one cuts: its bits from i on

  PPO_DEVICE AffineMap<kExtras> of(int i) const {
    AffineMap<kExtras> m = map[i];
    if constexpr (kExtras) m.cut = cuts >> i != 0;
    return m;
  }
};

template <bool kExtras>
PPO_DEVICE AffineMap<kExtras> map_of_step(const StepGroupOf<kExtras>& u, int i, float next,
                                          float gamma, float decay) {
  AffineMap<kExtras> m;
  m.a = decay;
  if constexpr (kExtras) {
    const bool over = u.terminated >> i & 1;
    float target = fmaf(u.has_after ? u.after[i] : next, gamma, u.reward[i]);
    target = over ? u.reward[i] : target;
    m.a = u.decay[i];
    m.a_ret = u.decay_ret[i];
    m.b = m.b_ret = u.rho[i] * (target - u.value[i]);
    m.cut = u.cut >> i & 1;
  } else {
    m.b = fmaf(next, gamma, u.reward[i]) - u.value[i];
  }
  return m;
}

// Recurrence over a group; `next` is the value behind the group.
template <bool kExtras>
PPO_DEVICE Suffixes<kExtras> recur(const StepGroupOf<kExtras>& u, float next, float gamma,
                                   float decay) {
  Suffixes<kExtras> s;
  AffineMap<kExtras> behind;
#pragma unroll
  for (int i = kGroupSteps - 1; i >= 0; --i) {
    const bool moves = u.moves >> i & 1;
    behind = select(moves, compose(map_of_step(u, i, next, gamma, decay), behind), behind);
    next = moves ? u.value[i] : next;
    s.map[i] = behind;
  }
  if constexpr (kExtras) s.cuts = u.cut & u.moves;
  return s;
}

// Applies the maps to the state that enters the group, stores the results, and adds the live
// advantages to the moments.
template <Dense kDense, bool kExtras>
PPO_DEVICE void finish(const AdvantageArgs& args, const Sequence& span, int64_t t,
                       const StepGroupOf<kExtras>& u, const Suffixes<kExtras>& maps,
                       const Later& enters, MomentSum& moments) {
  const int n = span.exist(t);
  float advantage[kGroupSteps], ret[kGroupSteps];
#pragma unroll
  for (int i = 0; i < kGroupSteps; ++i) {
    const Later x = apply(maps.of(i), enters);
    const bool live = u.live >> i & 1;
    advantage[i] = live ? x.advantage : 0.f;
    ret[i] = u.kept >> i & 1 ? x.for_return + u.value[i] : 0.f;
    moments.add(x.advantage, live);
  }
  if (n == 0) return;
  store_steps<kDense>(args.advantages, span, t, n, advantage);
  store_steps<kDense>(args.returns, span, t, n, ret);
}

}  // namespace ppo::cuda
