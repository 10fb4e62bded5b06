// Kernels of logits_ppo_loss: the policy loss of a token between the softmax and the gradient of
// its row. One kernel reads each row twice; on sm_90 and later another keeps a row in the shared
// memory of a cluster of blocks between the two, so that it is read once and written once.
#pragma once

#include "softmax.cuh"

namespace ppo::cuda {

// Arguments, by value in the kernels' parameters.
struct LogitsPpoArgs {
  LogitsRows rows;
  PolicyArg policy;
  RowValues old_logprobs, advantages, is_weights, ref_logprobs, weights;  // (rows,)
  void* out;                                                              // (rows, V)
  RowIndex out_at;
  float *logprobs, *entropy;  // (rows,) contiguous
  int64_t n_rows;

  template <class O>
  PPO_DEVICE O* out_row(int64_t i) const {
    return static_cast<O*>(out) + out_at.offset(i);
  }
};

// Loss inputs of one token, fetched before its row.
struct TokenInputs {
  bool live, legal;  // counts; and is one of the V
  int64_t label;
  float inv_temperature, old_logprob, advantage, is_weight, ref_logprob, weight;
};

PPO_DEVICE TokenInputs token_inputs(const LogitsPpoArgs& a, int64_t row) {
  TokenInputs t{};
  t.live = a.rows.live(row);
  if (!t.live) return t;
  t.label = a.rows.tokens.integer(row);
  t.legal = t.label >= 0 && t.label < a.rows.vocab;
  t.inv_temperature = a.rows.inv_temperature_at(row);
  t.old_logprob = a.old_logprobs ? a.old_logprobs.number(row) : 0.f;
  t.advantage = a.advantages.number(row);
  t.is_weight = a.is_weights ? a.is_weights.number(row) : 1.f;
  t.ref_logprob = a.ref_logprobs ? a.ref_logprobs.number(row) : 0.f;
  t.weight = a.weights.number(row);
  return t;
}

// Gradient terms of a live token's row, given the row's softmax and the label's logit.
PPO_DEVICE GradientTerms token_gradient(const LogitsPpoArgs& a, const PolicyConsts<float>& c,
                                        const TokenInputs& t, const Outcome& row,
                                        float label_logit) {
  PolicyToken<float> token{row.logprob,   a.old_logprobs ? t.old_logprob : row.logprob,
                           t.advantage,   t.is_weight,
                           t.ref_logprob, 1.f,
                           false};
  if (a.policy.moments) token.advantage = whiten_advantage(c, token.advantage);
  const float slope = policy_terms_of(a.policy.options, c, token).grad;
  GradientTerms terms = gradient_terms(t.weight * slope, -(t.weight * c.entropy_coef), row,
                                       t.label, label_logit, t.inv_temperature, t.legal);
  // A clamp drops a NaN and leaves a slope of 0; the row is NaN all the same.
  terms.zero = terms.zero && t.legal && row.sound;
  return terms;
}

PPO_DEVICE void store_outcome(const LogitsPpoArgs& a, int64_t row, bool live, const Outcome& o) {
  a.logprobs[row] = live ? o.logprob : 0.f;
  a.entropy[row] = live ? o.entropy : 0.f;
}

// Team of threads that takes whole rows, one after the other.
struct Team {
  int thread, threads;  // of this team
  int64_t first, step;  // rows
  bool whole_block;

