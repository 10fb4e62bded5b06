// GAE kernels, compiled once per instruction set (no include guard, see foreach_isa.h).
#include "chunk.h"
#include "sweep.h"

namespace ppo::PPO_ISA {

template <class C>
struct GaeJob {
  using T = typename C::T;
  using S = scalar_t<T>;
  using M = flags_t<C>;
  const GaeArgs& args;
  const C zero, one, gamma;
  const Powers<C> decay, decay_returns;
  const bool straight;  // rewards and values alone, and whole vectors of them in memory

  PPO_INLINE explicit GaeJob(const GaeArgs& a)
      : args(a),
        zero(splat<C>(set1<T>(0))),
        one(splat<C>(set1<T>(1))),
        gamma(splat<C>(set1<T>(S(a.base.gamma)))),
        decay(a.base.decay),
        decay_returns(a.decay_returns),
        straight(direct<C>(a.rewards) && direct<C>(a.base.values) && !has_extras(a)) {}

  PPO_INLINE void start(int64_t, int64_t, int64_t) {}

  PPO_INLINE int64_t advance(const Place& at, int64_t chunks, Carried<T>& carried,
                             OpenMoments<T>& moments) {
    if (straight && at.full<C>()) {
      if (const int64_t done = whole_chunks(at, chunks, carried, moments)) return done;
    }
    // A local copy: a variable whose address is passed to a function does not stay in registers.
    Carried<T> carried_here = carried;
    M live;
    const C advantage = any_chunk(Place(at), carried_here, live);
    carried = carried_here;
    moments.add(advantage, live);
    return 1;
  }

 private:
  static bool has_extras(const GaeArgs& a) {
    return a.next_values.data || a.terminated.data || a.truncated.data || a.rho.data || a.c.data ||
           a.lam.data || a.own_lambda;
  }

  // Processes whole chunks from `at` on until one has a masked step; the carried state stays in
  // registers. Returns the number of chunks done.
  PPO_INLINE int64_t whole_chunks(Place at, int64_t chunks, Carried<T>& carried,
                                  OpenMoments<T>& moments) const {
    constexpr int kGroup = C::count == 1 ? OpenMoments<T>::kRecent : 1;
    const View mask = args.base.mask;
    Straight memory(args, at);
    int64_t done = 0;
    while (done < chunks) {
      if (kGroup > 1 && chunks - done >= kGroup && unmasked<kGroup>(mask, at)) {
        whole_group<kGroup>(memory, done == 0, carried, moments);
        done += kGroup, at.t -= kGroup * kSteps;
      } else if (unmasked<1>(mask, at)) {
        whole_group<1>(memory, done == 0, carried, moments);
        done += 1, at.t -= kSteps;
      } else {
        break;
      }
    }
    return done;
  }

  // Pointers to the first step of a chunk.
  struct Straight {
    const S *reward, *value;
    S *advantages, *returns;
    const int64_t reward_stride, value_stride, out_stride;

    PPO_INLINE Straight(const GaeArgs& a, const Place& at)
        : reward(own(a.rewards, at)),
          value(own(a.base.values, at)),
          advantages(const_cast<S*>(own(a.base.advantages, at))),
          returns(const_cast<S*>(own(a.base.returns, at))),
          reward_stride(between_steps(a.rewards)),
          value_stride(between_steps(a.base.values)),
          out_stride(between_steps(a.base.advantages)) {}

    PPO_INLINE void move(int64_t steps) {
      reward += steps * reward_stride, value += steps * value_stride;
      advantages += steps * out_stride, returns += steps * out_stride;
    }
  };

  // Processes the chunk at `m` and the n - 1 before it, latest first, and moves `m` before them.
  template <int n>
  PPO_INLINE void whole_group(Straight& m, bool ends, Carried<T>& carried,
                              OpenMoments<T>& moments) const {
    // As many chunks at once as fit into registers.
    constexpr int kAtOnce = n < 4 ? n : 4;
    Chunk<T, n * C::count> group;
    at_once<kAtOnce>(m, ends, carried, group.r);
    if constexpr (n > kAtOnce) {
      static_assert(n == 2 * kAtOnce);
      at_once<kAtOnce>(m, false, carried, group.r + kAtOnce * C::count);
    }
    moments.add(group);
  }

