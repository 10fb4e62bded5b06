// ppo_fast::logits_ppo_loss.cuda: the softmax of every row, its token's policy loss and the
// gradient, with one read of the logits where a cluster's shared memory holds a row.
#include <map>
#include <mutex>
#include <tuple>

#include "../../ops/logits_ppo_loss.h"
#include "../device/launch.h"
#include "logits_ppo_loss.cuh"

namespace ppo::cuda {
namespace {

// Warps per block. A row's bits do not depend on them.
constexpr int kReaders = kEmulated ? 2 : kTwoReadThreads / kWarp;
constexpr int kWorkers = kEmulated ? 2 : kMaxWorkers;
// Most shared memory of a block on sm_90 and sm_100.
constexpr int kSharedBytes = 227 * 1024;
// L2 share of a multiprocessor for rows between their two reads, on average half read or half
// written (A100: 40 MB for 108 multiprocessors), and most blocks per multiprocessor.
constexpr int64_t kL2Bytes = 700 * 1024;
constexpr int64_t kBlocks = 8;
constexpr char kOp[] = "logits_ppo_loss";

struct ClusterPlan {
  int size, workers;  // blocks, and warps of each that compute; size 0: a row does not fit
  size_t shared_bytes;
};

// The smallest cluster that holds kStages rows.
ClusterPlan cluster_plan(const RowPlan& plan, int item) {
  for (int size = 1; size <= kMaxCluster && size <= plan.slices; size *= 2) {
    const int64_t bytes = kStagesAt + kStages * stage_bytes(plan, size, item);
    if (bytes <= kSharedBytes) {
      return {size, std::min(kWorkers, plan.slices / size), size_t(bytes)};
    }
  }
  return {0, 0, 0};
}

// Number of resident clusters, cached because the runtime's answer is slow.
template <class T, class O>
int64_t resident_clusters(const Device& device, const ClusterPlan& c) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& n = known[{device.index(), c.size, c.workers, c.shared_bytes}];
  if (n == 0) {
    n = device.clusters(logits_ppo_cluster<T, O>, unsigned(c.workers + 2) * kWarp, c.shared_bytes,
                        unsigned(c.size));
  }
  STD_TORCH_CHECK(n > 0, "ppo_fast::logits_ppo_loss: no cluster of ", c.size, " blocks fits");
  return n;
}

template <class T, class O>
void launch_cluster(const Device& device, const LogitsPpoArgs& a, const ClusterPlan& c) {
  const int64_t clusters = std::min(a.n_rows, resident_clusters<T, O>(device, c));
  launch("logits_ppo_cluster", logits_ppo_cluster<T, O>,
         {dim3(unsigned(clusters * c.size)), dim3(unsigned(c.workers + 2) * kWarp), c.shared_bytes,
          unsigned(c.size), device.stream()},
         a);
}

template <class T, class O>
void launch_two_reads(const Device& device, const LogitsPpoArgs& a, const RowPlan& plan) {
  const bool alone = plan.slices == 1;  // a row is a warp's
  const int64_t fit = kL2Bytes / (int64_t(std::max(a.rows.vocab, 1)) * int64_t(sizeof(T)));
  const int64_t most =
      device.multiprocessors() * (alone ? kBlocks : std::max<int64_t>(1, std::min(kBlocks, fit)));
  const int64_t blocks = alone ? (a.n_rows + kReaders - 1) / kReaders : a.n_rows;
  launch("logits_ppo_two_reads", logits_ppo_two_reads<T, O>,
         {dim3(unsigned(std::min(blocks, most))), dim3(kReaders * kWarp),
          sizeof(SoftmaxState) * size_t(alone ? kReaders : plan.slices), 1, device.stream()},
         a);
}

template <class T, class O>
void launch_rows(const Device& device, const LogitsPpoArgs& a) {
  if (a.n_rows == 0) return;
  const RowPlan plan = row_plan(a.rows.vocab);
  const ClusterPlan cluster = cluster_plan(plan, int(sizeof(T)));
  if (device.capability() >= 90 && plan.slices > 1 && cluster.size > 0) {
    launch_cluster<T, O>(device, a, cluster);
  } else {
    launch_two_reads<T, O>(device, a, plan);
  }
}

void launch_any(const Device& device, const LogitsPpoArgs& a, DType from, DType to) {
  if (from == DType::bf16 && to == from) return launch_rows<bf16, bf16>(device, a);
  if (from == DType::f16 && to == from) return launch_rows<fp16, fp16>(device, a);
  if (from == DType::f32 && to == from) return launch_rows<float, float>(device, a);
  if (from == DType::f32 && to == DType::bf16) return launch_rows<float, bf16>(device, a);
  PPO_CHECK(false, kOp, "logits must be float32, bfloat16 or float16");
}

// Target of the gradient: rows of V, each contiguous.
struct Target {
  void* data;
  DType dtype;
  RowIndex rows;
};
Target target_of(const Tensor& out) {
  const auto sizes = out.sizes(), strides = out.strides();
  return {out.mutable_data_ptr(), dtype_of(out), RowIndex(sizes, strides, sizes.size() - 1)};
}

struct LogitsPpoOnCuda {
  using Args = LogitsPpoArgs;

