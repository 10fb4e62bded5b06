"""Seeded mistakes: one textual change each, and the tests that must notice it.

The reference is left alone: it is what the others are held to. A change names a text that occurs
once in its file. `select` is pytest's -k, which keeps to the backend that was changed.
"""

from __future__ import annotations

from mutant import Mutant
from mutant_context import CONTEXT
from mutant_distill import DISTILL
from mutant_divergence import DIVERGENCE, DIVERGENCE_CPU, DIVERGENCE_TRITON
from mutant_head import HEAD, HEAD_CPU
from mutant_inputs import INPUTS
from mutant_models import MODELS
from mutant_numbers import NUMBERS, NUMBERS_CPU
from mutant_report import REPORT
from mutant_rollout import ROLLOUT, ROLLOUT_CPU
from mutant_runs import RUNS
from mutant_stats import STATS, STATS_CPU, STATS_TRITON
from mutant_support import SUPPORT, SUPPORT_CPU
from mutant_surrogates import SURROGATES
from mutant_trainers import TRAINERS
from mutant_truncation import TRUNCATION
from mutant_weights import WEIGHTS, WEIGHTS_CPU

__all__ = ["MUTANTS", "Mutant"]

TRITON = (
    Mutant(
        "one live step makes a tile of advantages whole",
        "kernels/scan.py",
        "if tl.min(live_next.to(tl.int32), axis=0) != 0",
        "if tl.max(live_next.to(tl.int32), axis=0) != 0",
        "gae",
        "triton",
    ),
    Mutant(
        "the done flag of the step before",
        "kernels/gae.py",
        "ends = load_step_flag(terminated, span, step, live)",
        "ends = load_step_flag(terminated, span, tl.maximum(step - 1, 0), live)",
        "gae",
        "triton",
    ),
    Mutant(
        "a bootstrap after termination",
        "kernels/gae.py",
        "delta = tl.where(ends, reward, delta)",
        "delta = tl.where(ends, delta, delta)",
        "gae",
        "triton",
    ),
    Mutant(
        "masked rewards are read",
        "kernels/gae.py",
        "load_step(rewards, span, step, live, 0.0)",
        "load_step(rewards, span, step, inside, 0.0)",
        "masking",
        "triton",
    ),
    Mutant(
        "the state of the chunk behind is lost",
        "kernels/scan.py",
        "after = tl.fma(state, a_end, b_end)",
        "after = b_end",
        "gae",
        "triton",
    ),
    Mutant(
        "a factor of one is multiplied by",
        "kernels/scale.py",
        "tasks = tl.where(factor == 1.0, 0, tasks)",
        "tasks = tl.where(factor == 0.0, 0, tasks)",
        "scale",
        "triton",
    ),
    Mutant(
        "the clipped term has the wrong sign",
        "kernels/token_loss.py",
        "clipped = -adv * clamp(ratio",
        "clipped = adv * clamp(ratio",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "no gradient at a tie of the clip",
        "kernels/token_loss.py",
        "larger = clipped > plain",
        "larger = clipped >= plain",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "the dual clip on the wrong side",
        "kernels/token_loss.py",
        "capped = (adv < 0) & (term > cap)",
        "capped = (adv > 0) & (term > cap)",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "the advantages' moments are biased",
        "kernels/token_loss.py",
        "tl.maximum(n - 1, 1.0)",
        "tl.maximum(n, 1.0)",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "k3 of the other direction",
        "kernels/token_loss.py",
        "0.5 * x * x, expm1_minus(-x))",
        "0.5 * x * x, expm1_minus(x))",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "the KL's slope has the wrong sign",
        "kernels/token_loss.py",
        "x, -expm1(-x))",
        "x, expm1(-x))",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "no maximum is subtracted",
        "kernels/softmax.py",
        "shift = tl.maximum(lane_max * scale, -HUGE)",
        "shift = tl.zeros([LANES], tl.float32)",
        "logprobs",
        "triton",
    ),
    Mutant(
        "the entropy's gradient is missing",
        "kernels/softmax.py",
        "tl.exp2(log_p * LOG2E) * tl.fma(slope, tl.maximum(log_p, ZERO_EXP), offset)",
        "tl.exp2(log_p * LOG2E) * offset",
        "logprobs",
        "triton",
    ),
    Mutant(
        "ignore_index is not honoured",
        "kernels/softmax.py",
        "live = inside & (label != ignore_index)",
        "live = inside",
        "logprobs",
        "triton",
    ),
    Mutant(
        "no temperature in the label's gradient",
        "kernels/softmax.py",
        "at_label + grad_logprob * inv_temperature",
        "at_label + grad_logprob",
        "logprobs",
        "triton",
    ),
    Mutant(
        "a packed boundary one token late",
        "kernels/loss_tiles.py",
        "tl.where(starts <= col,",
        "tl.where(starts < col,",
        "ppo_loss",
        "triton",
    ),
    Mutant(
        "sequences counted where tokens are",
        "kernels/loss_tiles.py",
        "reduction == REDUCTION_TOKEN_MEAN, n_tokens, n_seqs)",
        "reduction == REDUCTION_TOKEN_MEAN, n_seqs, n_seqs)",
        "value_loss",
        "triton",
    ),
    Mutant(
        "whitening is biased",
        "kernels/whiten.py",
        "tl.where(unbiased != 0, 1.0, 0.0)",
        "tl.where(unbiased != 0, 0.0, 0.0)",
        "whiten",
        "triton",
    ),
    Mutant(
        "the value clip binds on one side",
        "kernels/value_loss.py",
        "(value < old - clip) | (value > old + clip)",
        "(value < old - clip)",
        "value_loss",
        "triton",
    ),
)

