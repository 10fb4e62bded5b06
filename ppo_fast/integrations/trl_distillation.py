"""TRL 1.16's `DistillationTrainer` on ppo_fast: the loss of two heads, without their logits.

`apply()`, `revert()` and `patched()`. Generation, the entropy metric and the reduction over
processes stay TRL's own. The op "token_divergence" is the function inside the loss, which the
trainer does not reach once the loss is replaced: it is patched when named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Teacher
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._extract import Block
from ppo_fast.integrations._patch import Arguments, Integration, Swap

_SIDES = ("student", "teacher")
# Of the first call's comparison: kept tokens, masked ones and words of the vocabulary.
_KEPT, _MASKED, _WORDS = 48, 16, 4096


def _heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> dict[str, Any]:
    """Arguments of the ops: TRL's β is 0 for the forward KL, 1 for the reverse, else a JSD's.

    A student's z = cap·tanh(s·x / cap) / T is (cap/s)·tanh(x / (cap/s)) / (T/s).
    """
    scale, cap = student_logit_scale, student_final_logit_softcapping
    _positive("student_logit_scale", scale)
    _positive("student_final_logit_softcapping", cap)
    _positive("teacher_logit_scale", teacher_logit_scale)
    _positive("teacher_final_logit_softcapping", teacher_final_logit_softcapping)
    _positive("temperature", temperature)
    _one_type("student", student_hidden, student_weight)
    _one_type("teacher", teacher_hidden, teacher_weight)
    rows = student_weight.shape[0], teacher_weight.shape[0]
    if rows[0] != rows[1]:
        raise Uncovered(f"heads of {rows[0]} and {rows[1]} rows")
    kind = {0.0: "forward", 1.0: "reverse"}.get(float(beta), "jsd")
    teacher = Teacher(
        teacher_hidden,
        teacher_weight,
        kind=kind,
        beta=beta,
        bias=teacher_bias,
        softcap=teacher_final_logit_softcapping,
        temperature=temperature,  # the student's has its scale in it
        logit_scale=teacher_logit_scale,
    )
    return {
        "hidden": student_hidden,
        "weight": student_weight,
        "teacher": teacher,
        "bias": student_bias,
        "temperature": temperature / scale,
        "softcap": None if cap is None else cap / scale,
    }


def _positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise Uncovered(f"{name} {value}")


def _one_type(side: str, hidden: Tensor, weight: Tensor) -> None:
    if hasattr(weight, "ds_id"):
        raise Uncovered(f"a {side}'s weight that DeepSpeed ZeRO-3 takes away after the forward")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise Uncovered(f"a {side}'s hidden states {hidden.dtype} beside a weight {weight.dtype}")


def _token_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    beta: float,
    temperature: float = 1.0,
    student_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_final_logit_softcapping: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`ChunkedDivergenceFunction.apply`; the entropy has no gradient, as there."""
    heads = _heads(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        beta,
        temperature,
        student_logit_scale,
        student_final_logit_softcapping,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    divergence, entropy = ppo_fast.linear_token_divergence(**heads)
    return divergence, entropy.detach()


def _loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None,
    student_lm_head_bias: Tensor | None,
    teacher_lm_head_bias: Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_final_logit_softcapping: float | None,
    teacher_final_logit_softcapping: float | None,
    temperature: float,
) -> dict[str, Tensor]:
    """The loss, the sum of the entropies and the number of kept tokens."""
    heads = _heads(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        teacher_hidden_states,
        teacher_lm_head_weight,
        teacher_lm_head_bias,
        beta,
        temperature,
        student_logit_scale,
        student_final_logit_softcapping,
        teacher_logit_scale,
        teacher_final_logit_softcapping,
    )
    denom = num_items_in_batch
    if isinstance(denom, Tensor):
        denom = denom.to(student_hidden_states.device)
    kept = completion_mask != 0
    out = ppo_fast.linear_divergence(
        **heads,
        mask=kept,
        row_index=kept.reshape(-1).nonzero()[:, 0],  # waits for a GPU, as TRL's own choice does
        denom=denom,
    )
    return {"loss": out.loss, "entropy_sum": out.entropy.sum(), "n_valid_tensor": kept.sum()}


def _some_tokens(arguments: Arguments) -> Arguments:
    """The first call's comparison: some tokens, masked ones too, on the vocabulary's first words.

    The loss is divided by as many, for its size to be that of a token's.
    """
    mask = arguments["completion_mask"].reshape(-1)
    rows = torch.cat([(mask != 0).nonzero()[:_KEPT, 0], (mask == 0).nonzero()[:_MASKED, 0]])
    cut = {"completion_mask": mask[rows]}
    for side in _SIDES:
        hidden = arguments[f"{side}_hidden_states"]
        cut[f"{side}_hidden_states"] = hidden.reshape(-1, hidden.shape[-1])[rows]
        for name in (f"{side}_lm_head_weight", f"{side}_lm_head_bias"):
            x = arguments[name]
            cut[name] = None if x is None else x[:_WORDS]
    items = arguments["num_items_in_batch"]
    if items is not None:
        tensor = isinstance(items, Tensor)
        cut["num_items_in_batch"] = torch.full_like(items, len(rows)) if tensor else len(rows)
    return arguments | cut


def _some_rows(arguments: Arguments) -> Arguments:
    """The first call's comparison: some tokens on the vocabulary's first words."""
    counts = {"hidden": _KEPT, "weight": _WORDS, "bias": _WORDS}
    names = {f"{side}_{name}": n for side in _SIDES for name, n in counts.items()}
    return {k: x[: names[k]] if k in names and x is not None else x for k, x in arguments.items()}


integration = Integration(
    name="trl_distillation",
    package="trl",
    version="1.16",
    extra="trl-distillation",
    on_request=("token_divergence",),
    swaps=(
        Swap(
            "loss",
            "trl.trainer.distillation_trainer:_chunked_divergence_loss",
            _loss,
            block=Block("valid = completion_mask", "if num_items_in_batch is None:"),
            sample=_some_tokens,
        ),
        Swap(
            "token_divergence",
            "trl.kernels.chunked_divergence:ChunkedDivergenceFunction.apply",
            _token_divergence,
            sample=_some_rows,
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
