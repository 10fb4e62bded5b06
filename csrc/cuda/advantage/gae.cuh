// gae's steps: four of them at a time, from memory to what the recurrence takes.
#pragma once

#include "steps.cuh"

namespace ppo::cuda {

// `kTwo`: any of the optional inputs, or two lambdas. Otherwise rewards, values and a mask.
template <bool kTwo>
struct GaeSource {
  using Args = GaeArgs;
  static constexpr bool two = kTwo;
  static constexpr bool needs_last = false;
  static constexpr int resident = kTwo ? 2 : 3;  // blocks at least, as registers allow

  struct Row {
    static constexpr int64_t slot = -1;
  };
  struct Plain {
    Quad reward, value;
  };
  struct Extras : Plain {
    Quad after, rho, c, lam, lam_ret;
    uint32_t terminated, truncated;
  };
  struct Raw : std::conditional_t<kTwo, Extras, Plain> {};

  const GaeArgs& args;

  PPO_DEVICE Row open(const Sequence&, int64_t) const { return {}; }

  // Masked steps are not read; `flags` are the mask's bytes.
  PPO_DEVICE Raw load(const Row&, const Sequence& s, int64_t t, uint32_t flags) const {
    const int exist = s.exist(t), n = flags ? exist : 0;
    Raw raw{};
    raw.reward = load_quad(args.rewards, s, t, n);
    raw.value = load_quad(args.base.values, s, t, n);
    if constexpr (kTwo) {
      const auto load = [&](const Steps& v, int count) {
        return load_quad(v, s, t, v.data ? count : 0);
      };
      raw.after = load(args.next_values, n);
      raw.rho = load(args.rho, n);
      raw.c = load(args.c, n);
      raw.lam = load(args.lam, exist);
      raw.lam_ret = load(args.lam_returns, exist);
      raw.terminated = args.terminated.data ? load_flags(args.terminated, s, t, n) : 0;
      raw.truncated = args.truncated.data ? load_flags(args.truncated, s, t, n) : 0;
    }
    return raw;
  }

  PPO_DEVICE UnitOf<kTwo> decode(const Row&, const Sequence& s, int64_t t, uint32_t flags,
                                 const Raw& raw) const {
    UnitOf<kTwo> u;
    u.live = u.kept = flag_bits(flags);
    u.moves = args.base.carry ? u.live : (1u << s.exist(t)) - 1u;
    kept_or(args.rewards, raw.reward, u.live, 0.f, u.reward);
    kept_or(args.base.values, raw.value, u.live, 0.f, u.value);
    if constexpr (kTwo) {
      u.has_after = args.next_values.data;
      kept_or(args.next_values, raw.after, u.live, 0.f, u.after);
      kept_or(args.rho, raw.rho, u.live, 1.f, u.rho);
      u.terminated = flag_bits(raw.terminated) & u.live;
      u.cut = u.terminated | (flag_bits(raw.truncated) & u.live);
      float c[kUnit];
      kept_or(args.c, raw.c, u.live, 1.f, c);
      decays(args.lam, raw.lam, args.lam_per_step, u.live, args.base.decay, c, u.decay);
      decays(args.lam_returns, raw.lam_ret, args.lam_returns_per_step, u.live, args.decay_returns,
             c, u.decay_ret);
    }
    return u;
  }

  PPO_DEVICE void store(const Sequence&, int64_t, const UnitOf<kTwo>&) const {}

 private:
  // What the mask keeps of an input, else its neutral content; that everywhere where it is absent.
  PPO_DEVICE static void kept_or(const Steps& v, const Quad& raw, unsigned live, float neutral,
                                 float* x) {
    cuda::decode(raw, v.dtype, x);
    const unsigned kept = v.data ? live : 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) x[i] = kept >> i & 1 ? x[i] : neutral;
  }

  // gamma * lambda, in double until the last rounding, times c.
  PPO_DEVICE void decays(const Steps& lam, const Quad& raw, bool per_step, unsigned live,
                         float number, const float* c, float* decay) const {
    cuda::decode(raw, lam.dtype, decay);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const bool kept = !per_step || (live >> i & 1);
      const double lambda = kept ? double(decay[i]) : 1.0;
      decay[i] = (lam.data ? float(args.gamma * lambda) : number) * c[i];
    }
  }
};

}  // namespace ppo::cuda
