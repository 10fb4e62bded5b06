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
    if constexpr (lanes<T> > 1) {
      if (fits_registers(steps)) return tile_in_registers(steps);
    }
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
  // Rewards and values alone, rows of fp32, a sequence in every lane.
  bool fits_registers(int steps) const {
    const Recursion& how = args.base;
    const auto rows_of_fp32 = [](const View& v) {
      return v.dtype == DType::f32 && v.col_stride == 1;
    };
    return steps % (2 * lanes<T>) == 0 && at.full() && !has_extras() && !how.mask.data &&
           rows_of_fp32(args.rewards) && rows_of_fp32(how.values) &&
           how.advantages.col_stride == 1;
  }

  // Rows of a tile in memory.
  struct Rows {
    const S *reward[lanes<T>], *value[lanes<T>];
    S *advantage[lanes<T>], *returns[lanes<T>];
  };

  // The operations of the buffered path, square blocks of steps and lanes at a time. Only delta
  // and the advantages are turned: what else there is of a step needs no other step's result.
  void tile_in_registers(int steps) {
    constexpr int W = lanes<T>;
    const Recursion& how = args.base;
    const Decays<T> by(how);
    Rows rows;
    row_pointers(args.rewards, steps, rows.reward);
    row_pointers(how.values, steps, rows.value);
    row_pointers(how.advantages, steps, rows.advantage);
    row_pointers(how.returns, steps, rows.returns);
    T later = load<T>(state.advantage);
    auto deviations = moments.open(later);
    for (int t = steps - 2 * W; t >= 0; t -= 2 * W) {
      T block[2 * W];
      if (t == steps - 2 * W) {
        load_deltas<true>(rows, t, by.gamma, block);
      } else {
        load_deltas<false>(rows, t, by.gamma, block);
      }
      for (int i = 2 * W - 1; i >= 0; --i) {
        block[i] = later = vfma(by.advantages, later, block[i]);
        deviations.add(later);
      }
      store_outputs(rows, t, block);
    }
    moments.close(deviations, steps * W);
    store(state.advantage, later);
    store(state.for_return, later);
    for (int l = 0; l < W; ++l) state.next_value[l] = rows.value[l][0];
  }

  // A cache line of every row at a time: rows often lie a multiple of 4096 bytes apart, where few
  // lines of a column of them stay in the cache. The value after a tile's last step is carried.
  template <bool last>
  PPO_INLINE void load_deltas(const Rows& rows, int t, T gamma, T* block) const {
    constexpr int W = lanes<T>;
    for (int l = 0; l < W; ++l) {
      const S *reward = rows.reward[l] + t, *value = rows.value[l] + t;
      T after = load<T>(value + W);
      if constexpr (last) {
        S shifted[W + 1];
        store(shifted, after);
        shifted[W] = state.next_value[l];
        after = load<T>(shifted + 1);
      } else {
        after = load<T>(value + W + 1);
      }
      block[l] = vfma(gamma, load<T>(value + 1), load<T>(reward)) - load<T>(value);
      block[l + W] = vfma(gamma, after, load<T>(reward + W)) - load<T>(value + W);
    }
    transpose(block);
    transpose(block + W);
  }
  PPO_INLINE static void store_outputs(const Rows& rows, int t, T* block) {
    constexpr int W = lanes<T>;
    transpose(block);
    transpose(block + W);
    for (int l = 0; l < W; ++l) {
      const S* value = rows.value[l] + t;
      store(rows.advantage[l] + t, block[l]);
      store(rows.advantage[l] + t + W, block[l + W]);
      store(rows.returns[l] + t, block[l] + load<T>(value));
      store(rows.returns[l] + t + W, block[l + W] + load<T>(value + W));
    }
  }

  template <class P>
  void row_pointers(const View& v, int steps, P** rows) const {
    for (int l = 0; l < lanes<T>; ++l) {
      rows[l] = const_cast<P*>(ppo::at<S>(v, at.seq[l], at.column(l, steps)));
    }
  }

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
