// Kernels of rlhf_advantages: KL-shaped rewards plus the score, then the recurrence of gae (no
// include guard, see foreach_isa.h).
#include "../../math.h"
#include "chunk.h"
#include "sweep.h"

namespace ppo::PPO_ISA {

// Column of the last non-zero byte in columns [first, first + n) of a row, or -1.
inline int64_t last_set(const View& mask, int64_t row, int64_t first, int64_t n) {
  const uint8_t* p = ppo::at<uint8_t>(mask, row, first);
  int64_t i = n;
  if (mask.col_stride == 1) {
    for (uint64_t eight; i >= 8; i -= 8) {
      __builtin_memcpy(&eight, p + i - 8, 8);
      if (eight) break;
    }
  }
  while (i > 0 && !p[(i - 1) * mask.col_stride]) --i;
  return i > 0 ? first + i - 1 : -1;
}

// One sequence at a time: C is a Row, or a Column of one lane.
template <class C>
struct RlhfJob {
  using T = typename C::T;
  using S = scalar_t<T>;
  using M = flags_t<C>;
  const RlhfArgs& args;
  const C zero, one, gamma;
  const Powers<C> decay;
  const PolicyOptions options;
  const PolicyConsts<T> consts;
  int64_t slot;  // the step that takes the score, or -1
  bool pad;      // that step is masked: it carries a return and no advantage
  S score;

  PPO_INLINE explicit RlhfJob(const RlhfArgs& a)
      : args(a),
        zero(splat<C>(set1<T>(0))),
        one(splat<C>(set1<T>(1))),
        gamma(splat<C>(set1<T>(S(a.base.gamma)))),
        decay(a.base.decay),
        options(kl_options(a)),
        consts(options) {}

  void start(int64_t seq, int64_t first, int64_t length) {
    slot = -1;
    if (args.score_at == ScoreAt::per_token) return;
    slot = last_set(args.base.mask, seq, first, length);
    if (slot < 0) return;
    slot -= first;
    pad = args.score_at == ScoreAt::first_pad && slot + 1 < length;
    slot += pad;
    S converted;
    score = clamp(*fetch<S>(args.scores, seq, 0, 1, &converted), S(args.reward_min),
                  S(args.reward_max));
  }

  PPO_INLINE int64_t advance(const Place& at, int64_t, Carried<T>& carried,
                             OpenMoments<T>& moments) {
    chunk(at, carried, moments);
    return 1;
  }

 private:
  PPO_INLINE void chunk(const Place& at, Carried<T>& carried, OpenMoments<T>& moments) {
    const Recursion& how = args.base;
    const M exists = present<C>(at);
    const M live = exists & nonzero(load_chunk<C>(how.mask, at));
    const bool scored = slot >= at.t && slot < at.t + at.steps;
    const M here = scored ? only(int(slot - at.t)) : M{};
    const M kept = live | here, moves = how.carry ? kept : exists;
    if (!any(moves)) return store_all(at, zero, zero, zero, zero);

    const C kl = estimate(at, live);
    C reward = select(live, splat<C>(set1<T>(S(-args.kl_coef))) * kl, zero);
    if (args.score_at == ScoreAt::per_token) {
      reward = select(live, reward + bounded(load_chunk<C>(args.scores, at)), reward);
    }
    if (scored) reward = select(here, reward + splat<C>(set1<T>(score)), reward);

    const C value = select(kept, load_chunk<C>(how.values, at), zero);
    const bool whole = at.full<C>() && all(moves);
    const C next = next_values(value, moves, whole, carried.next_value);
    const C delta = select(moves, vfma(gamma, next, reward) - value, zero);
    C advantage = delta;
    if (whole) {
      C alone[1] = {delta};
      recur(decay, alone, carried.advantage);
      advantage = alone[0];
    } else {
      advantage = recur<C>(select(moves, decay.level[0], one), delta, nullptr, carried.advantage);
    }
    store_all(at, select(live, advantage, zero), select(kept, advantage + value, zero), reward,
              kl);
    moments.add(advantage, live);
  }

  static PolicyOptions kl_options(const RlhfArgs& args) {
    PolicyOptions options{};
    options.estimator = args.estimator;
    options.kl_clamp = args.kl_clamp;
    return options;
  }

  // Flags with one step set.
  static M only(int step) {
    S each[kSteps] = {};
    each[step] = 1;
    C c;
    for (int i = 0; i < C::count; ++i) c.r[i] = load<T>(each + i * lanes<T>);
    return nonzero(c);
  }

  PPO_INLINE C bounded(C x) const {
    for (auto& r : x.r) r = clamp(r, set1<T>(S(args.reward_min)), set1<T>(S(args.reward_max)));
    return x;
  }

  // KL estimate of the live steps; 0 elsewhere.
  PPO_INLINE C estimate(const Place& at, const M& live) const {
    const T none = set1<T>(0);
    C x = select(live, load_chunk<C>(args.logprobs, at) - load_chunk<C>(args.ref_logprobs, at),
                 zero);
    for (auto& r : x.r) {
      const bool k3 = options.estimator == Estimator::k3;
      const ExpParts<T> minus = k3 ? exp_parts(-r) : ExpParts<T>{none, none, none};
      r = kl_term(options, consts, r, minus, none).value;
    }
    return select(live, x, zero);
  }

  PPO_INLINE void store_all(const Place& at, const C& advantage, const C& returns, const C& reward,
                            const C& kl) const {
    store_chunk(args.base.advantages, at, advantage);
    store_chunk(args.base.returns, at, returns);
    store_chunk(args.rewards, at, reward);
    store_chunk(args.kl, at, kl);
  }
};

inline void rlhf_rows(const RlhfArgs& args, const WorkItem* begin, const WorkItem* end) {
  RlhfJob<Row> job(args);
  sweep_rows<Row>(job, args.base, begin, end);
}

inline void rlhf_rows_double(const RlhfArgs& args, const WorkItem* begin, const WorkItem* end) {
  RlhfJob<Column<double>> job(args);
  sweep_rows<Column<double>>(job, args.base, begin, end);
}

}  // namespace ppo::PPO_ISA