  PPO_DEVICE void sync() const {
    if (whole_block) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
};

// Reads each row for its softmax, and once more, mostly from the L2, for its gradient.
template <class T, class O>
PPO_DEVICE void two_reads(const LogitsPpoArgs& a, const Team& team, SoftmaxState* states) {
  const PolicyConsts<float> c = resolve(a.policy);
  const RowPlan plan = row_plan(a.rows.vocab);
  for (int64_t r = team.first; r < a.n_rows; r += team.step) {
    const TokenInputs t = token_inputs(a, r);
    const T* from = a.rows.row<T>(r);
    O* to = a.out_row<O>(r);
    Outcome o{};
    GradientTerms terms{};
    terms.zero = true;
    if (t.live) {
      for (int s = team.thread / kWarp; s < plan.slices; s += team.threads / kWarp) {
        const int first = s * plan.length;
        const SoftmaxState state =
            slice_state(from, first, min(first + plan.length, a.rows.vocab), t.inv_temperature);
        if (lane_id() == 0) states[s] = state;
      }
      const float label_logit = t.legal ? widen(from[t.label]) : 0.f;
      team.sync();  // and every read of the label precedes the first write
      o = outcome(merged(states, plan.slices), label_logit, t.inv_temperature, t.legal);
      terms = token_gradient(a, c, t, o, label_logit);
    }
    if (team.thread == 0) store_outcome(a, r, t.live, o);
    if (terms.zero) {
      write_zeros<Memory::global>(to, 0, a.rows.vocab, team.thread, team.threads);
    } else if constexpr (sizeof(O) < sizeof(T)) {
      write_gradient<Memory::global, Memory::global>(from, to, 0, a.rows.vocab, terms, team.thread,
                                                     team.threads, [&] { team.sync(); });
    } else {
      write_gradient<Memory::global, Memory::global>(from, to, 0, a.rows.vocab, terms, team.thread,
                                                     team.threads, [] {});
    }
    team.sync();  // `states` are read
  }
}

constexpr int kTwoReadThreads = 256;

// Two-read kernel: rows of one slice take a warp each, longer rows a block each.
template <class T, class O>
__global__ void __launch_bounds__(kTwoReadThreads, 1)
    logits_ppo_two_reads(const __grid_constant__ LogitsPpoArgs a) {
  SoftmaxState* states = shared_memory<SoftmaxState>();
  const int warps = int(blockDim.x) / kWarp;
  Team team{int(threadIdx.x), int(blockDim.x), int64_t(blockIdx.x), int64_t(gridDim.x), true};
  if (row_plan(a.rows.vocab).slices == 1) {
    states += warp_id();
    team = {lane_id(), kWarp, team.first * warps + warp_id(), team.step * warps, false};
  }
  two_reads<T, O>(a, team, states);
}

constexpr int kStages = 3;
constexpr int kPieces = 4;  // of a stage: one can be fetched while the next is still being written
constexpr int kMaxWorkers = 16;  // warps
constexpr int kMaxCluster = 8;   // the largest size that every device has
constexpr int kClusterThreads = (kMaxWorkers + 2) * kWarp;
// Sets of what blocks send each other, in turn. A block that sends row n + 4 has left row n + 2's
// gradient, for which every block's row n + 2 was sent, which each did after its own row n.
constexpr int kSets = 4;

// Token of a row in its stage, and the way of the row's gradient.
struct StagedRow {
  TokenInputs token;
  void* to;
  int phase;     // of the row in its stage, as in the logits
  bool in_bulk;  // the gradient leaves by bulk copies, for which it needs the same phase
};

// The cluster kernel. Every block holds the same columns of each row, kStages rows at a time. Of
// its warps the last moves rows by bulk copies, the one before it forms a row's loss from its
// softmax, and the workers take a row's softmax and then the gradient of the row before, whose
// loss was formed meanwhile. This state lies ahead of the stages in shared memory.
struct ClusterState {
  Mbarrier full[kStages];     // the row is there
  Mbarrier formed[kStages];   // its gradient terms are
  Mbarrier done[kStages];     // its gradient may be written
  Mbarrier exchanged[kSets];  // every worker of the cluster has sent what follows
  SoftmaxState states[kSets][kMaxSlices];
  float label_logit[kSets];
  StagedRow rows[kStages];
  GradientTerms terms[kStages];
  PolicyConsts<float> policy;
};
constexpr int kStagesAt = (sizeof(ClusterState) + 127) / 128 * 128;

// Bytes of a stage: a block's columns, plus up to 16 bytes for the row's offset from 16-byte
// alignment.
PPO_HOST_DEVICE int64_t stage_bytes(RowPlan plan, int cluster, int item) {
  return (int64_t(plan.slices / cluster) * plan.length * item + 16 + 127) / 128 * 128;
}

// A block's columns of every row, and the rows of its cluster.
template <class T>
struct Held {
  ClusterState* state;
  unsigned char* stages;
  int bytes, row_slices, slices, first_slice, length, first, end, rows;
  int64_t first_row, row_step;

