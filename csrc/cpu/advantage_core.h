// The recurrence A = delta + decay * A, backwards, one sequence per lane (no include guard, see
// foreach_isa.h). A lane's operations are those of its sequence alone, in the order of its steps,
// so the bits do not depend on the batch, the padding, the packing or the number of threads.
namespace ppo::PPO_ISA {

// What a lane carries from step t + 1 to step t.
template <class T>
struct Carried {
  alignas(64) scalar_t<T> advantage[lanes<T>], for_return[lanes<T>], next_value[lanes<T>];
};

// One tile of the inputs, each [step][lane]; null where absent. The recurrence leaves the
// advantages in `reward` and the returns in `value`. `decay`s hold gamma * lambda of each step.
template <class T>
struct Inputs {
  using S = scalar_t<T>;
  S *reward, *value;
  const S* live;
  const S *next_value = nullptr, *terminated = nullptr, *truncated = nullptr, *rho = nullptr,
          *c = nullptr, *decay = nullptr, *decay_returns = nullptr;
};

template <class T>
struct Decays {
  using S = scalar_t<T>;
  T gamma, advantages, returns;

  PPO_INLINE explicit Decays(const Recursion& how)
      : gamma(set1<T>(S(how.gamma))),
        advantages(set1<T>(S(how.decay))),
        returns(set1<T>(S(how.decay_returns))) {}
};

// A <- done ? delta : delta + decay * A. `later` may be anything where done.
template <class T>
PPO_INLINE T fold(T delta, T decay, T later, const Inputs<T>& in, int64_t i) {
  const T zero = set1<T>(0);
  T now = vfma(decay, later, delta);
  if (in.terminated) now = select(load<T>(in.terminated + i) != zero, delta, now);
  if (in.truncated) now = select(load<T>(in.truncated + i) != zero, delta, now);
  return now;
}

// rho * (r + gamma * V' - V), with V' = 0 where terminated.
template <class T>
PPO_INLINE T residual(T reward, T value, T next, T gamma, const Inputs<T>& in, int64_t i) {
  if (in.next_value) next = load<T>(in.next_value + i);
  T target = vfma(gamma, next, reward);
  if (in.terminated) target = select(load<T>(in.terminated + i) != set1<T>(0), reward, target);
  const T delta = target - value;
  return in.rho ? load<T>(in.rho + i) * delta : delta;
}

// `carry`: a masked step passes the state through. Otherwise masked inputs were made neutral
// before.
template <class T, bool masked, bool carry, bool plain>
void recur(const Inputs<T>& given, const Decays<T>& by, bool two_lambdas, int steps,
           Carried<T>& state) {
  // The plain case knows at compile time that the optional inputs are absent.
  const Inputs<T> in = plain ? Inputs<T>{given.reward, given.value, given.live} : given;
  T later = load<T>(state.advantage), later_ret = load<T>(state.for_return);
  T next = load<T>(state.next_value);
  const T zero = set1<T>(0);
  for (int64_t i = int64_t(steps - 1) * lanes<T>; i >= 0; i -= lanes<T>) {
    const T reward = load<T>(in.reward + i), value = load<T>(in.value + i);
    const T delta = residual<T>(reward, value, next, by.gamma, in, i);
    T decay = in.decay ? load<T>(in.decay + i) : by.advantages;
    if (in.c) decay = decay * load<T>(in.c + i);
    T now = fold<T>(delta, decay, later, in, i), now_ret = now;
    if (!plain && two_lambdas) {
      T decay_ret = in.decay_returns ? load<T>(in.decay_returns + i) : by.returns;
      if (in.c) decay_ret = decay_ret * load<T>(in.c + i);
      now_ret = fold<T>(delta, decay_ret, later_ret, in, i);
    }
    T out = now, ret = now_ret + value;
    next = carry ? select(load<T>(in.live + i) != zero, value, next) : value;
    if (masked) {
      const auto live = load<T>(in.live + i) != zero;
      later = carry ? select(live, now, later) : now;
      later_ret = carry ? select(live, now_ret, later_ret) : now_ret;
      out = select(live, out, zero);
      ret = select(live, ret, zero);
    } else {
      later = now;
      later_ret = now_ret;
    }
    store(in.reward + i, out);
    store(in.value + i, ret);
  }
  store(state.advantage, later);
  store(state.for_return, later_ret);
  store(state.next_value, next);
}

template <class T, bool plain>
void recur_masked(const Inputs<T>& in, const Decays<T>& by, const Recursion& how, int steps,
                  Carried<T>& state) {
  const bool two = how.two_lambdas;
  if (!in.live) return recur<T, false, false, plain>(in, by, two, steps, state);
  if (how.zero_masked) return recur<T, true, false, plain>(in, by, two, steps, state);
  return recur<T, true, true, plain>(in, by, two, steps, state);
}

// Which slots of a tile exist and are unmasked, for the moments: null where all do. Lanes without
// a sequence read a mask of zeros; with no mask, `tile` is filled.
template <class T>
const scalar_t<T>* live_slots(const Cursor<T>& at, const scalar_t<T>* live, scalar_t<T>* tile,
                              int steps) {
  using S = scalar_t<T>;
  if (live || at.full()) return live;
  for (int l = 0; l < lanes<T>; ++l) tile[l] = S(at.seq[l] >= 0);
  for (int t = 1; t < steps; ++t) store(tile + t * lanes<T>, load<T>(tile));
  return tile;
}

// Neutral content for masked slots, under "zero".
template <class S>
void neutralise(S* x, const S* live, S neutral, int n) {
  using V = widest<S>;
  for (int i = 0; i < n; i += lanes<V>) {
    store(x + i, select(load<V>(live + i) != set1<V>(0), load<V>(x + i), set1<V>(neutral)));
  }
}

// The next sequence with a step for lane l, or none.
template <class T>
int64_t refill(Cursor<T>& at, Carried<T>& state, const Recursion& how, int l, int64_t next,
               int64_t end) {
  using S = scalar_t<T>;
  while (next < end && how.seqs.length(next) == 0) ++next;
  if (next >= end) {
    at.active -= at.seq[l] >= 0;
    at.seq[l] = -1;
    return end;
  }
  at.active += at.seq[l] < 0;
  at.seq[l] = next;
  at.first[l] = how.seqs.first(next);
  at.left[l] = how.seqs.length(next);
  state.advantage[l] = state.for_return[l] = 0;
  S converted = 0;
  state.next_value[l] =
      how.bootstrap.data ? *fetch<S>(how.bootstrap, 0, next, 1, &converted) : S(0);
  return next + 1;
}

// Drives `job` over the sequences of a unit, tile by tile:
// job.start(lane) at a sequence's beginning, job.tile(steps) for every tile.
template <class T, class Job>
void sweep(Job& job, const Recursion& how, const Unit& unit) {
  Cursor<T>& at = job.at;
  at.side_by_side = how.seqs.offsets == nullptr;
  int64_t next = unit.begin;
  for (int l = 0; l < lanes<T>; ++l) {
    at.seq[l] = -1;
    next = refill<T>(at, job.state, how, l, next, unit.end);
    if (at.seq[l] >= 0) job.start(l);
  }
  while (at.active > 0) {
    int64_t steps = tile_steps<T>;
    for (int l = 0; l < lanes<T>; ++l) {
      if (at.seq[l] >= 0 && at.left[l] < steps) steps = at.left[l];
    }
    if (steps > 2 * lanes<T>) steps -= steps % (2 * lanes<T>);
    job.tile(int(steps));
    for (int l = 0; l < lanes<T>; ++l) {
      if (at.seq[l] < 0 || (at.left[l] -= steps) > 0) continue;
      next = refill<T>(at, job.state, how, l, next, unit.end);
      if (at.seq[l] >= 0) job.start(l);
    }
  }
  job.moments.write(unit.moments);
}

}  // namespace ppo::PPO_ISA
