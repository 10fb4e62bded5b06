// The recurrence A = b + a * A', computed backwards in chunks of steps, and the sweeps over
// sequences (no include guard, see foreach_isa.h). Inside a chunk a fixed tree (Sklansky 1960)
// composes the steps' affine maps; chunks pass on one carried value. A sequence's bits therefore
// depend neither on batch, padding, packing and layout nor on the number of threads.
namespace ppo::PPO_ISA {

// State carried from a chunk to the one before it.
template <class T>
struct Carried {
  T advantage, for_return, next_value;
};

// Products of a constant factor after 0, 1, 2 and 3 levels of the tree.
template <class C>
struct Powers {
  using T = typename C::T;
  C level[4];
  T first;

  PPO_INLINE explicit Powers(double factor) {
    level[0] = splat<C>(set1<T>(scalar_t<T>(factor)));
    fold_factors<1>(level[1] = level[0]);
    fold_factors<2>(level[2] = level[1]);
    fold_factors<4>(level[3] = level[2]);
    first = first_step(level[3]);
  }
};

// Recurrence of n chunks, latest first, with one factor for all steps. The chunks are processed
// stage by stage, so that their independent latencies overlap. Between chunks only one FMA depends
// on `carried`; a longer dependency would limit long rows.
template <class C, int n>
PPO_INLINE void recur(const Powers<C>& by, C (&b)[n], typename C::T& carried) {
  using T = typename C::T;
  for (C& x : b) fold<1>(by.level[0], x);
  for (C& x : b) fold<2>(by.level[1], x);
  for (C& x : b) fold<4>(by.level[2], x);
  for (C& x : b) {
    const T first = first_step(x);
    x = vfma(by.level[3], splat<C>(carried), x);
    carried = vfma(by.first, carried, first);
  }
}

// Recurrence of one chunk with a factor per step. Where `cut`, A = b whatever follows (by
// selection, because 0 * NaN is NaN).
template <class C>
PPO_INLINE C recur(C a, C b, const flags_t<C>* cut, typename C::T& carried) {
  C result;
  if (cut) {
    flags_t<C> cuts = *cut;
    fold_cut<1>(cuts, a, b), fold_factors<1>(a);
    fold_cut<2>(cuts, a, b), fold_factors<2>(a);
    fold_cut<4>(cuts, a, b), fold_factors<4>(a);
    result = select(cuts, b, vfma(a, splat<C>(carried), b));
  } else {
    fold<1>(a, b), fold_factors<1>(a);
    fold<2>(a, b), fold_factors<2>(a);
    fold<4>(a, b), fold_factors<4>(a);
    result = vfma(a, splat<C>(carried), b);
  }
  carried = first_step(result);
  return result;
}

// Value of the next step that moves the recurrence.
template <class C>
PPO_INLINE C next_values(const C& value, const flags_t<C>& moves, bool all_move,
                         typename C::T& carried) {
  if (all_move) {
    const C next = next_step(value, carried);
    carried = first_step(value);
    return next;
  }
  const C from_here = first_flagged(moves, value, carried);
  const C next = next_step(from_here, carried);
  carried = first_step(from_here);
  return next;
}

// Count, mean and squares of a stream of vectors. Groups of kRecent vectors are summed in their
// own precision before the sums in double take them: kRecent roundings, far below the elements'
// own error.
template <class T>
struct OpenMoments {
  static constexpr int kRecent = 8;
  Acc<T> sum, squares;
  T some, some_squares, pivot;
  T recent[kRecent];  // the deviations in `some`
  int n_recent;
  int64_t count;

  PPO_INLINE OpenMoments()
      : some(set1<T>(0)), some_squares(some), pivot(some), n_recent(0), count(0) {}

  // Groups of kRecent vectors are added at once, without storing their deviations.
  template <int N>
  PPO_INLINE void add(const Chunk<T, N>& x) {
    if (count == 0) pivot = lane_of(x.r[0], 0);
    count += N * lanes<T>;
    if (N % kRecent == 0) {
      if (n_recent != 0) flush();
      for (int i = 0; i + kRecent <= N; i += kRecent) add_group(x.r + i);
    } else {
      for (int i = 0; i < N; ++i) add_vector(x.r[i] - pivot);
    }
  }
  template <int N>
  PPO_INLINE void add(const Chunk<T, N>& x, const Flags<T, N>& live) {
    for (int i = 0; i < N; ++i) {
      const int more = ppo::PPO_ISA::count(live.r[i]);
      if (more == 0) continue;
      if (count == 0) pivot = first_set(x.r[i], live.r[i]);
      add_vector(select(live.r[i], x.r[i], pivot) - pivot);
      count += more;
    }
  }
  PPO_INLINE void write(double* out) {
    flush();
    scalar_t<T> first[lanes<T>];
    store(first, pivot);
    write_moments(double(count), double(first[0]), sum.total(), squares.total(), out);
  }

