"""Checks of a run's options before its model is loaded, which may take minutes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import ppo_fast
from ppo_fast._backend import select
from ppo_fast.loop import distill
from ppo_fast.loop.config import OptionError, TrainConfig
from ppo_fast.loop.data.transitions import require_readable
from ppo_fast.loop.files import require_file, require_folder
from ppo_fast.loop.log import recorder, trackers
from ppo_fast.loop.model import export
from ppo_fast.loop.model.adapters import require_peft
from ppo_fast.loop.model.layers import check_train_layers
from ppo_fast.loop.model.load import Size, size_of
from ppo_fast.loop.sampling.truncate import require_support


class RunExistsError(OptionError):
    """A folder holds a run, which is neither to be resumed nor to be overwritten."""


def check(config: TrainConfig, device: torch.device, first: bool) -> Size:
    """Check what needs neither data nor tokenizer nor weights; the size of the model.

    Its context is that of a teacher where that is less.

    Raises OptionError, which names the option and its value, and ModuleNotFoundError for a
    package that one needs. The `first` rank alone looks at the folder that it will write.
    """
    if config.lora_rank:
        require_peft()
    trackers.check(config)
    _check_backend(config, device)
    if config.transitions is not None:
        require_readable(config.transitions)
    if first:
        require_new(config)
        _check_places(config)
    size = size_of(config.model)
    if config.distill is not None:
        size = distill.check(config, size)
    if size.layers is not None:
        check_train_layers(config.train_layers, size.layers)
    context, new = size.context, config.max_new_tokens
    if context is not None and new >= context and config.transitions is None:
        raise OptionError(
            f"max_new_tokens must be below the {context} tokens of the model's context, got {new}"
        )
    return size


def _check_backend(config: TrainConfig, device: torch.device) -> None:
    asked = None if config.backend == "auto" else config.backend
    try:
        name = select("train", asked, torch.empty(0, device=device))
    except (ppo_fast.BackendUnavailableError, ValueError) as error:
        raise OptionError(str(error).removeprefix("train: ")) from error
    require_support(name, config)
    distill.require_kernels(name, config)


def _check_places(config: TrainConfig) -> None:
    """Raise OptionError where a folder or file of the run cannot be written."""
    with _naming("out", config.out):
        require_places(config.out)
        require_writable(config.out)
    samples = config.save_transitions
    if samples is not None:
        with _naming("save_transitions", samples):
            require_file(samples)
            require_writable(samples.parent)


@contextmanager
def _naming(option: str, value: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"{option} must be a place that can be written, got {value}: {error.strerror or error}"
        ) from error


def require_places(folder: Path) -> None:
    """Raise OSError where something else stands in the place of a file or folder of a run."""
    for name in recorder.FILES:
        require_file(folder / name)
    for name in export.FOLDERS:
        export.require_model_folder(folder / name)
    for name in ("checkpoints", "tensorboard"):
        require_folder(folder / name, link=True)


def require_writable(folder: Path) -> None:
    """Raise OSError unless a file can be made in `folder`, which is left as it was."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in made:
            if any(place.iterdir()):  # another run has begun there
                break
            place.rmdir()


def require_new(config: TrainConfig) -> None:
    """Raise `RunExistsError` for a run that is in the place of this one, and would be lost."""
    if config.resume or config.overwrite:
        return
    out = config.out
    logs = [path for name in recorder.LINES if _size(path := out / name)]
    folders = [out / name for name in ("checkpoints", *export.FOLDERS)]
    found = [*logs, *(path for path in folders if path.is_dir() and any(path.iterdir()))]
    if found:
        raise RunExistsError(
            f"out {out} holds a run ({', '.join(path.name for path in found)}): --resume goes on"
            " with it, --overwrite makes a new one in its place, or give another --out"
        )
    stored = config.save_transitions
    if stored is not None and _size(stored):
        raise RunExistsError(
            f"save_transitions {stored} is there: --overwrite writes another in its place"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
