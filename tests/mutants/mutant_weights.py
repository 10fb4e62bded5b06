"""Seeded mistakes of the policy losses' weights and of the clamp of gspo's ratio."""

from __future__ import annotations

from mutant import Mutant

# Of the extension: built anew for each.
WEIGHTS_CPU = (
    Mutant(
        "the weight of the KL term has no slope",
        "csrc/math.h",
        "k.grad + select(held, set1<T>(0.f), k.value)",
        "k.grad",
        "policy_weights",
        "by_hand and cpu",
    ),
    Mutant(
        "a weight of 0 times infinity",
        "csrc/math.h",
        "dropped = t.is_weight == zero",
        "dropped = first_n<T>(0)",
        "policy_weights",
        "drops and cpu",
    ),
    Mutant(
        "gspo's clamp does not stop the gradient",
        "csrc/cpu/loss/ppo_loss_simd.h",
        "seq_held = (mean < c.d_min) | (mean > c.d_max);",
        "",
        "policy_weights",
        "gspo and cpu",
    ),
    Mutant(
        "the mean of a sequence forgets its weight",
        "csrc/cpu/loss/driver.cpp",
        "means ? own / double(live) : own",
        "means ? 1.0 / double(live) : own",
        "policy_weights",
        "sequence_weights and cpu",
    ),
)

WEIGHTS = (
    Mutant(
        "the weight of the KL term has a slope where it is clamped",
        "kernels/token_loss.py",
        "tl.where(by_ratio & (unclamped == 0), 0.0, value)",
        "value",
        "policy_weights",
        "by_hand and triton",
    ),
    Mutant(
        "a weight of 0 times infinity",
        "kernels/token_loss.py",
        "slope = tl.where(is_weight == 0, 0.0, slope * is_weight)",
        "slope = slope * is_weight",
        "policy_weights",
        "drops and triton",
    ),
    Mutant(
        "gspo's clamp does not stop the gradient",
        "kernels/ppo_loss.py",
        "                unclamped = ((mean < log_min) | (mean > log_max)) == 0\n",
        "",
        "policy_weights",
        "gspo and triton",
    ),
    Mutant(
        "weights of sequences are read without their stride",
        "kernels/ppo_loss.py",
        "seq * seq_weight_step",
        "seq",
        "strides",
        "weights and triton",
    ),
    Mutant(
        "gspo's clamp does not stop the gradient",
        "csrc/cuda/loss/sequences.cuh",
        "mean < a.d_min || mean > a.d_max};",
        "false};",
        "policy_weights",
        "gspo and cuda",
    ),
    Mutant(
        "a weight of a sequence replaces the mean",
        "csrc/cuda/loss/sequences.cuh",
        "a.means ? own / n : own",
        "a.weights || !a.means ? own : 1.0 / n",
        "policy_weights",
        "sequence_weights and cuda",
    ),
    Mutant(
        "the KL term of the loss is without its weight",
        "csrc/cuda/loss/ppo_loss.cuh",
        "vfma(c.kl_coef, x.weighted_kl, x.policy)",
        "vfma(c.kl_coef, x.kl, x.policy)",
        "policy_weights",
        "by_hand and cuda",
    ),
    Mutant(
        "the given term is dropped where it is 0",
        "kernels/token_loss.py",
        "slope = tl.where(given, adv, slope)",
        "slope = tl.where(given & (is_weight != 0), adv, slope)",
        "given",
        "triton",
    ),
    Mutant(
        "the given term is whitened",
        "csrc/loss_options.h",
        "moments.has_value() && o.variant != Variant::given",
        "moments.has_value()",
        "given",
        "cuda",
    ),
)
