"""Training state as trees of tensors and JSON values: the agent's and the random streams'."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ppo_fast.loop.model.agent import Agent

Tree = dict[str, Any]
# Options that may differ on resume, because they do not affect training.
FREE = {
    "out",
    "quick",
    "updates",
    "compare",
    "save_every",
    "keep_checkpoints",
    "resume",
    "overwrite",
    "tensorboard",
    "track",
    "save_transitions",
    "transitions",  # their digest is among the prompts
    "data",  # so is that of its prompts and columns
    "prompt_field",
    "teacher",  # its weights have a digest
    "data_split",
    "http_timeout",
    "http_retries",
    "eval_every",  # what it holds out of training is missing among the prompts
    "eval_data",
    "eval_split",
    "eval_prompts",
    "eval_samples",
}


def trainable(agent: Agent) -> dict[str, Tensor]:
    """The trainable parameters by name, sharded or not."""
    names = [
        f"{kind}.{name}"
        for kind, module in agent.modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    return dict(zip(names, agent.parameters, strict=True))


def agent_state(agent: Agent) -> Tree:
    """Weights, optimiser, skipped steps and halved micro-batches.

    Shards are gathered, so every rank must ask. The optimiser's state is by parameter name.
    """
    optimizer, named, full = agent.optimizer, trainable(agent), _full(agent)
    moments = {name: optimizer.state.get(p, {}) for name, p in named.items()}
    return {
        "halved": agent.memory.halved,
        "skips": agent.skips,
        "weights": {name: full(p.detach()) for name, p in named.items()},
        "optimizer": {name: {k: full(x) for k, x in s.items()} for name, s in moments.items()},
        "lr": [group["lr"] for group in optimizer.param_groups],
    }


def load_agent_state(agent: Agent, state: Tree) -> None:
    """Put the agent where `agent_state` found it; it takes the tensors of `state` over."""
    named = trainable(agent)
    _require_same_tensors(named, state["weights"])
    split = _split_like(agent)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(split(state["weights"][name], p))
    moments = {
        p: {k: split(x, p) for k, x in state["optimizer"][name].items()}
        for name, p in named.items()
    }
    ordered = [p for group in agent.optimizer.param_groups for p in group["params"]]
    groups = agent.optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, state["lr"], strict=True):
        group["lr"] = lr
    agent.optimizer.load_state_dict(
        {
            "state": {i: s for i, p in enumerate(ordered) if (s := moments[p])},
            "param_groups": groups,
        }
    )
    agent.memory.halved, agent.skips = state["halved"], state["skips"]


def digest_of_frozen(agent: Agent) -> str:
    """The sha256 of every frozen weight: the base under the trained ones, and the reference."""
    critic = [] if agent.critic is None else [agent.critic]
    return _digest(agent, [agent.policy.model, agent.reference.model, *critic])


def digest_of_teacher(agent: Agent) -> str | None:
    """The sha256 of a teacher's weights; None without one."""
    return None if agent.teacher is None else _digest(agent, [agent.teacher.model])


def _digest(agent: Agent, modules: list[nn.Module]) -> str:
    """The sha256 of the frozen weights of some modules, each weight once."""
    digest, seen, full = hashlib.sha256(), set(), _full(agent)
    for module in modules:
        for name, p in module.named_parameters():
            if p.requires_grad or id(p) in seen:  # towers share what is frozen
                continue
            seen.add(id(p))
            digest.update(f"{name} {p.dtype} {list(p.shape)} ".encode())
            digest.update(
                full(p.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
    return digest.hexdigest()


def _full(agent: Agent) -> Callable[[Tensor], Tensor]:
    """Function that gathers a tensor's shards."""
    if not agent.ranks.sharded:
        return lambda x: x
    from ppo_fast.loop.ranks.sharding import full

    return full


def _split_like(agent: Agent) -> Callable[[Tensor, Tensor], Tensor]:
    """Function that shards a whole tensor like another one."""
    if not agent.ranks.sharded:
        return lambda x, like: x
    from ppo_fast.loop.ranks.sharding import split_like

    return split_like


def _require_same_tensors(named: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    ours, theirs = ({k: (v.dtype, v.shape) for k, v in x.items()} for x in (named, saved))
    if ours != theirs:
        name = min(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        raise ValueError(
            f"resume: trainable weight {name!r} is {ours.get(name, 'absent')} in the model,"
            f" {theirs.get(name, 'absent')} in the checkpoint"
        )


def random_state(device: torch.device, sampling: Generator, shuffling: Generator) -> Tree:
    """The random streams of the run, torch, CUDA, NumPy and Python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "sampling": sampling.get_state(),
        "shuffling": shuffling.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def set_random_state(
    device: torch.device, sampling: Generator, shuffling: Generator, state: Tree
) -> None:
    """Put every stream where `random_state` found it."""
    sampling.set_state(state["sampling"])
    shuffling.set_state(state["shuffling"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
