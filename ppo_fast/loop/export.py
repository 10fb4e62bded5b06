"""Writing what was trained as folders that `from_pretrained` loads."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

from ppo_fast.loop.agent import Agent
from ppo_fast.loop.models import save_model


def export(agent: Agent, tokenizer: Any, folder: Path) -> Path:
    """Write `folder`/model, on the first rank; returns the folder written.

    Adapters go to `folder`/adapter and, unless `lora_merge` is off, into `folder`/model too. The
    shards of fsdp2 are gathered first, which takes every rank: in a run that an exception ends,
    they are not, and nothing is written.
    """
    model, adapted, config = agent.policy.model, agent.adapted, agent.config
    state = None
    if agent.ranks.sharded and sys.exc_info()[0] is None:
        from ppo_fast.loop.sharding import full_state

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