  PPO_DEVICE explicit Held(const LogitsPpoArgs& a) {
    const int size = int(cluster_size()), rank = int(cluster_rank());
    const RowPlan plan = row_plan(a.rows.vocab);
    state = shared_memory<ClusterState>();
    stages = shared_memory<unsigned char>() + kStagesAt;
    bytes = int(stage_bytes(plan, size, int(sizeof(T))));
    row_slices = plan.slices;
    slices = plan.slices / size;
    first_slice = rank * slices;
    length = plan.length;
    first = first_slice * length;
    end = min(first + slices * length, a.rows.vocab);
    first_row = int64_t(blockIdx.x) / size;
    row_step = int64_t(gridDim.x) / size;
    rows = int((a.n_rows - first_row + row_step - 1) / row_step);
  }
  // Row number of this cluster's n-th row.
  PPO_DEVICE int64_t row(int n) const { return first_row + n * row_step; }
  // Address of column `first` of the cluster's n-th row in its stage, with the same offset from
  // 16-byte alignment as in the logits.
  PPO_DEVICE T* stage(int n, int phase) const {
    return reinterpret_cast<T*>(stages + n % kStages * bytes) + phase;
  }
};

// Whole 16-byte vectors of a row's held columns, and the elements before and after them.
struct RowSpan {
  int head, vectors, tail;
};
template <class T>
PPO_DEVICE RowSpan span_of(int phase, int n) {
  constexpr int per = kPerVector<T>;
  const int head = min(n, (per - phase) % per);
  return {head, (n - head) / per, (n - head) % per};
}

// Calls copy(offset, bytes) for piece k of a span; pieces end at the same places of every stage.
template <class T, class Copy>
PPO_DEVICE void copy_piece(const Held<T>& held, const RowSpan& span, int phase, int k,
                           const Copy& copy) {
  const int begin = (phase + span.head) * int(sizeof(T)), end = begin + span.vectors * 16;
  const int piece = (held.bytes / 16 + kPieces - 1) / kPieces * 16;
  const int from = max(begin, k * piece), to = min(end, (k + 1) * piece);
  if (from < to) copy(from - phase * int(sizeof(T)), unsigned(to - from));
}

// Stores row n's gradient from its stage; called by the moving warp.
template <class T>
PPO_DEVICE void store_row(const Held<T>& held, const StagedRow& row, int n) {
  T* to = in_global(static_cast<T*>(row.to));
  const int count = held.end - held.first;
  const RowSpan span = span_of<T>(row.phase, count);
  const T* stage = held.stage(n, row.phase);
  const int lane = lane_id();
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      copy_piece<T>(held, span, row.phase, k, [&](int at, unsigned bytes) {
        bulk_store(to + held.first + at / int(sizeof(T)), stage + at / int(sizeof(T)), bytes);
      });
      bulk_commit();
    }
  }
  if (lane < span.head) to[held.first + lane] = stage[lane];
  if (lane < span.tail) to[held.end - 1 - lane] = stage[count - 1 - lane];
}

template <int k, class T>
PPO_DEVICE void load_pieces(const Held<T>& held, const RowSpan& span, int phase, const T* from,
                            T* stage, Mbarrier* full) {
  if constexpr (k < kPieces) {
    bulk_wait_read<kPieces - 1 - k>();  // piece k of the gradient that was here
    copy_piece<T>(held, span, phase, k, [&](int at, unsigned bytes) {
      bulk_load(stage + at / int(sizeof(T)), from + held.first + at / int(sizeof(T)), bytes, full);
    });
    load_pieces<k + 1>(held, span, phase, from, stage, full);
  }
}

