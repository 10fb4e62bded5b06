// ppo_fast::logprobs_fwd.cuda and logprobs_bwd.cuda: log-probability and entropy of one label per
// row of logits, and the gradient by the logits.
#include "../../ops/logprobs.h"
#include "../device/launch.h"
#include "logprobs.cuh"

namespace ppo::cuda {
namespace {

// Bytes of a slice that is streamed: shorter ones are not worth a bulk copy, longer ones do not
// fit.
constexpr int kLeastStreamed = 1024, kMostStreamed = 16 * 1024;
constexpr size_t kSharedPerBlock = 227 * 1024;
constexpr int kLongestRun = 8;  // slices

// Distribution of rows' slices over the device. Nothing here changes a row's bits.
struct Spread {
  bool streamed;
  LaunchConfig launch;
};

Spread spread(const Device& device, LogprobsRows& r, int item) {
  const int bytes = r.plan.length * item;
  const bool streamed =
      device.capability() >= 90 && bytes >= kLeastStreamed && bytes <= kMostStreamed;
  r.stage_bytes = bytes + 16;
  int warps = kEmulated ? 2 : kLogprobsThreads / kWarp;
  while (streamed && ring_bytes(warps, r.stage_bytes) > kSharedPerBlock) warps /= 2;
  const size_t shared = streamed ? ring_bytes(warps, r.stage_bytes) : 0;
  // Every block keeps 1 KB for itself.
  const int fit = int((kSharedPerBlock + 1024) / (shared + 1024));
  const int64_t most =
      int64_t(device.multiprocessors()) * (fit < kLogprobsBlocks ? fit : kLogprobsBlocks);
  const int64_t tasks = r.count * r.plan.slices;
  // Slices of the busiest warp. Longer runs cost less, but leave more for the last turn.
  const auto busiest = [&](int run) {
    const int64_t each = run * most * warps;
    return (tasks + each - 1) / each * run;
  };
  r.run = 1;
  while (r.run < kLongestRun && r.run < r.plan.slices &&
         16 * busiest(2 * r.run) <= 17 * busiest(1)) {
    r.run *= 2;
  }
  const int64_t wanted = (tasks / r.run + warps - 1) / warps;
  return {streamed,
          {dim3(unsigned(wanted < most ? wanted : most)), dim3(unsigned(warps * kWarp)), shared, 1,
           device.stream()}};
}

// Calls f(rows) for as many rows at a time as there are counters.
template <class Fn>
void for_chunks(const LogprobsRows& all, const Fn& f) {
  const int64_t most = all.plan.slices > 1 ? Device::kMaxCounters : all.count;
  for (int64_t first = 0; first < all.count; first += most) {
    LogprobsRows r = all;
    r.first = first;
    r.count = all.count - first < most ? all.count - first : most;
    f(r);
  }
}

template <class T>
void forward(const Device& device, const Tensor& like, const LogprobsForward& all) {
  for_chunks(all.rows, [&](const LogprobsRows& r) {
    LogprobsForward a = all;
    a.rows = r;
    const Spread how = spread(device, a.rows, int(sizeof(T)));
    const int64_t floats = r.plan.slices > 1 ? r.count * r.plan.slices * 3 : 0;
    const Tensor states = empty_on(like, Sizes(&floats, 1), ScalarType::Float);
    a.states = static_cast<SoftmaxState*>(states.mutable_data_ptr());
    a.done = r.plan.slices > 1 ? device.counters(unsigned(r.count)) : nullptr;
    launch("logprobs_forward",
           how.streamed ? logprobs_forward_kernel<T, true> : logprobs_forward_kernel<T, false>,
           how.launch, a);
  });
}

// Calls write(gradient) for as many rows at a time, whose terms are on their way.
template <class T, class Write>
void with_terms(const Device& device, const Tensor& like, const LogprobsGradient& all,
                const LogprobsUpstream& up, const Write& write) {
  for_chunks(all.rows, [&](const LogprobsRows& r) {
    LogprobsGradient a = all;
    a.rows = r;
    const int64_t bytes = r.count * int64_t(sizeof(GradientTerms));
    const Tensor terms = empty_on(like, Sizes(&bytes, 1), ScalarType::Byte);
    auto* to = static_cast<GradientTerms*>(terms.mutable_data_ptr());
    a.terms = to;
    const unsigned threads = kEmulated ? 32 : 128;
    const LaunchConfig per_row{dim3(unsigned((r.count + threads - 1) / threads)), dim3(threads), 0,
                               1, device.stream()};
    launch("logprobs_terms", logprobs_terms_kernel<T>, per_row, r, up, to);
    write(a);
  });
}

template <class T>
void backward(const Device& device, const Tensor& like, const LogprobsGradient& all,
              const LogprobsUpstream& up) {
  with_terms<T>(device, like, all, up, [&](LogprobsGradient& a) {
    const Spread how = spread(device, a.rows, int(sizeof(T)));
    launch("logprobs_gradient",
           how.streamed ? logprobs_gradient_kernel<T, true> : logprobs_gradient_kernel<T, false>,
           how.launch, a);
  });
}

void backward_bf16(const Device& device, const Tensor& like, const LogprobsGradient& all,
                   const LogprobsUpstream& up) {
  with_terms<float>(device, like, all, up, [&](const LogprobsGradient& a) {
    const int64_t most = int64_t(device.multiprocessors()) * kLogprobsBlocks;
    launch("logprobs_bf16_gradient", logprobs_bf16_gradient_kernel,
           {dim3(unsigned(a.rows.count < most ? a.rows.count : most)),
            dim3(kEmulated ? 64 : kLogprobsThreads), 0, 1, device.stream()},
           a);
  });
}

struct LogprobsOnCuda {
  static LogprobsRows rows(const char* op, const Tensor& logits, const Tensor& tokens,
                           const OptTensor& mask, const OptTensor& temperature,
                           int64_t ignore_index, double number_temperature) {
    LogprobsRows r{
        logits_rows(op, logits, tokens, mask, temperature, ignore_index, number_temperature)};
    r.count = r.at.rows();
    r.plan = row_plan(r.vocab);
    return r;
  }
  static RowValues values(const char* op, const Tensor& tokens, const OptTensor& x,
                          const char* name) {
    return row_values(op, tokens, x, name);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits,
                                                            const Tensor& tokens,
                                                            const LogprobsRows& rows) {
    const Device device(logits);
    const auto fresh = [&] { return empty_on(logits, tokens.sizes(), ScalarType::Float); };
    auto result = std::make_tuple(fresh(), fresh(), fresh(), fresh());
    LogprobsForward a{};
    a.rows = rows;
    a.logprobs = data<float>(std::get<0>(result));
    a.entropy = data<float>(std::get<1>(result));
    a.row_max = data<float>(std::get<2>(result));
    a.log_sum = data<float>(std::get<3>(result));
    for_dtype(dtype_of(logits),
              [&](auto item) { cuda::forward<decltype(item)>(device, logits, a); });
    return result;
  }

