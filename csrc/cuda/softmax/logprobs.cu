// token_logprobs on the GPU: log-probability and entropy of one token per row of logits, and the
// gradient with respect to the logits.
#include "../device/launch.h"
#include "logprobs.cuh"

namespace ppo::cuda {
namespace {

// Slices shorter than that are not worth a bulk copy; longer ones do not fit.
constexpr int kLeastStreamed = 1024, kMostStreamed = 16 * 1024;
constexpr size_t kSharedPerBlock = 227 * 1024;

int checked_vocab(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                  const OptTensor& temperature, const char* op) {
  const auto sizes = logits.sizes(), strides = logits.strides(), lead = tokens.sizes();
  const size_t rank = lead.size();
  PPO_CHECK(sizes.size() == rank + 1, op, "logits must be (..., V)");
  for (size_t i = 0; i < rank; ++i) PPO_CHECK(sizes[i] == lead[i], op, "shape of tokens");
  const int64_t vocab = sizes[rank];
  PPO_CHECK(vocab == 1 || (vocab > 1 && strides[rank] == 1), op,
            "the last dimension must be contiguous");
  PPO_CHECK(vocab < (int64_t(1) << 30), op, "V must be less than 2^30");
  const DType index = dtype_of(tokens);
  PPO_CHECK(index == DType::i64 || index == DType::i32, op, "tokens must be int32 or int64");
  PPO_CHECK(!mask || dtype_of(*mask) == DType::byte, op, "mask must be a 1-byte type");
  PPO_CHECK(logits.is_cuda() == tokens.is_cuda(), op, "device of tokens");
  check_beside(tokens, mask, op, "mask");
  check_beside(tokens, temperature, op, "temperature");
  return int(vocab);
}

LogprobsRows rows_of(const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
                     const OptTensor& temperature, const std::vector<int64_t>& codes,
                     const std::vector<double>& params, const char* op) {
  check_options(codes, 1, params, 1, op);
  LogprobsRows r{};
  r.vocab = checked_vocab(logits, tokens, mask, temperature, op);
  r.logits = logits.const_data_ptr();
  r.at = RowIndex(logits.sizes(), logits.strides(), logits.sizes().size() - 1);
  r.tokens = RowValues(tokens);
  r.mask = RowValues(mask);
  r.temperature = RowValues(temperature);
  r.ignore_index = codes[0];
  r.inv_temperature = float(1.0 / params[0]);
  r.count = r.at.rows();
  r.plan = row_plan(r.vocab);
  return r;
}

// How the slices of some rows are spread over the device. Nothing here changes a row's bits.
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
  r.run = 1;
  while (r.run < 8 && r.run < r.plan.slices && tasks >= 16 * r.run * most * warps) r.run *= 2;
  const int64_t wanted = (tasks / r.run + warps - 1) / warps;
  return {streamed,
          {dim3(unsigned(wanted < most ? wanted : most)), dim3(unsigned(warps * kWarp)), shared, 1,
           device.stream()}};
}

// f(rows) for as many rows at a time as there are counters.
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

template <class T>
void backward(const Device& device, const Tensor& like, const LogprobsGradient& all,
              const LogprobsUpstream& up) {
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
    const Spread how = spread(device, a.rows, int(sizeof(T)));
    launch("logprobs_gradient",
           how.streamed ? logprobs_gradient_kernel<T, true> : logprobs_gradient_kernel<T, false>,
           how.launch, a);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_fwd(Tensor logits, Tensor tokens,
                                                        OptTensor mask, OptTensor temperature,
                                                        std::vector<int64_t> codes,
                                                        std::vector<double> params) {
  const Device device(logits);
  const auto fresh = [&] { return empty_on(logits, tokens.sizes(), ScalarType::Float); };
  auto result = std::make_tuple(fresh(), fresh(), fresh(), fresh());
  LogprobsForward a{};
  a.rows = rows_of(logits, tokens, mask, temperature, codes, params, "logprobs_fwd");
  a.logprobs = data<float>(std::get<0>(result));
  a.entropy = data<float>(std::get<1>(result));
  a.row_max = data<float>(std::get<2>(result));
  a.log_sum = data<float>(std::get<3>(result));
  for_dtype(dtype_of(logits), [&](auto item) { forward<decltype(item)>(device, logits, a); });
  return result;
}

// Writes the gradient to `out`, of the logits' shape and dtype or they themselves.
void write(const Tensor& out, const OptTensor& grad_logprobs, const OptTensor& grad_entropy,
           const Tensor& logits, const Tensor& tokens, const OptTensor& mask,
           const OptTensor& temperature, const Tensor& entropy, const Tensor& row_max,
           const Tensor& log_sum, const std::vector<int64_t>& codes,
           const std::vector<double>& params, const char* op) {
  const Device device(logits);
  check_beside(tokens, grad_logprobs, op, "grad_logprobs");
  check_beside(tokens, grad_entropy, op, "grad_entropy");
  check_beside(tokens, entropy, op, "entropy");
  check_beside(tokens, row_max, op, "row_max");
  check_beside(tokens, log_sum, op, "log_sum");
  LogprobsGradient a{};
  a.rows = rows_of(logits, tokens, mask, temperature, codes, params, op);
  a.out = out.mutable_data_ptr();
  a.out_at = RowIndex(out.sizes(), out.strides(), out.sizes().size() - 1);
  const LogprobsUpstream up{RowValues(grad_logprobs), RowValues(grad_entropy), RowValues(entropy),
                            RowValues(row_max), RowValues(log_sum)};
  for_dtype(dtype_of(logits), [&](auto item) { backward<decltype(item)>(device, logits, a, up); });
}

Tensor logprobs_bwd(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits, Tensor tokens,
                    OptTensor mask, OptTensor temperature, Tensor entropy, Tensor row_max,
                    Tensor log_sum, std::vector<int64_t> codes, std::vector<double> params) {
  Tensor out = empty_on(logits, logits.sizes(), logits.scalar_type());
  write(out, grad_logprobs, grad_entropy, logits, tokens, mask, temperature, entropy, row_max,
        log_sum, codes, params, "logprobs_bwd");
  return out;
}

void logprobs_bwd_inplace(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits,
                          Tensor tokens, OptTensor mask, OptTensor temperature, Tensor entropy,
                          Tensor row_max, Tensor log_sum, std::vector<int64_t> codes,
                          std::vector<double> params) {
  write(logits, grad_logprobs, grad_entropy, logits, tokens, mask, temperature, entropy, row_max,
        log_sum, codes, params, "logprobs_bwd_");
}

}  // namespace
}  // namespace ppo::cuda

STABLE_TORCH_LIBRARY_IMPL(ppo_fast, PPO_CUDA_KEY, m) {
  m.impl("logprobs_fwd.cuda", TORCH_BOX(&ppo::cuda::logprobs_fwd));
  m.impl("logprobs_bwd.cuda", TORCH_BOX(&ppo::cuda::logprobs_bwd));
  m.impl("logprobs_bwd_.cuda", TORCH_BOX(&ppo::cuda::logprobs_bwd_inplace));
}