  static LogitsRows rows(const char* op, const Tensor& logits, const Tensor& tokens,
                         const OptTensor& mask, const OptTensor& temperature, int64_t ignore_index,
                         double number_temperature) {
    return logits_rows(op, logits, tokens, mask, temperature, ignore_index, number_temperature);
  }
  static RowValues values(const char* op, const Tensor& tokens, const OptTensor& x,
                          const char* name) {
    return row_values(op, tokens, x, name);
  }
  static PolicyArg policy(const PolicyOptions& options, const OptTensor& moments,
                          const OptTensor& entropy_coef, const OptTensor& kl_coef) {
    return policy_arg(options, moments, entropy_coef, kl_coef);
  }
  // Writes the gradient to the target; returns log-probabilities and entropies.
  static std::tuple<Tensor, Tensor> into(const Target& to, const Tensor& logits,
                                         const Tensor& tokens, LogitsPpoArgs& a) {
    const Device device(logits);
    Tensor logprobs = empty_on(logits, tokens.sizes(), ScalarType::Float);
    Tensor entropy = empty_on(logits, tokens.sizes(), ScalarType::Float);
    a.n_rows = a.rows.at.rows();
    a.out = to.data;
    a.out_at = to.rows;
    a.logprobs = data<float>(logprobs);
    a.entropy = data<float>(entropy);
    launch_any(device, a, dtype_of(logits), to.dtype);
    return {logprobs, entropy};
  }
};

struct OutOfPlace : LogitsPpoOnCuda {
  using Result = std::tuple<Tensor, Tensor, Tensor>;
  static Result run(const Tensor& logits, const Tensor& tokens, LogitsPpoArgs& a) {
    Tensor out = empty_on(logits, logits.sizes(), logits.scalar_type());
    auto [logprobs, entropy] = into(target_of(out), logits, tokens, a);
    return {logprobs, entropy, out};
  }
};

struct InPlace : LogitsPpoOnCuda {
  using Result = std::tuple<Tensor, Tensor>;
  static Result run(const Tensor& logits, const Tensor& tokens, LogitsPpoArgs& a) {
    return into(target_of(logits), logits, tokens, a);
  }
};

// bf16 gradient over fp32 logits: each row's gradient starts where the row does.
struct Bf16InPlace : LogitsPpoOnCuda {
  using Result = std::tuple<Tensor, Tensor>;
  static Result run(const Tensor& logits, const Tensor& tokens, LogitsPpoArgs& a) {
    PPO_CHECK(dtype_of(logits) == DType::f32, kOp, "logits must be float32");
    return into({logits.mutable_data_ptr(), DType::bf16, bf16_rows(logits)}, logits, tokens, a);
  }
};

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("logits_ppo_loss.cuda", TORCH_BOX(&ppo::logits_ppo_loss<ppo::cuda::OutOfPlace>));
  m.impl("logits_ppo_loss_.cuda", TORCH_BOX(&ppo::logits_ppo_loss<ppo::cuda::InPlace>));
  m.impl("logits_ppo_loss_bf16_.cuda", TORCH_BOX(&ppo::logits_ppo_loss<ppo::cuda::Bf16InPlace>));
}
