// Steps of gae, loaded and decoded in groups of four, and the kernel for time-major gae.
#pragma once

#include "walk.cuh"

namespace ppo::cuda {

// Steps of gae. kExtras: any of the optional inputs, or two lambdas; otherwise rewards, values, a
// mask and a bootstrap. kDense: how those lie.
template <bool kExtras, Dense kDense>
struct GaeSource {
  static_assert(!kExtras || kDense == Dense::no,
                "the optional inputs of dense steps may lie anywhere");
  using Args = GaeArgs;
  static constexpr bool extras = kExtras;
  static constexpr Dense dense = kDense;
  static constexpr bool needs_last = false;
  // Blocks at least, as registers allow. (For sm_100, ptxas 13.0 keeps more in registers and
  // spills with four.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int dense_blocks = 3;
#else
  static constexpr int dense_blocks = 4;
#endif
  static constexpr int resident = kDense != Dense::no ? dense_blocks : kExtras ? 2 : 3;

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
  struct Raw : std::conditional_t<kExtras, Extras, Plain> {};

  const GaeArgs& args;

  PPO_DEVICE Row open(const Sequence&, int64_t) const { return {}; }

  // Masked steps are not read; `flags` are the mask's bytes.
  PPO_DEVICE Raw load(const Row&, const Sequence& s, int64_t t, uint32_t flags) const {
    const int exist = s.exist(t), n = flags ? exist : 0;
    Raw raw{};
    raw.reward = load_quad<kDense>(args.rewards, s, t, n);
    raw.value = load_quad<kDense>(args.base.values, s, t, n);
    if constexpr (kExtras) {
      const auto load = [&](const Steps& v, int count) {
        return load_quad<Dense::no>(v, s, t, v.data ? count : 0);
      };
      raw.after = load(args.next_values, n);
      raw.rho = load(args.rho, n);
      raw.c = load(args.c, n);
      raw.lam = load(args.lam, exist);
      raw.lam_ret = load(args.lam_returns, exist);
      raw.terminated = args.terminated.data ? load_flags<Dense::no>(args.terminated, s, t, n) : 0;
      raw.truncated = args.truncated.data ? load_flags<Dense::no>(args.truncated, s, t, n) : 0;
    }
    return raw;
  }

  PPO_DEVICE StepGroupOf<kExtras> decode(const Row&, const Sequence& s, int64_t t, uint32_t flags,
                                         const Raw& raw) const {
    StepGroupOf<kExtras> u;
    u.live = u.kept = flag_bits(flags);
    u.moves = args.base.carry ? u.live : (1u << s.exist(t)) - 1u;
    kept_or(args.rewards, raw.reward, u.live, 0.f, u.reward);
    kept_or(args.base.values, raw.value, u.live, 0.f, u.value);
    if constexpr (kExtras) {
      u.has_after = args.next_values.data;
      kept_or(args.next_values, raw.after, u.live, 0.f, u.after);
      kept_or(args.rho, raw.rho, u.live, 1.f, u.rho);
      u.terminated = flag_bits(raw.terminated) & u.live;
      u.cut = u.terminated | (flag_bits(raw.truncated) & u.live);
      float c[kGroupSteps];
      kept_or(args.c, raw.c, u.live, 1.f, c);
      decays(args.lam, raw.lam, args.lam_per_step, u.live, args.base.decay, c, u.decay);
      decays(args.lam_returns, raw.lam_ret, args.lam_returns_per_step, u.live, args.decay_returns,
             c, u.decay_ret);
    }
    return u;
  }

 private:
  // The input where the mask keeps it, `neutral` elsewhere; `neutral` everywhere if the input is
  // absent.
  PPO_DEVICE static void kept_or(const Steps& v, const Quad& raw, unsigned live, float neutral,
                                 float* x) {
    cuda::decode<kDense>(raw, v.dtype, x);
    const unsigned kept = v.data ? live : 0;
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) x[i] = kept >> i & 1 ? x[i] : neutral;
  }

  // Factors of the recurrence: gamma * lambda, in double until the last rounding, times c.
  PPO_DEVICE void decays(const Steps& lam, const Quad& raw, bool per_step, unsigned live,
                         float number, const float* c, float* decay) const {
    cuda::decode<Dense::no>(raw, lam.dtype, decay);
#pragma unroll
    for (int i = 0; i < kGroupSteps; ++i) {
      const bool kept = !per_step || (live >> i & 1);
      const double lambda = kept ? double(decay[i]) : 1.0;
      decay[i] = (lam.data ? float(args.gamma * lambda) : number) * c[i];
    }
  }
};

constexpr int kSlab = 2 * kGroupSteps;  // steps of a thread
constexpr int kSlabs = kTileSteps / kSlab;
// Time-major gae: neighbouring threads hold neighbouring sequences, and the threads of one
// sequence a slab of its steps each, so that every load is coalesced without a transpose. kAbreast
// sequences lie side by side, half as many if a thread needs more than 128 registers. A block has
// kSlabs rows of threads, or fewer where sequences are short: more blocks fill more
// multiprocessors.
template <bool kExtras>
constexpr int kAbreast = kExtras ? 16 : 32;
template <bool kExtras>
constexpr int kSlabThreads = kSlabs * kAbreast<kExtras>;

