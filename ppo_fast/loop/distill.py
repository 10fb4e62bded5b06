"""Teacher that a run's options name: its checks before anything is loaded, and its loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.log import recorder
from ppo_fast.loop.model.load import Size, from_outside, load_tokenizer, load_weights, size_of
from ppo_fast.loop.model.teacher import require_vocabulary


def check(config: TrainConfig, size: Size) -> Size:
    """The size of the model, with the teacher's context where that is less.

    Raises OptionError where there is no such teacher, or one of another vocabulary.
    """
    own = size_of(_place(config), "teacher")
    require_vocabulary(repr(config.teacher), size.vocabulary, own.vocabulary)
    contexts = [x for x in (size.context, own.context) if x is not None]
    return size._replace(context=min(contexts, default=None))


def require_kernels(backend: str, config: TrainConfig) -> None:
    """Raise OptionError for the backend that has no kernels for whole distributions."""
    if backend == "cuda" and config.distill not in (None, "pg"):
        raise OptionError(
            f"backend must be triton, cpu or reference with distill {config.distill}, got"
            f" {backend!r}"
        )


def require_given(config: TrainConfig, teacher: Any) -> None:
    """Raise OptionError where a teacher is given to no purpose, or lacks."""
    kind = config.distill
    if (teacher is None) != (kind is None):
        wanted = "absent without distill" if kind is None else f"given with distill {kind}"
        raise OptionError(f"teacher must be {wanted}, got {type(teacher).__name__}")


def check_tokenizer(
    config: TrainConfig, tokenizer: Any, texts: list[str], report: Callable[[str], None]
) -> None:
    """Report that the teacher's tokenizer is the model's, or that it has none of its own.

    Raises OptionError where the two give a token different ids.
    """
    place = _place(config)
    try:
        own = load_tokenizer(place, texts)
    except (OSError, ValueError):
        own = None
    report(f"teacher {config.teacher}: {_agreement(config, tokenizer, own)}")


def load_teacher(
    config: TrainConfig, tokenizer: Any, device: torch.device, report: Callable[[str], None]
) -> Any:
    """The teacher that the options name, None where they name none."""
    if config.distill is None:
        return None
    place = _place(config)
    report(f"loading teacher {config.teacher}")
    with from_outside("teacher", place):
        return load_weights(place, tokenizer, device)


def _agreement(config: TrainConfig, tokenizer: Any, own: Any) -> str:
    """A line on two tokenizers; raises OptionError where they give a token two ids."""
    if own is None:
        return "it has no tokenizer of its own, and its ids are taken for the model's"
    ours, theirs = tokenizer.get_vocab(), own.get_vocab()
    differ = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if differ:
        token = min(differ)
        raise OptionError(
            f"teacher must have the tokenizer of the model, got {config.teacher!r}, whose id of"
            f" {token!r} is {theirs.get(token)} where the model's is {ours.get(token)}"
            f" ({len(differ)} tokens differ)"
        )
    return f"its tokenizer is the model's, {len(ours)} tokens"


def _place(config: TrainConfig) -> str:
    """The model that `teacher` names: of a run's folder the one in it."""
    if config.teacher is None:
        raise OptionError(f"teacher must be given with distill {config.distill}, got None")
    folder = Path(config.teacher)
    if not (folder / recorder.LOG).is_file():
        return config.teacher
    if not (folder / "model" / "config.json").is_file():
        raise OptionError(
            f"teacher must be a run with a model in it, got {config.teacher!r}, which has none:"
            " runs write it when they end"
        )
    return str(folder / "model")
