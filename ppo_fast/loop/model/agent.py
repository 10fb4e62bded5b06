"""Agent: policy, frozen reference, critic and their optimiser, and a teacher."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.model.adapters import add_adapters
from ppo_fast.loop.model.layers import freeze_below
from ppo_fast.loop.model.memory import MemoryGuard, recompute
from ppo_fast.loop.model.teacher import teacher_tower
from ppo_fast.loop.model.tower import Critic, Tower
from ppo_fast.loop.model.trial import try_model
from ppo_fast.loop.model.weights import check_trainable, widen
from ppo_fast.loop.ranks.ranks import Ranks

_SKIPS = 3


class NonFiniteGradientError(RuntimeError):
    """The gradient's norm was not finite in several optimiser steps in a row."""


class Agent:
    """Policy, frozen reference, critic and their optimiser, and a frozen teacher where one is."""

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        ranks: Ranks | None = None,
        sampled: bool = True,
        teacher: Any = None,
    ) -> None:
        """`sampled` says that the policy will draw completions; stored transitions need none.

        Raises UnsupportedModelError for a model that the loop cannot train, before anything else.
        """
        self.config, self.ranks = config, ranks or Ranks()
        self.memory = MemoryGuard(self.discard, self.ranks.sharded)
        self.skips = 0  # optimiser steps in a row whose gradient was not finite
        # eval mode throughout: dropout would move the ratio of unchanged weights away from 1
        self.policy, self.reference = self._towers(model.eval())
        with torch.no_grad():
            try_model(self.policy, sampled)
            if config.head == "linear":
                self.policy.product(), self.reference.product()
        self.teacher: Tower | None = None  # whole on every rank, under fsdp2 too
        if teacher is not None:
            self.teacher = teacher_tower(teacher, self.policy, config, self.autocast)
        weight = model.get_output_embeddings().weight
        # fp32 for half-precision models, fp64 for fp64 ones, as the ops compute
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        trained = [self.policy]
        self.critic: Critic | None = None  # a baseline of groups needs none, nor a teacher alone
        if config.has_critic:
            body = self.policy.copy() if config.critic == "separate" else None
            self.critic = Critic(weight.shape[1], body, weight.device, self.dtype)
            trained += [] if body is None else [body]
        if config.gradient_checkpointing:
            for tower in trained:
                recompute(tower.layers, tower.split)
        self.whole: Callable[[Any], AbstractContextManager[object]] = nullcontext
        if self.ranks.sharded:
            from ppo_fast.loop.ranks.sharding import shard, whole

            self.whole = whole
            for tower in (*trained, self.reference):
                shard(tower.model, list(tower.layers))
            if self.critic is not None:
                shard(self.critic.head, [])
        self.parameters = [p for module in self.modules.values() for p in _trainable(module)]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.lr, eps=1e-5, fused=True)

    def temperature(self, tower: Tower) -> float:
        """The divisor of a tower's logits: a teacher may have one of its own."""
        own = self.config.distill_temperature if tower is self.teacher else None
        return self.config.temperature if own is None else own

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules that are trained, by name."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"policy": self.policy.model} | critic

    def _groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups: by learning rate, and matrices apart where weights decay."""
        c, found = self.config, dict[tuple[float, float], list[Tensor]]()
        for name, module in self.modules.items():
            lr = c.lr if name == "policy" or c.critic_lr is None else c.critic_lr
            for p in _trainable(module):
                found.setdefault((lr, c.weight_decay if p.dim() > 1 else 0.0), []).append(p)
        return [
            {"params": params, "lr": lr, "initial_lr": lr, "weight_decay": decay}
            for (lr, decay), params in found.items()
        ]

    def _towers(self, model: Any) -> tuple[Tower, Tower]:
        """Policy and frozen reference: a copy, or the policy with its adapters switched off."""
        config = self.config
        if config.lora_rank:
            self.adapted, split = add_adapters(model, config.lora_rank, config.train_layers)
        else:
            self.adapted, split = None, freeze_below(model, config.train_layers)
            check_trainable(model, config.train_layers)
        half = widen(model) or config.dtype == "bfloat16"
        self.precision = torch.bfloat16 if half else torch.float32
        self.autocast = functools.partial(
            torch.autocast, model.device.type, torch.bfloat16, enabled=half
        )
        if config.dtype == "bfloat16":
            for p in model.parameters():
                p.data = p.data if p.requires_grad else p.data.bfloat16()
        policy = Tower(model, split, self.autocast)
        if self.adapted is not None:
            return policy, Tower(model, split, self.autocast, self.adapted.disable_adapter)
        reference = policy.copy()
        reference.model.requires_grad_(False)
        return policy, reference

    def step(self) -> float | None:
        """Sum the gradient over the ranks, clip it and apply it; returns its norm.

        Every rank sees the same norm. One that is not finite changes nothing and gives None; the
        third in a row raises `NonFiniteGradientError`.
        """
        utils, most = torch.nn.utils, self.config.max_grad_norm
        if not self.ranks.sharded:  # there the backward has summed
            self.ranks.sum_([p.grad for p in self.parameters if p.grad is not None])
        norm = utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(value):
            if value > 0.999 * most:  # below, the factor is 1: a pass over every gradient less
                utils.clip_grads_with_norm_(self.parameters, most, norm)
            self.optimizer.step()
            self.skips = 0
            return value
        self.discard()
        self.skips += 1
        if self.skips == _SKIPS:
            raise NonFiniteGradientError(
                f"the gradient's norm was {value} in {_SKIPS} optimiser steps in a row, all"
                " skipped: lower lr, or look for rewards or weights that overflow"
            )
        return None

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def pieces(self, parts: list[Tensor]) -> list[Tensor]:
        """This rank's rows of each micro-batch, in halves once memory has run out."""
        return self.memory.pieces([self.ranks.share(rows) for rows in parts])

    def set_lr(self, share: float) -> None:
        """Set the coming optimiser steps' learning rates, as a share of the options'."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]


def _trainable(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]
