// rlhf_advantages, once per instruction set (no include guard, see foreach_isa.h): KL-shaped
// rewards with the score in its place, then the recurrence of gae, tile by tile.
// clang-format off: each uses the ones before it
#include "../math.h"
#include "transpose.h"
#include "moments_simd.h"
#include "advantage_tile.h"
#include "advantage_core.h"
// clang-format on

namespace ppo::PPO_ISA {

// The last non-zero byte of columns [first, first + n) of a row, or -1.
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

template <class T>
struct RlhfJob {
  using S = scalar_t<T>;
  using V = widest<S>;
  const RlhfArgs& args;
  Cursor<T> at;
  Carried<T> state;
  MomentSum<S> moments;
  int64_t slot[lanes<T>];  // the column that takes the score, or -1
  bool pad[lanes<T>];      // that column is masked: it carries a return and no advantage
  S score[lanes<T>];
  struct alignas(64) {
    S reward[kTileSize], value[kTileSize], live[kTileSize], kl[kTileSize], score[kTileSize];
  } buffer;

  explicit RlhfJob(const RlhfArgs& a) : args(a) {}

  void start(int l) {
    slot[l] = -1;
    if (args.score_at == ScoreAt::per_token) return;
    const int64_t first = at.first[l], end = first + at.left[l];
    slot[l] = last_set(args.base.mask, at.seq[l], first, at.left[l]);
    if (slot[l] < 0) return;
    pad[l] = args.score_at == ScoreAt::first_pad && slot[l] + 1 < end;
    slot[l] += pad[l];
    S converted;
    score[l] = clamp(*fetch<S>(args.scores, 0, at.seq[l], 1, &converted), S(args.reward_min),
                     S(args.reward_max));
  }

  void tile(int steps) {
    const Recursion& how = args.base;
    const int n = steps * lanes<T>;
    load_tile<T>(args.logprobs, at, steps, buffer.reward);
    load_tile<T>(args.ref_logprobs, at, steps, buffer.kl);
    load_tile<T>(how.values, at, steps, buffer.value);
    load_tile<T>(how.mask, at, steps, buffer.live);
    shape_rewards(n);
    if (args.score_at == ScoreAt::per_token) {
      load_tile<T>(args.scores, at, steps, buffer.score);
      add_scores(n);
    }
    for (int l = 0; l < lanes<T>; ++l) {
      if (const int i = score_index(l, steps); i >= 0) {
        buffer.reward[i] += score[l];
        buffer.live[i] = 1;
      }
    }
    store_tile<T>(buffer.reward, args.rewards, at, steps);
    store_tile<T>(buffer.kl, args.kl, at, steps);
    if (how.zero_masked) neutralise<S>(buffer.value, buffer.live, 0, n);
    const Inputs<T> in{buffer.reward, buffer.value, buffer.live};
    recur_masked<T, true>(in, Decays<T>(how), how, steps, state);
    for (int l = 0; l < lanes<T>; ++l) {
      if (const int i = score_index(l, steps); i >= 0 && pad[l])
        buffer.reward[i] = buffer.live[i] = 0;
    }
    moments.add(buffer.reward, buffer.live, n);
    store_tile<T>(buffer.reward, how.advantages, at, steps);
    store_tile<T>(buffer.value, how.returns, at, steps);
  }

 private:
  // Where lane l's score stands in this tile, or -1.
  int score_index(int l, int steps) const {
    if (at.seq[l] < 0 || slot[l] < 0) return -1;
    const int64_t t = slot[l] - at.column(l, steps);
    return t >= 0 && t < steps ? int(t) * lanes<T> + l : -1;
  }

  // log-probabilities -> rewards without scores, reference log-probabilities -> kl.
  void shape_rewards(int n) {
    PolicyOptions options{};
    options.estimator = args.estimator;
    options.kl_clamp = args.kl_clamp;
    const PolicyConsts<V> consts(options);
    const V zero = set1<V>(0), minus_coef = set1<V>(S(-args.kl_coef));
    const bool k3 = args.estimator == Estimator::k3;
    for (int i = 0; i < n; i += lanes<V>) {
      const auto live = load<V>(buffer.live + i) != zero;
      const V x = select(live, load<V>(buffer.reward + i) - load<V>(buffer.kl + i), zero);
      const ExpParts<V> minus = k3 ? exp_parts(-x) : ExpParts<V>{zero, zero, zero};
      const V kl = select(live, kl_term(options, consts, x, minus, zero).value, zero);
      store(buffer.kl + i, kl);
      store(buffer.reward + i, select(live, minus_coef * kl, zero));
    }
  }

  void add_scores(int n) {
    const V zero = set1<V>(0), low = set1<V>(S(args.reward_min)),
            high = set1<V>(S(args.reward_max));
    for (int i = 0; i < n; i += lanes<V>) {
      const V reward = load<V>(buffer.reward + i),
              more = clamp(load<V>(buffer.score + i), low, high);
      store(buffer.reward + i, select(load<V>(buffer.live + i) != zero, reward + more, reward));
    }
  }
};

inline void rlhf_unit(const RlhfArgs& args, const Unit& unit) {
  if (unit.one_lane) {
    RlhfJob<float> job(args);
    sweep<float>(job, args.base, unit);
  } else {
    RlhfJob<F> job(args);
    sweep<F>(job, args.base, unit);
  }
}

inline void rlhf_unit_double(const RlhfArgs& args, const Unit& unit) {
  RlhfJob<double> job(args);
  sweep<double>(job, args.base, unit);
}

}  // namespace ppo::PPO_ISA
