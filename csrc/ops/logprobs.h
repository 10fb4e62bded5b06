// The arguments of logprobs_fwd and logprobs_bwd, read once for every device.
#pragma once

#include "../tensor/views.h"

namespace ppo {

// `On` is a device: its rows(...) and values(...) view the logits and the tokens' tensors.
template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_fwd(Tensor logits, Tensor tokens,
                                                        OptTensor mask,
                                                        OptTensor temperature_tensor,
                                                        double temperature, int64_t ignore_index) {
  return On::forward(logits, tokens,
                     On::rows("logprobs_fwd", logits, tokens, mask, temperature_tensor,
                              ignore_index, temperature));
}

// The gradient into `out`: a tensor like the logits, or they themselves.
template <class On>
void logprobs_gradient(const char* op, const Tensor& out, const OptTensor& grad_logprobs,
                       const OptTensor& grad_entropy, const Tensor& logits, const Tensor& tokens,
                       const OptTensor& mask, const OptTensor& temperature_tensor,
                       const Tensor& entropy, const Tensor& row_max, const Tensor& log_sum,
                       double temperature, int64_t ignore_index) {
  const auto rows =
      On::rows(op, logits, tokens, mask, temperature_tensor, ignore_index, temperature);
  On::backward(
      logits, rows,
      {On::values(op, tokens, grad_logprobs, "grad_logprobs"),
       On::values(op, tokens, grad_entropy, "grad_entropy"),
       On::values(op, tokens, entropy, "entropy"), On::values(op, tokens, row_max, "row_max"),
       On::values(op, tokens, log_sum, "log_sum")},
      out);
}

template <class On>
Tensor logprobs_bwd(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits, Tensor tokens,
                    OptTensor mask, OptTensor temperature_tensor, Tensor entropy, Tensor row_max,
                    Tensor log_sum, double temperature, int64_t ignore_index) {
  Tensor out = On::like(logits);
  logprobs_gradient<On>("logprobs_bwd", out, grad_logprobs, grad_entropy, logits, tokens, mask,
                        temperature_tensor, entropy, row_max, log_sum, temperature, ignore_index);
  return out;
}

template <class On>
void logprobs_bwd_inplace(OptTensor grad_logprobs, OptTensor grad_entropy, Tensor logits,
                          Tensor tokens, OptTensor mask, OptTensor temperature_tensor,
                          Tensor entropy, Tensor row_max, Tensor log_sum, double temperature,
                          int64_t ignore_index) {
  logprobs_gradient<On>("logprobs_bwd_", logits, grad_logprobs, grad_entropy, logits, tokens, mask,
                        temperature_tensor, entropy, row_max, log_sum, temperature, ignore_index);
}

}  // namespace ppo