CPU = (
    Mutant(
        "the chunk behind is not carried",
        "csrc/cpu/advantage/sweep.h",
        "carried = vfma(by.first, carried, first);",
        "carried = first;",
        "gae",
        "cpu",
    ),
    Mutant(
        "truncation is termination",
        "csrc/cpu/advantage/gae_simd.h",
        "if (args.truncated.data) cut = ",
        "if (args.truncated.data) delta = select(nonzero(load_live(args.truncated, at, live,"
        " zero)), reward, delta), cut = ",
        "gae",
        "cpu",
    ),
    Mutant(
        "the score one step early",
        "csrc/cpu/advantage/rlhf_advantages_simd.h",
        "return i > 0 ? first + i - 1 : -1;",
        "return i > 0 ? first + i - 1 - (i > 1) : -1;",
        "rlhf_advantages",
        "cpu",
    ),
    Mutant(
        "what follows a row is summed with it",
        "csrc/cpu/softmax/logprobs_simd.h",
        "const auto fill = -__builtin_inff();\n  Sums<T> a",
        "const float fill = 0;\n  Sums<T> a",
        "logprobs",
        "cpu",
    ),
    Mutant(
        "no temperature in the label's logit",
        "csrc/cpu/softmax/softmax.h",
        "r.label_logit() * r.inv_temperature - all.max",
        "r.label_logit() - all.max",
        "logprobs",
        "cpu",
    ),
    Mutant(
        "no importance weight in the gradient",
        "csrc/math.h",
        "select(idle, zero, grad) * t.is_weight",
        "select(idle, zero, grad)",
        "ppo_loss",
        "cpu",
    ),
    Mutant(
        "a tie of the clip counts as clipped",
        "csrc/math.h",
        "active = clipped > plain;",
        "active = clipped >= plain;",
        "ppo_loss",
        "cpu",
    ),
    Mutant(
        "a partly masked vector counts whole",
        "csrc/cpu/loss/pieces.h",
        "if (all(live)) {",
        "if (any(live)) {",
        "value_loss",
        "cpu",
    ),
    Mutant(
        "masked elements shift the mean",
        "csrc/cpu/whiten/whiten_simd.h",
        "element = select(keep, element, p);",
        "",
        "whiten",
        "cpu",
    ),
    Mutant(
        "a second block of rows reads the first",
        "csrc/cpu/linear/few_rows_linear_simd.h",
        "const float* x = a.x + block * size;",
        "const float* x = a.x;",
        "few_rows_linear",
        "cpu",
    ),
)

