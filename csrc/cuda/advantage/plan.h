// Host side of the advantage kernels: layouts, the choice of kernel, launches.
#pragma once

#include "../device/launch.h"
#include "blocks.cuh"

namespace ppo::cuda {

// A call's tensors as steps of sequences: (B, T), (T, B) where time-major, (N,) where packed.
class Layout {
 public:
  Layout(const char* op, const Tensor& main, const OptTensor& cu_seqlens, bool time_major)
      : op_(op),
        main_(main),
        cu_seqlens_(cu_seqlens),
        time_major_(time_major && main.dim() == 2) {}

  const char* op() const { return op_; }
  const Tensor& main() const { return main_; }
  bool packed() const { return cu_seqlens_.has_value(); }
  bool time_major() const { return time_major_; }
  SequenceLayout sequences() const {
    const View v = strided_view(main_);
    if (time_major_) return {nullptr, false, 0, v.cols, v.rows, 0};
    if (!cu_seqlens_) return {nullptr, false, 0, v.rows, v.cols, 0};
    const View cu = strided_view(*cu_seqlens_);
    return {cu.data, cu.dtype == DType::i64, cu.col_stride, cu.cols - 1, v.cols, 0};
  }

  // View of a tensor of the main tensor's shape.
  Steps view(const Tensor& x, const char* name) const {
    check_beside(main_, x, op_, name);
    return steps(x);
  }
  Steps view(const OptTensor& x, const char* name) const { return x ? view(*x, name) : Steps{}; }
  // View of a number per sequence, repeated for every step.
  Steps per_sequence(const OptTensor& x, const char* name) const {
    if (!x) return {};
    const View v = strided_view(*x);
    STD_TORCH_CHECK(v.rows == 1 && v.cols == sequences().count, "ppo_fast::", op_, ": shape of ",
                    name);
    return {v.data, v.dtype, v.col_stride, 0};
  }
  // New output of the main tensor's shape; `view` becomes its view.
  Tensor output(Output& view) const {
    Tensor out = empty_on(main_, main_.sizes(), ScalarType::Float);
    const Steps s = steps(out);
    view = {data<float>(out), s.seq, s.step};
    return out;
  }

 private:
  Steps steps(const Tensor& x) const {
    const View v = strided_view(x);
    const int64_t seq = time_major_ ? v.col_stride : v.row_stride;
    return {v.data, v.dtype, packed() ? 0 : seq, time_major_ ? v.row_stride : v.col_stride};
  }

  const char* op_;
  const Tensor main_;
  const OptTensor cu_seqlens_;
  bool time_major_;
};

enum class Regime { slabs, warps, blocks, chunks };

// Rules for the choice of kernel; the first that fits decides. Untuned: derived from the
// multiprocessors of a large GPU (132) and the steps that a block takes at once.
struct Rule {
  Regime regime;
  bool time_major;                   // only there
  int64_t average, longest, fewest;  // steps of a sequence at most, sequences at least
};
constexpr int64_t kAny = INT64_MAX;
constexpr Rule kRules[] = {
    {Regime::slabs, true, kAny, kTileSteps, 0},  {Regime::slabs, true, kAny, kAny, 1024},
    {Regime::warps, false, kTileSteps, kAny, 0}, {Regime::warps, false, kChunkSteps, kAny, 2048},
    {Regime::blocks, false, kAny, kAny, 132},    {Regime::blocks, false, kAny, 8 * kChunkSteps, 0},
    {Regime::chunks, false, kAny, kAny, 0},
};

inline Regime regime_of(const SequenceLayout& s, const Layout& layout) {
  // For packed sequences only the sum of their lengths is known here.
  const int64_t average = layout.packed() ? s.length / s.count : s.length;
  for (const Rule& rule : kRules) {
    if ((layout.time_major() || !rule.time_major) && average <= rule.average &&
        s.length <= rule.longest && s.count >= rule.fewest) {
      return rule.regime;
    }
  }
  return Regime::chunks;
}

// Number of lanes that cover `steps`, `each` steps per lane: a power of two, at most `most`.
inline int cover(int64_t steps, int64_t each, int most) {
  int lanes = 1;
  while (lanes < most && lanes * each < steps) lanes *= 2;
  return lanes;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Workspace of a launch, which must live until the launch is enqueued.
inline Tensor workspace_for(AdvantageArgs& a, const Tensor& main, int64_t blocks, int64_t chunks,
                            const Device& device) {
  const int64_t bytes = blocks * int64_t(sizeof(Moments)) +
                        chunks * int64_t(sizeof(AffineMap<true>) + sizeof(ChunkLive));
  Tensor workspace = empty_on(main, {bytes}, ScalarType::Byte);
  a.parts = reinterpret_cast<Moments*>(data<uint8_t>(workspace));
  a.maps = reinterpret_cast<AffineMap<true>*>(a.parts + blocks);
  a.live = reinterpret_cast<ChunkLive*>(static_cast<AffineMap<true>*>(a.maps) + chunks);
  a.counter = device.counters(1);
  return workspace;
}

template <class Source>
void run_warps(typename Source::Args& args, const Layout& layout, const Device& device) {
  AdvantageArgs& a = args.base;
  a.lanes = layout.packed() ? kWarp : cover(a.seqs.length, kGroupSteps, kWarp);
  const int64_t blocks = ceil_div(a.seqs.count, kTiles * (kWarp / a.lanes));
  const Tensor workspace = workspace_for(a, layout.main(), blocks, 0, device);
  launch(layout.op(), advantage_warps_kernel<Source>,
         {dim3(unsigned(blocks)), dim3(kRowThreads), kTiles * sizeof(ShiftedSums), 1,
          device.stream()},
         args);
}

// Launches one walk along every sequence, or the passes over chunks.
template <class Source>
void run_blocks(typename Source::Args& args, const Layout& layout, bool whole,
                const Device& device) {
  const char* const op = layout.op();
  AdvantageArgs& a = args.base;
  const SequenceLayout& s = a.seqs;
  a.chunks_each = layout.packed() ? 0 : ceil_div(s.length, kChunkSteps);
  const int64_t chunks =
      layout.packed() ? s.length / kChunkSteps + s.count : s.count * a.chunks_each;
  const int64_t blocks = whole ? s.count : chunks;
  const Tensor workspace = workspace_for(a, layout.main(), blocks, whole ? 0 : chunks, device);
  const LaunchConfig config{dim3(unsigned(blocks)), dim3(kRowThreads),
                            sizeof(BlockShared<Source::extras>), 1, device.stream()};
  if (whole) return launch(op, advantage_blocks_kernel<Source, Pass::whole>, config, args);
  a.scouted = a.mask.data && (a.carry || Source::needs_last);
  if (a.scouted) launch(op, chunk_live_kernel, config, a);
  a.maps_only = true;
  launch(op, advantage_blocks_kernel<Source, Pass::maps>, config, args);
  a.maps_only = false;
  launch(op, advantage_blocks_kernel<Source, Pass::apply>, config, args);
}

template <class Source>
void run(typename Source::Args& args, const Layout& layout, Regime regime, const Device& device) {
  if (regime == Regime::warps) return run_warps<Source>(args, layout, device);
  run_blocks<Source>(args, layout, regime == Regime::blocks, device);
}

// Results without sequences: zero moments, or NaN if there are slots outside of all sequences.
template <class... Out>
void without_sequences(const Tensor& main, Out... out) {
  const double value = main.numel() == 0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
  (torch::stable::fill_(out, value), ...);
}

}  // namespace ppo::cuda
