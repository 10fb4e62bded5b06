// gae, once per instruction set (no include guard, see foreach_isa.h).
// clang-format off: each uses the ones before it
#include "transpose.h"
#include "moments_simd.h"
#include "advantage_tile.h"
#include "advantage_core.h"
// clang-format on

namespace ppo::PPO_ISA {

// The work of one thread: where its lanes stand and the tile they are in.
template <class T>
struct GaeJob {
  using S = scalar_t<T>;
  const GaeArgs& args;
  Cursor<T> at;
  Carried<T> state;
  MomentSum<S> moments;
  struct alignas(64) {
    S reward[kTileSize], value[kTileSize], live[kTileSize], next_value[kTileSize],
        terminated[kTileSize], truncated[kTileSize], rho[kTileSize], c[kTileSize],
        decay[kTileSize], decay_returns[kTileSize];
  } buffer;

  explicit GaeJob(const GaeArgs& a) : args(a) {}

  void start(int) {}

  void tile(int steps) {
    const Recursion& how = args.base;
    const int n = steps * lanes<T>;
    load_tile<T>(args.rewards, at, steps, buffer.reward);
    load_tile<T>(how.values, at, steps, buffer.value);
    const bool plain = !has_extras();
    const Inputs<T> in =
        plain ? Inputs<T>{buffer.reward, buffer.value, optional(how.mask, buffer.live, steps)}
              : load_extras(steps);
    if (in.live && how.zero_masked) {
      neutralise<S>(buffer.reward, in.live, 0, n);
      neutralise<S>(buffer.value, in.live, 0, n);
    }
    const Decays<T> by(how);
    if (plain) {
      recur_masked<T, true>(in, by, how, steps, state);
    } else {
      recur_masked<T, false>(in, by, how, steps, state);
    }
    moments.add(buffer.reward, live_slots(at, in.live, buffer.live, steps), n);
    store_tile<T>(buffer.reward, how.advantages, at, steps);
    store_tile<T>(buffer.value, how.returns, at, steps);
  }

 private:
  bool has_extras() const {
    return args.next_values.data || args.terminated.data || args.truncated.data || args.rho.data ||
           args.c.data || args.lam.data || args.base.two_lambdas;
  }

  S* optional(const View& v, S* tile, int steps) {
    if (!v.data) return nullptr;
    load_tile<T>(v, at, steps, tile);
    return tile;
  }

  // gamma * lambda, in double until the last rounding.
  S* decays(const View& v, S* tile, int steps) {
    if (!optional(v, tile, steps)) return nullptr;
    for (int i = 0; i < steps * lanes<T>; ++i) tile[i] = S(args.base.gamma * double(tile[i]));
    return tile;
  }

  Inputs<T> load_extras(int steps) {
    const Recursion& how = args.base;
    const int n = steps * lanes<T>;
    S* live = optional(how.mask, buffer.live, steps);
    S* next_value = optional(args.next_values, buffer.next_value, steps);
    S* terminated = optional(args.terminated, buffer.terminated, steps);
    S* truncated = optional(args.truncated, buffer.truncated, steps);
    S* rho = optional(args.rho, buffer.rho, steps);
    S* c = optional(args.c, buffer.c, steps);
    S* decay = decays(args.lam, buffer.decay, steps);
    S* decay_returns = decays(args.lam_returns, buffer.decay_returns, steps);
    if (live && how.zero_masked) {
      const S one = 1, gamma = S(how.gamma);
      if (next_value) neutralise<S>(next_value, live, 0, n);
      if (terminated) neutralise<S>(terminated, live, 0, n);
      if (truncated) neutralise<S>(truncated, live, 0, n);
      if (rho) neutralise<S>(rho, live, one, n);
      if (c) neutralise<S>(c, live, one, n);
      if (decay && args.lam_per_step) neutralise<S>(decay, live, gamma, n);
      if (decay_returns && args.lam_returns_per_step) neutralise<S>(decay_returns, live, gamma, n);
    }
    return {buffer.reward, buffer.value, live, next_value, terminated,
            truncated,     rho,          c,    decay,      decay_returns};
  }
};

inline void gae_unit(const GaeArgs& args, const Unit& unit) {
  if (unit.one_lane) {
    GaeJob<float> job(args);
    sweep<float>(job, args.base, unit);
  } else {
    GaeJob<F> job(args);
    sweep<F>(job, args.base, unit);
  }
}

inline void gae_unit_double(const GaeArgs& args, const Unit& unit) {
  GaeJob<double> job(args);
  sweep<double>(job, args.base, unit);
}

}  // namespace ppo::PPO_ISA
