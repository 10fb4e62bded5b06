"""What a step of the trainer changes, in one tree, and what must not change between two runs."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.loop.model.agent import Agent

if TYPE_CHECKING:
    from ppo_fast.loop.trainer import Trainer

Tree = dict[str, Any]
# Options that a resumed run may be given anew: they move no number of an update.
FREE = {
    "out",
    "quick",
    "updates",
    "compare",
    "save_every",
    "keep_checkpoints",
    "resume",
    "tensorboard",
    "save_transitions",
    "transitions",  # their digest is among the prompts
}


def trainable(agent: Agent) -> dict[str, Tensor]:
    """The trainable parameters by name, in the optimiser's order, sharded or not."""
    modules = {"policy": agent.policy.model, "critic": agent.critic}
    names = [
        f"{kind}.{name}"
        for kind, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    ]
    return dict(zip(names, agent.parameters, strict=True))


def capture(trainer: Trainer) -> Tree:
    """Everything that steps change, as tensors and JSON values; tensors are the live ones.

    Shards are gathered, so every rank must ask. The optimiser's state is by parameter name. The
    learning rate's schedule is a function of `updates`; log and samples are cut back to that
    number by whoever restores.
    """
    optimizer, named = trainer.agent.optimizer, trainable(trainer.agent)
    full = _full(trainer.agent)
    moments = {name: optimizer.state.get(p, {}) for name, p in named.items()}
    reward: Any = trainer.reward
    return {
        "updates": trainer.updates,
        "kl_coef": trainer.kl_coef,
        "loss_kl_coef": trainer.loss_kl_coef,
        "halved": trainer.agent.halved,
        "skips": trainer.agent.skips,
        "weights": {name: full(p.detach()) for name, p in named.items()},
        "optimizer": {name: {k: full(x) for k, x in s.items()} for name, s in moments.items()},
        "lr": [group["lr"] for group in optimizer.param_groups],
        "prompts": trainer.prompts.state_dict(),
        "random": _random_state(trainer),
        "reward": reward.state_dict() if hasattr(reward, "state_dict") else None,
    }


def restore(trainer: Trainer, state: Tree) -> None:
    """Put the trainer where `capture` found it; the trainer takes the tensors of `state` over."""
    agent = trainer.agent
    named = trainable(agent)
    _require_same_tensors(named, state["weights"])
    split = _split_like(agent)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(split(state["weights"][name], p))
    moments = {
        i: {k: split(x, p) for k, x in state["optimizer"][name].items()}
        for i, (name, p) in enumerate(named.items())
    }
    groups = agent.optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, state["lr"], strict=True):
        group["lr"] = lr
    agent.optimizer.load_state_dict(
        {"state": {i: s for i, s in moments.items() if s}, "param_groups": groups}
    )
    agent.halved, agent.skips = state["halved"], state["skips"]
    trainer.updates = state["updates"]
    trainer.kl_coef, trainer.loss_kl_coef = state["kl_coef"], state["loss_kl_coef"]
    trainer.prompts.load_state_dict(state["prompts"])
    if state["reward"] is not None:
        reward: Any = trainer.reward
        reward.load_state_dict(state["reward"])
    _set_random_state(trainer, state["random"])


def identity(trainer: Trainer) -> Tree:
    """What a checkpoint and the run that resumes from it must have in common, JSON values.

    The options that move the mathematics, the prompts, and a sha256 over every frozen weight: the
    base model under the trained weights, and the reference.
    """
    options = dataclasses.asdict(trainer.config)
    used = {"device": trainer.device.type, "backend": trainer.backend}
    kept = {k: v for k, v in (options | used).items() if k not in FREE}
    return kept | {
        "the prompts' sha256": trainer.prompts.digest(),
        "the frozen weights' sha256": _digest_of_frozen(trainer.agent),
    }


def _digest_of_frozen(agent: Agent) -> str:
    digest, seen, full = hashlib.sha256(), set(), _full(agent)
    for module in (agent.policy.model, agent.reference.model, agent.critic):
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
    """What makes a tensor of the agent whole."""
    if not agent.ranks.sharded:
        return lambda x: x
    from ppo_fast.loop.ranks.sharding import full

    return full


def _split_like(agent: Agent) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes of a whole tensor one that is sharded as another."""
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


def _random_state(trainer: Trainer) -> Tree:
    kind, keys, *rest = np.random.get_state()
    cuda = trainer.device.type == "cuda"
    return {
        "sampling": trainer.sampling.get_state(),
        "shuffling": trainer.shuffling.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(trainer.device) if cuda else None,
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": random.getstate(),
    }


def _set_random_state(trainer: Trainer, state: Tree) -> None:
    trainer.sampling.set_state(state["sampling"])
    trainer.shuffling.set_state(state["shuffling"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], trainer.device)
    np.random.set_state(tuple(state["numpy"]))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
