"""TRL's `DistillationTrainer` on ppo_fast: the loss of two heads, without their logits.

`apply()`, `revert()` and `patched()`. Generation, the entropy metric and the reduction over
processes stay TRL's own. The op "token_divergence" is the function inside the loss (from 1.15),
which the trainer does not reach once the loss is replaced, and "gkd" and "gold" are the losses of
logits of the experimental `GKDTrainer` and `GOLDTrainer`: these are patched when named.
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
    teacher = Teacher(
        teacher_hidden,
        teacher_weight,
        kind=_kind(beta),
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


def _kind(beta: float) -> str:
    return {0.0: "forward", 1.0: "reverse"}.get(float(beta), "jsd")


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
    denom = _beside(student_hidden_states, num_items_in_batch)
    kept = completion_mask != 0
    out = ppo_fast.linear_divergence(
        **heads,
        mask=kept,
        row_index=kept.reshape(-1).nonzero()[:, 0],  # waits for a GPU, as TRL's own choice does
        denom=denom,
    )
    return {"loss": out.loss, "entropy_sum": out.entropy.sum(), "n_valid_tensor": kept.sum()}


def _loss_by_chunks(chunk_size: int, **given: Any) -> dict[str, Tensor]:
    """TRL before 1.15 takes the tokens in chunks of this size."""
    return _loss(**given)


def _without_slope(_: Arguments, result: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entropies, which are a metric, have a gradient before 1.15."""
    return result | {"entropy_sum": result["entropy_sum"].detach()}


def _beside(x: Tensor, items: Tensor | int | None) -> Tensor | int | None:
    return items.to(x.device) if isinstance(items, Tensor) else items


def _gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`; "batchmean" is a mean over the labelled tokens there."""
    if labels is None:
        raise Uncovered("a loss without labels")
    if reduction not in ("batchmean", "sum") and num_items_in_batch is None:
        raise Uncovered(f"reduction {reduction!r}")
    sides = [(tuple(x.shape), x.dtype) for x in (student_logits, teacher_logits)]
    if sides[0] != sides[1]:
        raise Uncovered(f"logits {sides[0]} beside a teacher's {sides[1]}")
    _positive("temperature", temperature)
    return ppo_fast.divergence(
        student_logits,
        teacher_logits,
        labels != -100,
        kind=_kind(beta),
        beta=beta,
        temperature=temperature,
        reduction="token-sum" if reduction == "sum" else "token-mean",
        denom=_beside(student_logits, num_items_in_batch),
    ).loss


def _gold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`GOLDTrainer.generalized_jsd_loss`, for student and teacher of one tokenizer."""
    if logits_are_probs:
        raise Uncovered("probabilities of two tokenizers")
    given = (student_logits, teacher_logits, labels, beta, temperature, reduction)
    return _gkd(*given, num_items_in_batch)


def _some_tokens(arguments: Arguments) -> Arguments:
    """The first call's comparison: some tokens, masked ones too, on the vocabulary's first words.

    The loss is divided by as many, for its size to be that of a token's.
    """
    mask = arguments["completion_mask"].reshape(-1)
    rows = _some_of(mask != 0)
    cut = {"completion_mask": mask[rows]}
    for side in _SIDES:
        hidden = arguments[f"{side}_hidden_states"]
        cut[f"{side}_hidden_states"] = hidden.reshape(-1, hidden.shape[-1])[rows]
        for name in (f"{side}_lm_head_weight", f"{side}_lm_head_bias"):
            x = arguments[name]
            cut[name] = None if x is None else x[:_WORDS]
    return arguments | cut | _divided(arguments, len(rows))


def _some_labels(arguments: Arguments) -> Arguments:
    """The same of logits, over the vocabulary."""
    labels = arguments.get("labels")
    if labels is None:
        return arguments
    rows, cut = _some_of(labels.reshape(-1) != -100), {"labels": labels.reshape(-1)}
    for name in (f"{side}_logits" for side in _SIDES):
        cut[name] = arguments[name].flatten(0, -2)
    return arguments | {k: x[rows] for k, x in cut.items()} | _divided(arguments, len(rows))


def _some_of(keep: Tensor) -> Tensor:
    return torch.cat([keep.nonzero()[:_KEPT, 0], (~keep).nonzero()[:_MASKED, 0]])


def _divided(arguments: Arguments, count: int) -> Arguments:
    items = arguments.get("num_items_in_batch")
    if items is None:
        return {}
    divisor = torch.full_like(items, count) if isinstance(items, Tensor) else count
    return {"num_items_in_batch": divisor}


def _some_rows(arguments: Arguments) -> Arguments:
    """The first call's comparison: some tokens on the vocabulary's first words."""
    counts = {"hidden": _KEPT, "weight": _WORDS, "bias": _WORDS}
    names = {f"{side}_{name}": n for side in _SIDES for name, n in counts.items()}
    return {k: x[: names[k]] if k in names and x is not None else x for k, x in arguments.items()}


_TRL_LOSS = "trl.trainer.distillation_trainer:_chunked_divergence_loss"
integration = Integration(
    name="trl_distillation",
    package="trl",
    extra="trl-distillation",
    on_request=("token_divergence", "gkd", "gold"),
    swaps=(
        (
            Swap(
                "loss",
                _TRL_LOSS,
                _loss_by_chunks,
                block=Block("h_s = student_hidden", "if num_items_in_batch is None:"),
                having="for start in range(0, n_padded, chunk_size):",
                view=_without_slope,
                sample=_some_tokens,
            ),
            *(
                Swap(
                    "loss",
                    _TRL_LOSS,
                    _loss,
                    block=Block(first, "if num_items_in_batch is None:"),
                    sample=_some_tokens,
                )
                for first in ("from ..kernels.chunked", "valid = completion_mask")  # 1.15, 1.16
            ),
        ),
        Swap(
            "token_divergence",
            "trl.kernels.chunked_divergence:ChunkedDivergenceFunction.apply",
            _token_divergence,
            sample=_some_rows,
            optional=True,
        ),
        Swap(
            "gkd",
            "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss",
            _gkd,
            sample=_some_labels,
        ),
        Swap(
            "gold",
            "trl.experimental.gold.gold_trainer:GOLDTrainer.generalized_jsd_loss",
            _gold,
            sample=_some_labels,
        ),
    ),
)
apply, revert, patched = integration.apply, integration.revert, integration.patched