CUDA = (
    Mutant(
        "truncation is termination",
        "csrc/cuda/advantage/steps.cuh",
        "const bool over = u.terminated >> i & 1;",
        "const bool over = u.cut >> i & 1;",
        "gae",
        "cuda",
    ),
    Mutant(
        "a tile's own value taken for the next one's",
        "csrc/cuda/advantage/blocks.cuh",
        "any & (~1u << warp_id())",
        "any & (~0u << warp_id())",
        "gae",
        "cuda",
    ),
    Mutant(
        "masked rows are scored",
        "csrc/cuda/softmax/softmax.cuh",
        "(!mask || mask.is_set(i)) && tokens",
        "tokens",
        "masking",
        "cuda",
    ),
    Mutant(
        "a certain row's entropy below 0",
        "csrc/cuda/softmax/softmax.cuh",
        "(entropy < 0.f ? 0.f : entropy)",
        "entropy",
        "logprobs",
        "cuda",
    ),
)

PYTHON = (
    Mutant(
        "bounds of the clip swapped at the boundary",
        "ppo_fast/_boundary/options.py",
        "            self.clip_low,\n            self.clip_high,\n",
        "            self.clip_high,\n            self.clip_low,\n",
        "ppo_loss",
    ),
    Mutant(
        "rloo's baseline holds the response itself",
        "ppo_fast/ops/group_advantages.py",
        "out = centred * count / (count - 1).clamp(min=1)",
        "out = centred",
        "group_advantages",
    ),
    Mutant(
        "merged moments forget the means' distance",
        "ppo_fast/_results.py",
        "m2_a + m2_b + delta * delta * n_a * share",
        "m2_a + m2_b",
        "stats",
    ),
)

LOOP = (
    Mutant(
        "the forward of other rows is trained on",
        "ppo_fast/loop/update.py",
        "if kept is not None and torch.equal(kept[0], rows) else None",
        "if kept is not None else None",
        "loop_update",
    ),
    Mutant(
        "a stale divisor",
        "ppo_fast/loop/update.py",
        '"denom": divisors.policy,',
        '"denom": seqs.mask.sum(),',
        "loop_update",
    ),
    Mutant(
        "dropped samples keep their mask",
        "ppo_fast/loop/data/sequences.py",
        "mask=self.mask & kept[:, None]",
        "mask=self.mask",
        "loop_faults",
    ),
    Mutant(
        "logits one position late",
        "ppo_fast/loop/data/sequences.py",
        "keep[:, -self.mask.shape[1] - 1 : -1] = self.mask",
        "keep[:, -self.mask.shape[1] :] = self.mask",
        "loop_policy",
    ),
    Mutant(
        "the EOS is masked",
        "ppo_fast/loop/sampling/generate.py",
        "mask[going, t] = token[alive], True",
        "mask[going, t] = token[alive], ~torch.isin(token[alive], stops)",
        "loop_policy",
    ),
    Mutant(
        "positions count the padding",
        "ppo_fast/loop/data/sequences.py",
        "(attention.cumsum(-1) - 1)",
        "(torch.ones_like(attention).cumsum(-1) - 1)",
        "loop_policy",
    ),
    Mutant(
        "the gradient that went too far is kept",
        "ppo_fast/loop/update.py",
        "agent.discard()\n                done.add(stats)",
        "agent.step()\n                done.add(stats)",
        "loop_update",
    ),
)

MUTANTS = {
    "triton": TRITON + DIVERGENCE_TRITON + STATS_TRITON,
    "cpu": (
        *(CPU + NUMBERS_CPU + ROLLOUT_CPU + WEIGHTS_CPU + SUPPORT_CPU + DIVERGENCE_CPU),
        *(STATS_CPU + HEAD_CPU),
    ),
    "cuda": CUDA,
    "python": PYTHON + ROLLOUT,
    "divergence": DIVERGENCE,
    "head": HEAD,
    "loop": LOOP + DISTILL,
    "inputs": INPUTS,
    "models": MODELS,
    "numbers": NUMBERS,
    "report": REPORT,
    "runs": RUNS,
    "truncation": TRUNCATION,
    "surrogates": SURROGATES + CONTEXT,
    "stats": STATS,
    "trainers": TRAINERS,
    "support": SUPPORT,
    "weights": WEIGHTS,
}
