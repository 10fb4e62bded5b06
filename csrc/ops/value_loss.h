// value_loss's arguments, read once for every device.
#pragma once

#include "../loss_options.h"

namespace ppo {

// `On` is a device: its Call views tensors and finds the sequences, its Args is what the kernels
// take, and its run(call, args, options) computes.
template <class On>
std::tuple<Tensor, Tensor, Tensor, Tensor> value_loss(Tensor values, OptTensor old_values,
                                                      Tensor returns, OptTensor mask,
                                                      OptTensor cu_seqlens, OptTensor denom,
                                                      std::vector<int64_t> codes,
                                                      std::vector<double> params) {
  constexpr const char* op = "value_loss";
  const ValueOptions options = value_options(codes, params, op);
  typename On::Call call(op, values, mask, cu_seqlens, OptTensor(), options.reduce, denom,
                         codes[ValueCodes::n_grads]);
  typename On::Args a{};
  a.values = call.view(values, "values");
  a.old_values = call.view(old_values, "old_values");
  a.returns = call.view(returns, "returns");
  return On::run(call, a, options);
}

}  // namespace ppo
