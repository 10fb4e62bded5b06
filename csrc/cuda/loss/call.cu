// LossCall: the arguments that losses share, and the launch for their sequences' terms.
#include "call.h"

namespace ppo::cuda {

constexpr int64_t kTermFloats = sizeof(SequenceTerm) / sizeof(float);
static_assert(kTermFloats * sizeof(float) == sizeof(SequenceTerm), "terms are stored as floats");

LossCall::LossCall(const char* op, const Tensor& main, const OptTensor& mask,
                   const OptTensor& cu_seqlens, const OptTensor& sequence_weights,
                   const ReduceOptions& reduce, const OptTensor& denom, int64_t n_grads)
    : op_(op),
      device_(main),
      shape_(token_shape(main, op)),
      main_(main),
      weights_(sequence_weights),
      out_(main, n_grads) {
  blocks_ = unsigned(std::clamp<int64_t>(shape_.tiles(), 1, kLossBlocks));
  args_.map = {nullptr, DType::i64, 0, shape_.rows, shape_.cols, shape_.total()};
  if (cu_seqlens && cu_seqlens->numel() > 1) {
    args_.map.offsets = cu_seqlens->const_data_ptr();
    args_.map.dtype = dtype_of(*cu_seqlens);
    args_.map.stride = cu_seqlens->strides()[0];
    args_.map.count = cu_seqlens->numel() - 1;
  }
  const int64_t sequences = cu_seqlens ? cu_seqlens->numel() - 1 : shape_.rows;
  PPO_CHECK(!sequence_weights || sequence_weights->numel() == sequences, op,
            "shape of sequence_weights");
  args_.mask = view(mask, "mask");
  args_.tiles = shape_.tiles();
  args_.reduction = reduce.reduction;
  args_.denom = scalar_of(denom, reduce.denom);
  args_.counter = device_.counters(1);
  args_.loss = data<float>(out_.loss);
  args_.scale = data<float>(out_.scale);
  args_.stats = data<double>(out_.stats);
  // The second gradient begins where the first one ends.
  args_.wide_grads = out_.grads.sizes()[0] < 2 || shape_.total() % kItems == 0;
}

LossArgs LossCall::args(std::initializer_list<Column> columns, int sums) {
  parts_ = empty_on(main_, {int64_t(blocks_), sums + 2}, ScalarType::Double);
  args_.parts = parts_->mutable_data_ptr();
  args_.rows = args_.mask.skip != 0 || (args_.terms && !args_.map.offsets);
  for (const Column& c : columns) args_.rows |= c.skip != 0;
  return args_;
}

void LossCall::find_terms(bool ratios, const Column& now, const Column& old, float d_min,
                          float d_max) {
  const bool means = args_.reduction == Reduction::seq_mean_token_mean;
  const SequenceMap& map = args_.map;
  if ((!means && !ratios && !weights_) || map.count == 0 || map.tokens == 0) return;
  terms_ = empty_on(main_, {map.count, kTermFloats}, ScalarType::Float);
  SequenceTermsArgs a{};
  a.map = map;
  a.mask = args_.mask;
  if (ratios && old.data) a.now = now, a.old = old;
  a.weights = weights_;
  a.means = means;
  a.d_min = d_min;
  a.d_max = d_max;
  a.terms = static_cast<SequenceTerm*>(terms_->mutable_data_ptr());
  constexpr int64_t kWarps = kTokenThreads / kWarp;
  const bool shared = map.tokens / map.count <= kSequenceSteps * kWarp * 4;
  a.lanes = shared ? kWarp : kTokenThreads;
  const int64_t blocks = shared ? (map.count + kWarps - 1) / kWarps : map.count;
  launch("sequence_terms_kernel", sequence_terms_kernel<>,
         {dim3(unsigned(blocks)), dim3(kTokenThreads), 2 * kWarps * sizeof(double), 1,
          device_.stream()},
         a);
  args_.terms = a.terms;
}

}  // namespace ppo::cuda