// Loads row n and its token into their stage; called by the moving warp. Rows that are not live
// are not read.
template <class T>
PPO_DEVICE void load_row(const Held<T>& held, const T* from, const StagedRow& row, int n) {
  const int phase = row.phase, count = held.end - held.first;
  const RowSpan span = row.token.live ? span_of<T>(phase, count) : RowSpan{0, 0, 0};
  T* stage = held.stage(n, phase);
  Mbarrier* full = &held.state->full[n % kStages];
  const int lane = lane_id();
  __syncwarp();  // the ends of what was here have left
  if (lane == 0) {
    held.state->rows[n % kStages] = row;
    mbarrier_arrive_expect(full, unsigned(span.vectors) * 16u);
    load_pieces<0>(held, span, phase, from, stage, full);
  }
  __syncwarp();  // all of it has
  if (lane < span.head) stage[lane] = from[held.first + lane];
  if (lane < span.tail) stage[count - 1 - lane] = from[held.end - 1 - lane];
  __syncwarp();
  if (lane == 0) mbarrier_arrive(full);
}

// Token and gradient's way of a row.
template <class T, class O>
PPO_DEVICE StagedRow staged_row(const LogitsPpoArgs& a, int64_t i) {
  const int phase = phase_of(a.rows.row<T>(i));
  O* to = a.out_row<O>(i);
  return {token_inputs(a, i), to, phase, sizeof(T) == sizeof(O) && phase == phase_of(to)};
}

// The moving warp: rows come and gradients leave through the stages in turn.
template <class T, class O>
PPO_DEVICE void move_rows(const LogitsPpoArgs& a, const Held<T>& held) {
  StagedRow next = staged_row<T, O>(a, held.row(0));
  for (int n = 0; n < held.rows + kStages; ++n) {
    const StagedRow row = next;
    if (n >= kStages) {
      mbarrier_wait(&held.state->done[n % kStages], unsigned(n / kStages - 1));
      const StagedRow before = held.state->rows[n % kStages];
      if (before.in_bulk) store_row(held, before, n - kStages);
    }
    // While the gradient leaves.
    if (n + 1 < held.rows) next = staged_row<T, O>(a, held.row(n + 1));
    if (n < held.rows) load_row(held, a.rows.row<T>(held.row(n)), row, n);
  }
  if (lane_id() == 0) bulk_wait<0>();
}

// Sends the states of this worker's slices of row n and the label's logit to every block of the
// cluster; `turn` counts the rows that are sent.
template <class T>
PPO_DEVICE void send_states(const Held<T>& held, const StagedRow& staged, int n, int turn,
                            int workers) {
  const TokenInputs& t = staged.token;
  const T* row = held.stage(n, staged.phase) - held.first;
  const int lane = lane_id(), set = turn % kSets, size = int(cluster_size());
  for (int s = warp_id(); s < held.slices; s += workers) {
    const int first = held.first + s * held.length;
    const SoftmaxState state =
        slice_state(row, first, min(first + held.length, held.end), t.inv_temperature);
    if (lane < size) {
      *cluster_map(&held.state->states[set][held.first_slice + s], unsigned(lane)) = state;
    }
  }
  const bool mine = t.legal && t.label >= held.first && t.label < held.end;
  if (mine && warp_id() == 0 && lane < size) {
    *cluster_map(&held.state->label_logit[set], unsigned(lane)) = widen(row[t.label]);
  }
  if (lane < size) mbarrier_arrive_at(&held.state->exchanged[set], unsigned(lane));
}

