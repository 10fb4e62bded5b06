"""Teacher of a run: a frozen model over the policy's vocabulary, checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.sequences import Sequences, context_of
from ppo_fast.loop.model.layers import UnsupportedModelError
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.model.trial import check_is_causal_lm, try_model


def teacher_tower(
    model: Any,
    policy: Tower,
    config: TrainConfig,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tower:
    """The tower of a teacher, frozen in place, in the policy's precision.

    Its hidden size may be another. Raises UnsupportedModelError, which begins with "teacher", for
    a model that the loop cannot read, and OptionError for another vocabulary.
    """
    if model is policy.model:
        raise OptionError("teacher must be another model than the one that is trained, got that")
    try:
        check_is_causal_lm(model)
        ours, theirs = (m.get_output_embeddings().weight for m in (policy.model, model))
        require_vocabulary(type(model).__name__, len(ours), len(theirs))
        if ours.device != theirs.device:
            raise OptionError(f"teacher must be on {ours.device}, got one on {theirs.device}")
        model.eval().requires_grad_(False)
        if config.dtype == "bfloat16":
            for p in model.parameters():
                p.data = p.data.bfloat16()
        tower = Tower(model, 0, autocast)
        with torch.no_grad():
            try_model(tower, sampled=False)
            if config.head == "linear":
                tower.product()
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"teacher: {error}") from error
    return tower


def require_vocabulary(name: str, size: int | None, own: int | None) -> None:
    """Raise OptionError for a teacher `name` whose `own` size is not the policy's `size`.

    None is a size that is not known.
    """
    if size is not None and own is not None and size != own:
        raise OptionError(
            f"teacher must have the vocabulary of the model, {size} tokens, got {name} with {own}"
        )


def require_context(tower: Tower, seqs: Sequences) -> None:
    """Raise OptionError for sequences that the teacher cannot read whole."""
    context, width = context_of(tower.model.config), seqs.tokens.shape[1]
    if context is not None and width > context:
        raise OptionError(
            f"teacher must read the {width} tokens of the longest prompt and completion, got one"
            f" with a context of {context}"
        )
