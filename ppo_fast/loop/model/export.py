"""Export of the trained model, as folders that `from_pretrained` loads."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ppo_fast.loop.files import naming, require_folder
from ppo_fast.loop.model.agent import Agent

FOLDERS = ("model", "adapter")


def export(agent: Agent, tokenizer: Any, folder: Path) -> Path:
    """Write `folder`/model, on the first rank; returns the folder written.

    Adapters go to `folder`/adapter and, unless `lora_merge` is off, into `folder`/model too. The
    shards of fsdp2 are gathered first, which takes every rank: in a run that an exception ends,
    they are not, and nothing is written.
    """
    model, adapted, config = agent.policy.model, agent.adapted, agent.config
    state = None
    if agent.ranks.sharded and sys.exc_info()[0] is None:
        from ppo_fast.loop.ranks.sharding import full_state

        state = full_state(model)
    if not agent.ranks.first or (agent.ranks.sharded and state is None):
        return folder / "model"
    if adapted is None:
        save_model(model, tokenizer, folder / "model", state)
        return folder / "model"
    save_model(adapted, tokenizer, folder / "adapter")
    if not config.lora_merge:
        return folder / "adapter"
    save_model(copy.deepcopy(adapted).merge_and_unload(), tokenizer, folder / "model")
    return folder / "model"


def save_model(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write a folder that `from_pretrained` loads; a run cut short leaves the former one whole.

    `state` stands in for the model's own weights where those are sharded. Raises OSError, which
    names the folder, where the disk does not take it; nothing half written stays.
    """
    fresh, former = require_model_folder(folder)
    if not folder.exists() and former.exists():  # a kill came between the two renames
        former.rename(folder)
    for leftover in (fresh, former):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        with naming(folder):
            model.save_pretrained(fresh, state_dict=state)
            tokenizer.save_pretrained(fresh)
        if folder.exists():
            folder.rename(former)
        fresh.rename(folder)
    except BaseException:
        if not folder.exists() and former.exists():
            former.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)  # the failure at hand is the one to tell
        raise
    if former.exists():
        shutil.rmtree(former)


def require_model_folder(folder: Path) -> tuple[Path, Path]:
    """Places next to `folder` for a new model being written and for the former one.

    Raises OSError where one of the three is there and no folder.
    """
    places = [folder.with_name(folder.name + end) for end in ("", ".partial", ".former")]
    for place in places:
        require_folder(place)
    return places[1], places[2]