// The warp between the workers and the moving warp: the loss of every row, as soon as all blocks
// have sent its states.
template <class T>
PPO_DEVICE void form_losses(const LogitsPpoArgs& a, const Held<T>& held) {
  int turn = 0;
  for (int n = 0; n < held.rows; ++n) {
    const int stage = n % kStages;
    mbarrier_wait(&held.state->full[stage], unsigned(n / kStages));
    const TokenInputs t = held.state->rows[stage].token;
    Outcome o{};
    GradientTerms terms{};
    terms.zero = true;
    if (t.live) {
      const int set = turn % kSets;
      mbarrier_wait_cluster(&held.state->exchanged[set], unsigned(turn / kSets));
      const float label_logit = t.legal ? held.state->label_logit[set] : 0.f;
      o = outcome(merged(held.state->states[set], held.row_slices), label_logit, t.inv_temperature,
                  t.legal);
      terms = token_gradient(a, held.state->policy, t, o, label_logit);
      ++turn;
    }
    if (lane_id() == 0) {
      held.state->terms[stage] = terms;
      mbarrier_arrive(&held.state->formed[stage]);
      if (held.first == 0) store_outcome(a, held.row(n), t.live, o);
    }
    __syncwarp();
  }
}

// The gradient of row n, by all workers together.
template <class T, class O>
PPO_DEVICE void leave_gradient(const Held<T>& held, const StagedRow& staged, int n, int workers) {
  const int thread = int(threadIdx.x), threads = workers * kWarp;
  T* row = held.stage(n, staged.phase) - held.first;
  O* to = in_global(static_cast<O*>(staged.to));
  const bool in_bulk = staged.in_bulk;
  mbarrier_wait(&held.state->formed[n % kStages], unsigned(n / kStages));
  const GradientTerms t = held.state->terms[n % kStages];
  if (in_bulk) {
    if (t.zero) {
      write_zeros<Memory::shared>(row, held.first, held.end, thread, threads);
    } else {
      write_gradient<Memory::shared, Memory::shared>(row, row, held.first, held.end, t, thread,
                                                     threads, [] {});
    }
    fence_async_proxy();
  } else if (t.zero) {
    write_zeros<Memory::global>(to, held.first, held.end, thread, threads);
  } else {
    write_gradient<Memory::shared, Memory::global>(row, to, held.first, held.end, t, thread,
                                                   threads, [] {});
  }
  __syncwarp();
  if (lane_id() == 0) mbarrier_arrive(&held.state->done[n % kStages]);
}

// The workers: a row's softmax, then the gradient of the row before it.
template <class T, class O>
PPO_DEVICE void work_on_rows(const Held<T>& held, int workers) {
  int turn = 0;  // rows sent
  for (int n = 0; n <= held.rows; ++n) {
    if (n < held.rows) {
      const StagedRow& staged = held.state->rows[n % kStages];
      mbarrier_wait(&held.state->full[n % kStages], unsigned(n / kStages));
      if (staged.token.live) send_states(held, staged, n, turn++, workers);
    }
    if (n > 0) leave_gradient<T, O>(held, held.state->rows[(n - 1) % kStages], n - 1, workers);
  }
}

template <class T, class O>
__global__ void __launch_bounds__(kClusterThreads, 1)
    logits_ppo_cluster(const __grid_constant__ LogitsPpoArgs a) {
  const Held<T> held(a);
  const int workers = int(blockDim.x) / kWarp - 2;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&held.state->full[s], 2);
      mbarrier_init(&held.state->formed[s], 1);
      mbarrier_init(&held.state->done[s], unsigned(workers));
    }
    for (Mbarrier& bar : held.state->exchanged) {
      mbarrier_init(&bar, unsigned(workers) * cluster_size());
    }
    fence_mbarrier_init();
    held.state->policy = resolve(a.policy);
  }
  __syncwarp();
  cluster_sync();
  if (warp_id() < workers) {
    work_on_rows<T, O>(held, workers);
  } else if (warp_id() == workers) {
    form_losses(a, held);
  } else {
    move_rows<T, O>(a, held);
  }
}

}  // namespace ppo::cuda