  static Tensor like(const Tensor& logits) {
    return empty_on(logits, logits.sizes(), logits.scalar_type());
  }
  static void backward(const Tensor& logits, const LogprobsRows& rows, const LogprobsUpstream& up,
                       const Tensor& out) {
    const Device device(logits);
    LogprobsGradient a{};
    a.rows = rows;
    a.out = out.mutable_data_ptr();
    a.out_at = RowIndex(out.sizes(), out.strides(), out.sizes().size() - 1);
    for_dtype(dtype_of(logits),
              [&](auto item) { cuda::backward<decltype(item)>(device, logits, a, up); });
  }
};

// bf16 gradient over fp32 logits: each row's gradient starts where the row does.
struct Bf16LogprobsOnCuda : LogprobsOnCuda {
  static void backward(const Tensor& logits, const LogprobsRows& rows, const LogprobsUpstream& up,
                       const Tensor&) {
    PPO_CHECK(dtype_of(logits) == DType::f32, "logprobs_bwd_bf16_", "logits must be float32");
    LogprobsGradient a{};
    a.rows = rows;
    a.out = logits.mutable_data_ptr();
    a.out_at = bf16_rows(logits);
    cuda::backward_bf16(Device(logits), logits, a, up);
  }
};

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("logprobs_fwd.cuda", TORCH_BOX(&ppo::logprobs_fwd<ppo::cuda::LogprobsOnCuda>));
  m.impl("logprobs_bwd.cuda", TORCH_BOX(&ppo::logprobs_bwd<ppo::cuda::LogprobsOnCuda>));
  m.impl("logprobs_bwd_.cuda", TORCH_BOX(&ppo::logprobs_bwd_inplace<ppo::cuda::LogprobsOnCuda>));
  m.impl("logprobs_bwd_bf16_.cuda",
         TORCH_BOX(&ppo::logprobs_bwd_inplace<ppo::cuda::Bf16LogprobsOnCuda>));
}