template <bool kExtras>
struct SlabShared {
  AffineMap<kExtras> maps[2][kSlabs][kAbreast<kExtras>];
  NextValue next_values[kSlabs][kAbreast<kExtras>];
  ShiftedSums moments[kSlabThreads<kExtras> / kWarp];
};

// Position of a thread's slab: the rows [first, first + slabs) of `column` share a sequence, and
// `index` is this thread's place among them.
struct Slab {
  int column, first, index, slabs;
};

// Value behind this slab. `next` enters as the value behind the tile and leaves as the value
// behind the tile before.
template <bool kExtras>
PPO_DEVICE float next_of_slab(const SlabShared<kExtras>& shared, const Slab& at, float& next) {
  float mine = next;
  for (int slab = at.slabs - 1; slab >= 0; --slab) {
    mine = slab == at.index ? next : mine;
    const NextValue here = shared.next_values[at.first + slab][at.column];
    next = here.any ? here.value : next;
  }
  return mine;
}

// scan_lanes() from its second level on, for a slab of two groups: `total` becomes the tile's map.
template <bool kExtras>
PPO_DEVICE void scan_slabs(AffineMap<kExtras>& total, AffineMap<kExtras> (&behind)[2],
                           const Slab& at, SlabShared<kExtras>& shared) {
  int turn = 0;
  for (int bit = 1; bit < at.slabs; bit *= 2, turn ^= 1) {
    shared.maps[turn][at.first + at.index][at.column] = total;
    __syncthreads();
    const AffineMap<kExtras> other = shared.maps[turn][at.first + (at.index ^ bit)][at.column];
    const bool earlier = (at.index & bit) == 0;
    climb(earlier, other, behind[0]);
    climb(earlier, other, behind[1]);
    total = joined(earlier, total, other);
  }
}

template <bool kExtras, Dense kDense>
PPO_DEVICE void walk_slabs(const GaeSource<kExtras, kDense>& source, const Sequence& span,
                           const Slab& at, MomentSum& moments, SlabShared<kExtras>& shared) {
  const AdvantageArgs& args = source.args.base;
  const typename GaeSource<kExtras, kDense>::Row row = source.open(span, -1);
  const int64_t tiles = (args.seqs.length + kTileSteps - 1) / kTileSteps;
  int64_t t = (tiles - 1) * kTileSteps + at.index * kSlab;
  float next = number_of(args.bootstrap, span, 0.f);
  Later later{0.f, 0.f};
  AffineMap<kExtras> chunk;
  for (int64_t tile = tiles - 1; tile >= 0; --tile, t -= kTileSteps) {
    const uint32_t flags = load_flags<kDense>(args.mask, span, t, span.exist(t));
    const uint32_t more_flags =
        load_flags<kDense>(args.mask, span, t + kGroupSteps, span.exist(t + kGroupSteps));
    const auto raw = source.load(row, span, t, flags);
    const auto more_raw = source.load(row, span, t + kGroupSteps, more_flags);
    const StepGroupOf<kExtras> first = source.decode(row, span, t, flags, raw);
    const StepGroupOf<kExtras> second =
        source.decode(row, span, t + kGroupSteps, more_flags, more_raw);
    const NextValue near = next_value_of(first), far = next_value_of(second);
    shared.next_values[at.first + at.index][at.column] = near.any ? near : far;
    __syncthreads();
    const float after = next_of_slab(shared, at, next);
    const Suffixes<kExtras> maps = recur(args, first, far.any ? far.value : after);
    const Suffixes<kExtras> more = recur(args, second, after);
    AffineMap<kExtras> total = compose(maps.of(0), more.of(0));
    AffineMap<kExtras> behind[2] = {more.of(0), {}};
    scan_slabs(total, behind, at, shared);
    const Later enters = apply(chunk, later);
    finish<kDense>(args, span, t, first, maps, apply(behind[0], enters), moments);
    finish<kDense>(args, span, t + kGroupSteps, second, more, apply(behind[1], enters), moments);
    chunk = compose(total, chunk);
    if (tile % kTiles == 0) {
      later = apply(chunk, later);
      chunk = {};
    }
  }
}

// `lanes` slabs make a tile: a power of two, all of them where sequences are longer than a tile.
template <bool kExtras, Dense kDense>
__global__ void __launch_bounds__(kSlabThreads<kExtras>, 1)
    gae_slabs_kernel(const __grid_constant__ GaeArgs args) {
  auto& shared = *shared_memory<SlabShared<kExtras>>();
  const SequenceLayout& seqs = args.base.seqs;
  const int slabs = args.base.lanes, row = int(threadIdx.x) / kAbreast<kExtras>;
  const int rows = int(blockDim.x) / kAbreast<kExtras>;
  const Slab at{int(threadIdx.x) % kAbreast<kExtras>, row / slabs * slabs, row % slabs, slabs};
  const int64_t group = int64_t(blockIdx.x) * (rows / slabs) + row / slabs;
  const int64_t seq = group * kAbreast<kExtras> + at.column;
  const int64_t steps = seq < seqs.count ? seqs.length : 0;
  const Sequence span{seq, 0, steps, seq, formed_anew(uint32_t(seqs.pitch))};
  MomentSum moments;
  walk_slabs(GaeSource<kExtras, kDense>{args}, span, at, moments, shared);
  leave(args.base, moments, shared.moments);
}

}  // namespace ppo::cuda
