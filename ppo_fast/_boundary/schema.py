"""Schemas of the kernel ops for `torch.library`: one and a fake per op, an overload per backend.

`calls.py` has a function for each; it calls `torch.ops.ppo_fast.<op>.<backend>`. The C++ extension
adds the implementations of the `cpu` overloads when it is loaded, and those of the `cuda` ones
where it was built with them; the `triton` ones import `kernels/` on their first call. The numbers
of the losses travel in `codes` (integers) and `params` (floats): as arguments of their own they
would cost 1.5 µs a call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast._results import N_STATS, ROLLOUT_FIELDS
from ppo_fast.corrections import FORMS as ROLLOUT_FORMS
from ppo_fast.corrections import LEVELS
from ppo_fast.teacher import KINDS

BACKENDS = ("cpu", "triton", "cuda")

# Enumerations: an option's code is its index. `emit.py` writes them for C++ and Triton.
VARIANTS = ("clip", "gspo", "cispo", "penalty", "linear")
# "given", which callers cannot name: is_weights is the policy term and advantages its slope.
KERNEL_VARIANTS = (*VARIANTS, "given")
ESTIMATORS = ("k1", "k2", "k3", "abs")
REDUCTIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
KL_WEIGHTS = ("none", "ratio", "score")
FORMS = ("unclipped", "max", "clipped")
MASKED = ("carry", "zero")
SCORE_AT = ("last-token", "first-pad", "per-token")
ENUM_CODES = {
    "Variant": KERNEL_VARIANTS,
    "Estimator": ESTIMATORS,
    "Reduction": REDUCTIONS,
    "KlWeight": KL_WEIGHTS,
    "Form": FORMS,
    "Masked": MASKED,
    "ScoreAt": SCORE_AT,
    "Divergence": KINDS,
}
# Enumerations of ops that the CPU alone has: C++ alone gets them.
CPU_ENUM_CODES = {
    "RolloutLevel": tuple(level or "none" for level in LEVELS),
    "RolloutForm": ROLLOUT_FORMS,
}

# A tensor `<name>_tensor`, where given, replaces the number `<name>` and stays on the device.
_LOGPROBS_FWD = (
    "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? temperature_tensor, float temperature,"
    " int ignore_index) -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum)"
)
_LOGPROBS_BWD_ARGS = (
    "(Tensor? grad_logprobs, Tensor? grad_entropy, {logits} logits, Tensor tokens, Tensor? mask,"
    " Tensor? temperature_tensor, Tensor entropy, Tensor row_max, Tensor log_sum,"
    " float temperature, int ignore_index)"
)
# Of fp32 or fp64 rows; the first four as logprobs_fwd's, to the bit. log_sum_sq is the log of the
# sum of e^2(z - row_max), mean_logit the mean of z, -inf or not a number as its terms are, top the
# first column of the largest logit (int64; of a row without a finite one it means nothing).
_TOKEN_STATS = (
    "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? temperature_tensor, float temperature,"
    " int ignore_index) -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum,"
    " Tensor log_sum_sq, Tensor mean_logit, Tensor top)"
)
# Pairs (row, id) of a call over supports, row after row: `offsets` (N + 1,) int64 are the rows'
# ends, and a row's first pair is its token. A logit of -inf is an absent pair's. `mask` (N,) bool.
_SUPPORT_FWD = (
    "(Tensor logits, Tensor offsets, Tensor mask, Tensor? temperature_tensor, float temperature)"
    " -> (Tensor logprobs, Tensor entropy, Tensor row_max, Tensor log_sum)"
)
_SUPPORT_BWD = (
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor offsets, Tensor mask,"
    " Tensor? temperature_tensor, Tensor entropy, Tensor row_max, Tensor log_sum,"
    " float temperature) -> Tensor"
)
# ids (M,) int32: -1 is absent (a logit of -inf), any other outside [0, V) is wrong (NaN).
_SPARSE_LOGITS = (
    "(Tensor hidden, Tensor weight, Tensor ids, Tensor offsets, Tensor mask) -> Tensor"
)
_SPARSE_HIDDEN_GRAD = (
    "(Tensor grad_logits, Tensor weight, Tensor ids, Tensor offsets, Tensor mask) -> Tensor"
)
# The pairs in the order of their ids: gradient and row of each, (M,), and where each id begins and
# the last one ends, (V + 1,) int64.
_SPARSE_WEIGHT_GRAD = (
    "(Tensor grad_logits, Tensor rows, Tensor starts, Tensor hidden)"
    " -> (Tensor grad_weight, Tensor grad_bias)"
)
# A student's rows of logits and a teacher's, (..., V) both, each with its own temperature and the
# state (row_max, log_sum) of its softmax, which `logprobs_fwd` gave or ranks have merged: z and y
# may be a share of the columns, of which there may be none. With p and q their probabilities and
# m = (1 - beta) p + beta q, `kl` is the sum of p ln(p/q), or p ln(p/m) for jsd, 0 for forward;
# `divergence` is beta kl + (1 - beta) sum q ln(q/p) for mixed, beta sum q ln(q/m) + (1 - beta) kl
# for jsd. A term of probability 0 is 0. Nothing of a masked row is read; its results are 0.
_DIVERGENCE_FWD = (
    "(Tensor logits, Tensor teacher_logits, Tensor? mask, Tensor? temperature_tensor,"
    " Tensor? teacher_temperature_tensor, Tensor row_max, Tensor log_sum, Tensor teacher_max,"
    " Tensor teacher_log_sum, float temperature, float teacher_temperature, int kind,"
    " float beta) -> (Tensor divergence, Tensor kl)"
)
# dz_j of g logprob + h entropy + c divergence, tau times it: [j = token] g - p (g + h (ln p + H))
# + c d_j, where d_j is p (ln p - ln q - kl) for reverse, p - q for forward, beta and 1 - beta of
# these for mixed, (1 - beta) p (ln p - ln m - kl) for jsd. `kl` is the whole row's. A token
# outside [0, V) has no column here, and no other effect. A row with a NaN in entropy is NaN.
_DIVERGENCE_BWD_ARGS = (
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor grad_divergence, {logits} logits,"
    " Tensor teacher_logits, Tensor tokens, Tensor? mask, Tensor? temperature_tensor,"
    " Tensor? teacher_temperature_tensor, Tensor entropy, Tensor row_max, Tensor log_sum,"
    " Tensor teacher_max, Tensor teacher_log_sum, Tensor kl, float temperature,"
    " float teacher_temperature, int kind, float beta)"
)
# codes and params: PolicyCodes and PolicyParams of options.py.
# grads is (n_grads, *shape): by logprobs, by entropy; the gradients are scale times it. scale is
# 1/D, or 1 from a backend that knew D beforehand. sequence_weights, (B,) or (S,), multiply w.
_PPO_LOSS = (
    "(Tensor logprobs, Tensor? old_logprobs, Tensor advantages, Tensor? mask, Tensor? is_weights,"
    " Tensor? moments, Tensor? entropy, Tensor? ref_logprobs, Tensor? cu_seqlens,"
    " Tensor? sequence_weights, Tensor? entropy_coef_tensor, Tensor? kl_coef_tensor,"
    " Tensor? denom_tensor, int[] codes, float[] params)"
    " -> (Tensor loss, Tensor stats, Tensor scale, Tensor grads)"
)
# An op whose name ends in _bf16_ is the head's form, of fp32 logits: row r's gradient is bfloat16
# and starts where row r does, so it is `logits.view(bfloat16)[..., :V]`.
# One read of the logits for log-probability, loss slope and gradient. `weights` is w/D of every
# token, or 0-d for all; gspo, whose slopes need whole sequences first, and "given" have no
# one-pass op.
# codes and params: those of ppo_loss, of which reduction, n_grads and denom are not used.
_LOGITS_PPO_LOSS_ARGS = (
    "({logits} logits, Tensor tokens, Tensor? mask, Tensor? temperature_tensor,"
    " Tensor? old_logprobs, Tensor advantages, Tensor? is_weights, Tensor? moments,"
    " Tensor? ref_logprobs, Tensor weights, Tensor? entropy_coef_tensor, Tensor? kl_coef_tensor,"
    " float temperature, int ignore_index, int[] codes, float[] params)"
)
# codes and params: ValueCodes and ValueParams of options.py; form 0 is unclipped.
_VALUE_LOSS = (
    "(Tensor values, Tensor? old_values, Tensor returns, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor? denom_tensor, int[] codes, float[] params)"
    " -> (Tensor loss, Tensor stats, Tensor scale, Tensor grads)"
)
# The lambdas' tensors are expanded to the rewards' shape ((S,) when packed and per sequence).
_GAE = (
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? next_values, Tensor? bootstrap,"
    " Tensor? terminated, Tensor? truncated, Tensor? cu_seqlens, Tensor? rho, Tensor? c,"
    " Tensor? lam_adv_tensor, Tensor? lam_ret_tensor, int masked, bool time_major,"
    " bool lam_adv_per_step, bool lam_ret_per_step, float gamma, float lam_adv, float lam_ret)"
    " -> (Tensor advantages, Tensor returns, Tensor moments)"
)
_RLHF_ADVANTAGES = (
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask,"
    " Tensor? bootstrap, Tensor? cu_seqlens, Tensor? kl_coef_tensor, int masked, int estimator,"
    " int score_at, float gamma, float lam, float kl_coef, float kl_clamp, float reward_min,"
    " float reward_max)"
    " -> (Tensor advantages, Tensor returns, Tensor rewards, Tensor kl, Tensor moments)"
)
_MOMENTS = "(Tensor x, Tensor? mask) -> Tensor"
_WHITEN = (
    "(Tensor x, Tensor? mask, Tensor moments, bool shift_mean, bool unbiased, bool eps_at_std,"
    " float eps) -> Tensor"
)
# grads times factor and scale, 0-d both. In place nothing is touched where that is exactly 1.
_SCALED_ARGS = "({grads} grads, Tensor factor, Tensor? scale)"
_FEW_ROWS_LINEAR = "(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
# out (M, N) fp32 = a (M, K) · b (K, N), or that more; b is bf16, a that or fp32.
_BF16_PRODUCT_ = "(Tensor a, Tensor b, Tensor(a!) out, bool add) -> ()"
# windows: `Correction.windows()`, end to end; stats are in the order of ROLLOUT_FIELDS.
_ROLLOUT_WEIGHTS = (
    "(Tensor old_logprobs, Tensor rollout_logprobs, Tensor? mask, Tensor? cu_seqlens, int level,"
    " int form, float low, float high, float[] windows)"
    " -> (Tensor weights, Tensor kept, Tensor stats)"
)


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 inputs, fp32 for every other floating type."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(x: Tensor, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape if shape is None else shape, dtype=dtype or compute_dtype(x))


def _fake_logprobs_fwd(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_empty(logits, tokens.shape) for _ in range(4))


def _fake_token_stats(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    numbers = (_empty(logits, tokens.shape) for _ in range(6))
    return (*numbers, _empty(logits, tokens.shape, torch.int64))


def _fake_logprobs_bwd(grad_logprobs: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return _empty(logits, dtype=logits.dtype)


def _fake_divergence_fwd(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty(logits, logits.shape[:-1]), _empty(logits, logits.shape[:-1])


def _fake_support_fwd(logits: Tensor, offsets: Tensor, mask: Tensor, *_: Any) -> Any:
    return tuple(_empty(logits, mask.shape) for _ in range(4))


def _fake_weight_grad(grad_logits: Tensor, rows: Any, starts: Tensor, hidden: Tensor) -> Any:
    vocab = starts.shape[0] - 1
    weight = _empty(hidden, (vocab, hidden.shape[1]), hidden.dtype)
    return weight, _empty(grad_logits, (vocab,))


def _fake_logits_loss(logits: Tensor, tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(logits, tokens.shape), _empty(logits, tokens.shape)


def _fake_loss(main: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, codes, _ = args
    *_, n_grads = codes
    return (
        _empty(main, ()),
        _empty(main, (N_STATS,), torch.float64),
        _empty(main, ()),
        _empty(main, (n_grads, *main.shape)),
    )


def _fake_gae(rewards: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty(rewards), _empty(rewards), _empty(rewards, (3,), torch.float64)


def _fake_rlhf(scores: Tensor, logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*(_empty(logprobs) for _ in range(4)), _empty(logprobs, (3,), torch.float64))


def _fake_rollout(old_logprobs: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (
        _empty(old_logprobs),
        _empty(old_logprobs, dtype=torch.bool),
        _empty(old_logprobs, (len(ROLLOUT_FIELDS),), torch.float64),
    )


# op -> (schema, fake, stem of the file that implements it)
OPS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "logprobs_fwd": (_LOGPROBS_FWD, _fake_logprobs_fwd, "logprobs"),
    "logprobs_bwd": (
        _LOGPROBS_BWD_ARGS.format(logits="Tensor") + " -> Tensor",
        _fake_logprobs_bwd,
        "logprobs",
    ),
    "logprobs_bwd_": (
        _LOGPROBS_BWD_ARGS.format(logits="Tensor(a!)") + " -> ()",
        lambda *_: None,
        "logprobs",
    ),
    "logprobs_bwd_bf16_": (
        _LOGPROBS_BWD_ARGS.format(logits="Tensor(a!)") + " -> ()",
        lambda *_: None,
        "logprobs",
    ),
    "token_stats": (_TOKEN_STATS, _fake_token_stats, "token_stats"),
    "support_fwd": (_SUPPORT_FWD, _fake_support_fwd, "support"),
    "support_bwd": (_SUPPORT_BWD, lambda g, h, logits, *_: _empty(logits), "support"),
    "sparse_logits": (
        _SPARSE_LOGITS,
        lambda hidden, weight, ids, *_: _empty(hidden, ids.shape),
        "sparse_head",
    ),
    "sparse_hidden_grad": (
        _SPARSE_HIDDEN_GRAD,
        lambda grads, weight, ids, offsets, mask: _empty(
            weight, (mask.shape[0], weight.shape[1]), weight.dtype
        ),
        "sparse_head",
    ),
    "sparse_weight_grad": (_SPARSE_WEIGHT_GRAD, _fake_weight_grad, "sparse_head"),
    "divergence_fwd": (_DIVERGENCE_FWD, _fake_divergence_fwd, "divergence"),
    "divergence_bwd": (
        _DIVERGENCE_BWD_ARGS.format(logits="Tensor") + " -> Tensor",
        lambda g, h, c, logits, *_: _empty(logits, dtype=logits.dtype),
        "divergence",
    ),
    "divergence_bwd_": (
        _DIVERGENCE_BWD_ARGS.format(logits="Tensor(a!)") + " -> ()",
        lambda *_: None,
        "divergence",
    ),
    "divergence_bwd_bf16_": (
        _DIVERGENCE_BWD_ARGS.format(logits="Tensor(a!)") + " -> ()",
        lambda *_: None,
        "divergence",
    ),
    "ppo_loss": (_PPO_LOSS, _fake_loss, "ppo_loss"),
    "logits_ppo_loss": (
        _LOGITS_PPO_LOSS_ARGS.format(logits="Tensor")
        + " -> (Tensor logprobs, Tensor entropy, Tensor grad_logits)",
        lambda logits, tokens, *_: (
            *_fake_logits_loss(logits, tokens),
            _empty(logits, dtype=logits.dtype),
        ),
        "logits_ppo_loss",
    ),
    "logits_ppo_loss_": (
        _LOGITS_PPO_LOSS_ARGS.format(logits="Tensor(a!)")
        + " -> (Tensor logprobs, Tensor entropy)",
        _fake_logits_loss,
        "logits_ppo_loss",
    ),
    "logits_ppo_loss_bf16_": (
        _LOGITS_PPO_LOSS_ARGS.format(logits="Tensor(a!)")
        + " -> (Tensor logprobs, Tensor entropy)",
        _fake_logits_loss,
        "logits_ppo_loss",
    ),
    "value_loss": (_VALUE_LOSS, _fake_loss, "value_loss"),
    "gae": (_GAE, _fake_gae, "gae"),
    "rlhf_advantages": (_RLHF_ADVANTAGES, _fake_rlhf, "rlhf_advantages"),
    "moments": (_MOMENTS, lambda x, mask: _empty(x, (3,), torch.float64), "whiten"),
    "whiten": (_WHITEN, lambda x, *_: _empty(x), "whiten"),
    "scaled": (
        _SCALED_ARGS.format(grads="Tensor") + " -> Tensor",
        lambda grads, *_: _empty(grads, dtype=grads.dtype),
        "scale",
    ),
    "scaled_": (
        _SCALED_ARGS.format(grads="Tensor(a!)") + " -> ()",
        lambda *_: None,
        "scale",
    ),
    "few_rows_linear": (
        _FEW_ROWS_LINEAR,
        lambda x, weight, bias: _empty(x, (x.shape[0], weight.shape[0])),
        "few_rows_linear",
    ),
    "bf16_product_": (_BF16_PRODUCT_, lambda *_: None, "bf16_product"),
    "rollout_weights": (_ROLLOUT_WEIGHTS, _fake_rollout, "rollout_weights"),
}
# Ops that not every backend has.
_BACKENDS_OF = {
    "logprobs_bwd_bf16_": ("triton", "cuda"),
    "logits_ppo_loss_bf16_": ("triton", "cuda"),
    "scaled": ("triton", "cuda"),
    "scaled_": ("triton", "cuda"),
    "token_stats": ("cpu", "triton"),
    "support_fwd": ("cpu", "triton"),
    "support_bwd": ("cpu", "triton"),
    "sparse_logits": ("cpu", "triton"),
    "sparse_hidden_grad": ("cpu", "triton"),
    "sparse_weight_grad": ("cpu", "triton"),
    "divergence_fwd": ("cpu", "triton"),
    "divergence_bwd": ("cpu", "triton"),
    "divergence_bwd_": ("cpu", "triton"),
    "divergence_bwd_bf16_": ("triton",),
    "few_rows_linear": ("cpu",),
    "bf16_product_": ("cpu",),
    "rollout_weights": ("cpu",),
}


def backends_of(op: str) -> tuple[str, ...]:
    """The backends that have an overload."""
    return _BACKENDS_OF.get(op, BACKENDS)


def _lazy_triton(stem: str, op: str) -> Callable[..., Any]:
    """Import `kernels/<stem>.py` on the first call, so that importing ppo_fast loads no Triton."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"ppo_fast.kernels.{stem}"), op)(*args)

    return call


# Gradients belong to the autograd.Functions of ops/: results of the boundary are constants, even
# where an argument requires grad.
_LIBRARY = torch.library.Library("ppo_fast", "FRAGMENT")


def _define() -> None:
    for op, (schema, fake, stem) in OPS.items():
        for backend in backends_of(op):
            name = f"ppo_fast::{op}.{backend}"
            torch.library.define(name, schema)
            torch.library.register_fake(name, fake)
            _LIBRARY.impl(f"{op}.{backend}", torch.library.fallthrough_kernel, "Autograd")
            if backend == "triton":
                torch.library.impl(name, ("cpu", "cuda"), _lazy_triton(stem, op))


_define()
HANDLES: dict[str, dict[str, Any]] = {
    op: {b: getattr(getattr(torch.ops.ppo_fast, op), b) for b in backends_of(op)} for op in OPS
}