  template <int n>
  PPO_INLINE void at_once(Straight& m, bool ends, Carried<T>& carried, T* out) const {
    m.move((1 - n) * kSteps);
    C a[n];
    for (int i = 0; i < n; ++i) {
      const int64_t t = (n - 1 - i) * kSteps;
      const S* values = m.value + t * m.value_stride;
      const C v = load_direct<C>(values, m.value_stride);
      const C next = i == 0 && ends ? next_step(v, carried.next_value)
                                    : next_in_memory(v, values, carried.next_value);
      carried.next_value = first_step(v);
      const C reward = load_direct<C>(m.reward + t * m.reward_stride, m.reward_stride);
      a[i] = vfma(gamma, next, reward) - v;
    }
    recur(decay, a, carried.advantage);
    for (int i = 0; i < n; ++i) {
      const int64_t t = (n - 1 - i) * kSteps;
      const C v = load_direct<C>(m.value + t * m.value_stride, m.value_stride);
      store_direct(m.advantages + t * m.out_stride, m.out_stride, a[i]);
      store_direct(m.returns + t * m.out_stride, m.out_stride, a[i] + v);
      for (int j = 0; j < C::count; ++j) out[i * C::count + j] = a[i].r[j];
    }
    m.move(-kSteps);
  }

  template <int n>
  PPO_INLINE static bool unmasked(const View& mask, Place at) {
    if (!mask.data) return true;
    bool yes = true;
    for (int i = 0; i < n; ++i, at.t -= kSteps) yes &= all(nonzero(load_as<C, uint8_t>(mask, at)));
    return yes;
  }

  // Stride between steps: 1, a constant, for Rows.
  PPO_INLINE static int64_t between_steps(const View& v) {
    return C::count == 1 ? 1 : v.col_stride;
  }
  PPO_INLINE static const S* own(const View& v, const Place& at) {
    return ppo::at<S>(v, at.seq, at.first + at.t);
  }

  // The general chunk: any optional inputs and masks. Selection removes masked inputs.
  C any_chunk(const Place& at, Carried<T>& carried, M& live) {
    const Recursion& how = args.base;
    const M exists = present<C>(at);
    live = how.mask.data ? exists & nonzero(load_chunk<C>(how.mask, at)) : exists;
    const M moves = how.carry ? live : exists;
    if (!any(moves)) {
      store_chunk(how.advantages, at, zero);
      store_chunk(how.returns, at, zero);
      return zero;
    }
    const C reward = load_live(args.rewards, at, live, zero);
    const C value = load_live(how.values, at, live, zero);
    const C next = args.next_values.data
                       ? load_live(args.next_values, at, live, zero)
                       : next_values(value, moves, all(moves), carried.next_value);
    C delta = vfma(gamma, next, reward);
    M cut = {};
    if (args.terminated.data) {
      cut = nonzero(load_live(args.terminated, at, live, zero));
      delta = select(cut, reward, delta);
    }
    if (args.truncated.data) cut = cut | nonzero(load_live(args.truncated, at, live, zero));
    delta = delta - value;
    if (args.rho.data) delta = load_live(args.rho, at, live, one) * delta;
    delta = select(moves, delta, zero);

    const M* cuts = args.terminated.data || args.truncated.data ? &cut : nullptr;
    const C advantage = recur(factors(args.lam, args.lam_per_step, decay, at, live, moves), delta,
                              cuts, carried.advantage);
    C for_return = advantage;
    if (args.own_lambda) {
      for_return = recur(
          factors(args.lam_returns, args.lam_returns_per_step, decay_returns, at, live, moves),
          delta, cuts, carried.for_return);
    }
    store_chunk(how.advantages, at, select(live, advantage, zero));
    store_chunk(how.returns, at, select(live, for_return + value, zero));
    return advantage;
  }

  PPO_INLINE static C load_live(const View& v, const Place& at, const M& live, const C& masked) {
    return select(live, load_chunk<C>(v, at), masked);
  }

  // Factors of the recurrence: gamma * lambda, in double until the last rounding, times c; 1 where
  // a step does not move the recurrence.
  C factors(const View& lam, bool per_step, const Powers<C>& number, const Place& at,
            const M& live, const M& moves) const {
    C a = number.level[0];
    if (lam.data) {
      a = load_chunk<C>(lam, at);
      for (auto& lanes_of : a.r) {
        S each[lanes<T>];
        store(each, lanes_of);
        for (S& x : each) x = S(args.gamma * double(x));
        lanes_of = load<T>(each);
      }
      if (per_step) a = select(live, a, gamma);
    }
    if (args.c.data) a = a * load_live(args.c, at, live, one);
    return select(moves, a, one);
  }
};

inline void gae_rows(const GaeArgs& args, const WorkItem* begin, const WorkItem* end) {
  GaeJob<Row> job(args);
  sweep_rows<Row>(job, args.base, begin, end);
}

#ifdef PPO_MASKED
using avx2::gae_columns;  // a fifth faster than the same compiled for AVX-512VL by GCC 12
#else
inline void gae_columns(const GaeArgs& args, const WorkItem* begin, const WorkItem* end) {
  GaeJob<Column<F>> job(args);
  sweep_columns<Column<F>>(job, args.base, begin, end);
}
#endif

inline void gae_rows_double(const GaeArgs& args, const WorkItem* begin, const WorkItem* end) {
  GaeJob<Column<double>> job(args);
  sweep_rows<Column<double>>(job, args.base, begin, end);
}

}  // namespace ppo::PPO_ISA
