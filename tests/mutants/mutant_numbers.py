"""Seeded mistakes of the ops with NaN, narrow types and other derivatives."""

from __future__ import annotations

from mutant import Mutant
from mutant_shares import SHARES

# Of the extension: built anew for each.
NUMBERS_CPU = (
    Mutant(
        "a certain label more than certain",
        "csrc/cpu/softmax/softmax.h",
        "log_sum = z > own ? z : own;",
        "log_sum = own;",
        "logprobs",
        "cpu",
    ),
    Mutant(
        "a NaN old value that the maximum passes over",
        "csrc/cpu/loss/value_loss_simd.h",
        "select(known, loss, old), select(known, half_grad, old), active",
        "loss, half_grad, active",
        "nan",
        "value_loss and cpu",
    ),
    Mutant(
        "a NaN log-ratio without a slope",
        "csrc/math.h",
        "held = (raw < c.d_min) | (raw > c.d_max)",
        "held = d != raw",
        "nan",
        "ppo_loss and cpu",
    ),
    Mutant(
        "infinity times an advantage of 0",
        "csrc/math.h",
        "idle = (minus_a == zero) & (ratio >= zero);",
        "idle = first_n<T>(0);",
        "nan",
        "overflows and cpu",
    ),
    Mutant(
        "a NaN divisor taken for an empty batch",
        "csrc/cpu/loss/driver.cpp",
        "return denom <= 0.0 ? 0.0 : 1.0 / denom;",
        "return denom > 0.0 ? 1.0 / denom : 0.0;",
        "nan",
        "divisor and cpu",
    ),
)

NUMBERS = (
    Mutant(
        "a function of the lanes that NEON lacks",
        "csrc/cpu/simd/neon.h",
        "PPO_INLINE F vsqrt(F a)",
        "PPO_INLINE F vroot(F a)",
        "csrc",
        "same_functions",
    ),
    *SHARES,
    Mutant(
        "shards are merged without their maxima",
        "ppo_fast/ops/shards.py",
        "scale = delta.exp()",
        "scale = torch.ones_like(delta)",
        "head_parallel",
    ),
    Mutant(
        "a certain label of a shard more than certain",
        "ppo_fast/ops/shards.py",
        "log_sum = torch.maximum(total.log(), label)",
        "log_sum = total.log()",
        "head_parallel",
    ),
    Mutant(
        "a NaN old value that the maximum passes over",
        "kernels/value_loss.py",
        "    term = tl.where(known, term, old)\n    slope = tl.where(known, slope, old)\n",
        "",
        "nan",
        "value_loss and triton",
    ),
    Mutant(
        "a NaN old value that the maximum passes over",
        "csrc/cuda/loss/value_loss.cuh",
        "  if (!(lo <= hi)) return {old, old, false};\n",
        "",
        "nan",
        "value_loss and cuda",
    ),
    Mutant(
        "a NaN log-ratio without a slope",
        "kernels/token_loss.py",
        "((raw < log_min) | (raw > log_max)) == 0",
        "(raw >= log_min) & (raw <= log_max)",
        "nan",
        "ppo_loss and triton",
    ),
    Mutant(
        "infinity times an advantage of 0",
        "kernels/token_loss.py",
        "idle = (adv == 0) & (ratio >= 0)",
        "idle = (adv == 0) & (ratio < 0)",
        "nan",
        "overflows and triton",
    ),
    Mutant(
        "a NaN divisor taken for an empty batch",
        "kernels/loss_tiles.py",
        "nothing = denom <= 0",
        "nothing = (denom > 0) == 0",
        "nan",
        "divisor and triton",
    ),
    Mutant(
        "a NaN divisor taken for an empty batch",
        "csrc/cuda/loss/loss.cuh",
        "*a.loss = denom <= 0.0 ? 0.f : float(totals[at.loss] / denom);",
        "*a.loss = denom > 0.0 ? float(totals[at.loss] / denom) : 0.f;",
        "nan",
        "divisor and cuda",
    ),
    Mutant(
        "a NaN variance taken for none",
        "ppo_fast/ops/group_advantages.py",
        "variance == 0, torch.zeros_like(centred), whitened",
        "~(variance > 0), torch.zeros_like(centred), whitened",
        "nan",
    ),
    Mutant(
        "a NaN score alone in its group is 0",
        "ppo_fast/ops/group_advantages.py",
        "centred = torch.where(alone, zero, s - mean)",
        "centred = torch.where(alone, torch.zeros_like(s), s - mean)",
        "nan",
    ),
    Mutant(
        "fp16 rounded before the loss scale",
        "ppo_fast/ops/logits_ppo_loss.py",
        "logits.dtype != torch.float16",
        "logits.dtype != torch.float64",
        "loss_scale",
    ),
    Mutant(
        "fp16 rounded before the loss scale",
        "ppo_fast/ops/linear_ppo_loss.py",
        "given.weight.dtype != torch.float16",
        "given.weight.dtype != torch.float64",
        "loss_scale",
    ),
    Mutant(
        "a tangent that a kernel loses",
        "ppo_fast/ops/forward_mode.py",
        'if asked not in (None, "reference"):',
        'if asked not in (None, "reference", "cpu"):',
        "derivative_modes",
    ),
    Mutant(
        "a constant's tangent that is lost",
        "ppo_fast/ops/forward_mode.py",
        "        if name not in learns:\n",
        "        if not learns and name not in learns:\n",
        "derivative_modes",
    ),
    Mutant(
        "a divisor that fp32 rounds to 0",
        "ppo_fast/_checks.py",
        "_FP32.smallest_normal <= value",
        "0.0 <= value",
        "errors head_errors",
    ),
)