 private:
  PPO_INLINE void add_vector(T d) {
    some = some + d;
    some_squares = vfma(d, d, some_squares);
    recent[n_recent] = d;
    if (++n_recent == kRecent) flush();
  }
  PPO_INLINE void add_group(const T* x) {
    constexpr int half = kRecent / 2;
    static_assert(half == 4, "the sums below");
    T d[kRecent], total[half], squared[half];
    for (int i = 0; i < kRecent; ++i) d[i] = x[i] - pivot;
    for (int i = 0; i < half; ++i) {
      total[i] = d[i] + d[i + half];
      squared[i] = vfma(d[i + half], d[i + half], d[i] * d[i]);
    }
    promote((total[0] + total[1]) + (total[2] + total[3]),
            (squared[0] + squared[1]) + (squared[2] + squared[3]), d, kRecent);
  }
  PPO_INLINE void flush() {
    promote(some, some_squares, recent, n_recent);
    some = some_squares = set1<T>(0);
    n_recent = 0;
  }
  // A sum that overflows is recomputed in double.
  PPO_INLINE void promote(T total, T squared, const T* d, int n) {
    if (all(squared < set1<T>(FLT_MAX))) {
      sum.add(total), squares.add(squared);
    } else {
      for (int i = 0; i < n; ++i) sum.add(d[i]), squares.add_square(d[i]);
    }
  }
  PPO_INLINE static T lane_of(const T& x, int lane) {
    scalar_t<T> each[lanes<T>];
    store(each, x);
    return set1<T>(each[lane]);
  }
  PPO_INLINE static T first_set(const T& x, const mask_t<T>& m) {
    int lane = 0;
    while (!any(m & first_n<T>(lane + 1))) ++lane;
    return lane_of(x, lane);
  }
};

template <class T>
Carried<T> at_the_end(const Recursion& how, int64_t seq, int64_t seqs) {
  const T zero = set1<T>(0);
  T boot = zero;
  if (how.bootstrap.data) {
    scalar_t<T> each[lanes<T>] = {}, converted;
    for (int64_t l = 0; l < seqs; ++l) {
      each[l] = *fetch<scalar_t<T>>(how.bootstrap, seq + l, 0, 1, &converted);
    }
    boot = seqs > 1 ? load<T>(each) : set1<T>(each[0]);
  }
  return {zero, zero, boot};
}

// Sweep over sequences one by one, each from its last chunk to its first. job.advance(place,
// chunks, carried, moments) processes the chunk at `place` and at most `chunks` in all, and
// returns their number.
template <class C, class Job>
void sweep_rows(Job& job, const Recursion& how, const WorkItem* item, const WorkItem* end) {
  using T = typename C::T;
  for (; item < end; ++item) {
    OpenMoments<T> moments;
    for (int64_t s = item->begin; s < item->end; ++s) {
      const int64_t first = how.seqs.first(s), length = how.seqs.length(s);
      Carried<T> carried = at_the_end<T>(how, s, 1);
      job.start(s, first, length);
      for (int64_t chunks = (length + kSteps - 1) / kSteps; chunks > 0;) {
        const int64_t t = (chunks - 1) * kSteps, left = length - t;
        const Place at{s, first, t, left < kSteps ? left : kSteps, 1};
        chunks -= job.advance(at, chunks, carried, moments);
      }
    }
    moments.write(item->moments);
  }
}

// Sweep over all sequences of the items together, one chunk of each before the preceding chunks: a
// chunk's steps are neighbours in memory.
template <class C, class Job>
void sweep_slab(Job& job, const Recursion& how, const WorkItem* begin, const WorkItem* end) {
  using T = typename C::T;
  OpenMoments<T> moments[kSlabSequences / kLineSequences];
  Carried<T> carried[kSlabSequences / lanes<T>];
  for (int64_t t = (how.seqs.steps + kSteps - 1) / kSteps * kSteps; (t -= kSteps) >= 0;) {
    const int64_t left = how.seqs.steps - t;
    const int64_t steps = left < kSteps ? left : kSteps;
    Carried<T>* state = carried;
    for (const WorkItem* item = begin; item < end; ++item) {
      for (int64_t s = item->begin; s < item->end; s += lanes<T>, ++state) {
        const int64_t seqs = item->end - s < lanes<T> ? item->end - s : lanes<T>;
        if (left <= kSteps) *state = at_the_end<T>(how, s, seqs);
        job.advance(Place{s, 0, t, steps, seqs}, 1, *state, moments[item - begin]);
      }
    }
  }
  for (const WorkItem* item = begin; item < end; ++item)
    moments[item - begin].write(item->moments);
}

// Time-major sweep: as many items together as make a slab, so that memory is read along its lines
// and each page is visited once.
template <class C, class Job>
void sweep_columns(Job& job, const Recursion& how, const WorkItem* item, const WorkItem* end) {
  while (item < end) {
    const WorkItem* const first = item++;
    while (item < end && item->end - first->begin <= kSlabSequences) ++item;
    sweep_slab<C>(job, how, first, item);
  }
}

}  // namespace ppo::PPO_ISA
