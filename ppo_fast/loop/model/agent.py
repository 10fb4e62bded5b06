"""The trainable state of a run, and the scoring pass over a batch of finished sequences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.sequences import Rollout, Sequences
from ppo_fast.loop.model.adapters import add_adapters
from ppo_fast.loop.model.layers import freeze_below
from ppo_fast.loop.model.memory import halves, recompute, with_room
from ppo_fast.loop.model.tower import Critic, Tower
from ppo_fast.loop.model.trial import try_model
from ppo_fast.loop.model.weights import check_trainable, widen
from ppo_fast.loop.ranks.ranks import Ranks
from ppo_fast.loop.sampling.generate import generate

_SKIPS = 3


class NonFiniteGradientError(RuntimeError):
    """The gradient's norm was not finite in several optimiser steps in a row."""


class Scored(NamedTuple):
    """Constants of one batch: old policy, reference and value of each response token, (B, R).

    `trunk` (B, P + R, H) is the frozen layers' output, None when nothing is frozen.
    """

    old: Tensor
    ref: Tensor
    values: Tensor
    trunk: Tensor | None


class Forward(NamedTuple):
    """Last hidden states (n, H), logits (n, V) where they are formed, and values (n,)."""

    hidden: Tensor
    logits: Tensor | None
    values: Tensor


class Agent:
    """Policy, frozen reference, critic and their optimiser."""

    def __init__(
        self, model: Any, config: TrainConfig, ranks: Ranks | None = None, sampled: bool = True
    ) -> None:
        """`sampled` says that the policy will draw completions; stored transitions need none.

        Raises UnsupportedModelError for a model that the loop cannot train, before anything else.
        """
        self.config, self.ranks = config, ranks or Ranks()
        self.halved = False
        self.skips = 0  # optimiser steps in a row whose gradient was not finite
        # eval mode throughout: dropout would move the ratio of unchanged weights away from 1
        self.policy, self.reference = self._towers(model.eval())
        with torch.no_grad():
            try_model(self.policy, sampled)
            if config.head == "linear":
                self.policy.product(), self.reference.product()
        body = self.policy.copy() if config.critic == "separate" else None
        weight = model.get_output_embeddings().weight
        # fp32 for half-precision models, fp64 for fp64 ones, as the ops compute
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.critic = Critic(weight.shape[1], body, weight.device, self.dtype)
        trained = [self.policy] if body is None else [self.policy, body]
        if config.gradient_checkpointing:
            for tower in trained:
                recompute(tower.layers, tower.split)
        self.whole: Callable[[Any], AbstractContextManager[object]] = nullcontext
        if self.ranks.sharded:
            from ppo_fast.loop.ranks.sharding import shard, whole

            self.whole = whole
            for tower in (*trained, self.reference):
                shard(tower.model, list(tower.layers))
            shard(self.critic.head, [])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters += [p for p in self.critic.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, eps=1e-5, weight_decay=0.0, fused=True
        )

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
        clip = torch.nn.utils.clip_grad_norm_
        if not self.ranks.sharded:  # there the backward has summed
            self.ranks.sum_([p.grad for p in self.parameters if p.grad is not None])
        norm = clip(self.parameters, self.config.max_grad_norm)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(value):
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
        mine = [self.ranks.share(rows) for rows in parts]
        return [half for rows in mine for half in halves(rows)] if self.halved else mine

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming optimiser steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def sample(self, tokens: Tensor, attention: Tensor, **options: Any) -> Rollout:
        """`generate` for all prompts, (B, P): each rank those of its share, for every rank."""
        rows = self.ranks.share(torch.arange(len(tokens), device=tokens.device))
        with self.autocast(), self.whole(self.policy.model):
            mine = generate(
                self.policy.model,
                tokens[rows],
                attention[rows],
                rows=rows,
                total=len(tokens),
                **options,
            )
        # Without an EOS every completion has full length, and none is padded.
        gather, end = self.ranks.gather, next(iter(options["eos"]), 0)
        seqs = Sequences(*(gather(x, f) for x, f in zip(mine.seqs, (end, 0, 0), strict=True)))
        return Rollout(seqs, gather(mine.logprobs, 0))

    def forward(self, seqs: Sequences, trunk: Tensor | None) -> Forward:
        """The training forward over the n kept tokens."""
        logits: Tensor | None = None
        if self.config.head == "logits":
            logits, hidden = self.policy.logits(seqs, trunk)
        else:
            hidden = self.policy.hidden(seqs, trunk)
        return Forward(hidden, logits, self.critic(hidden, seqs, trunk))

    def logprobs(
        self, tower: Tower, hidden: Tensor, logits: Tensor | None, seqs: Sequences, backend: str
    ) -> Tensor:
        """Log-probability of each kept token, (n,), from the logits or else the hidden states."""
        temperature = self.config.temperature
        tokens = seqs.flat(seqs.response)
        if logits is not None:
            return ppo_fast.token_logprobs(
                logits, tokens, temperature=temperature, backend=backend
            ).logprobs
        with self.autocast():
            return ppo_fast.linear_token_logprobs(
                hidden, tokens=tokens, backend=backend, **self._head(tower)
            ).logprobs

    def _head(self, tower: Tower) -> dict[str, Any]:
        """The output head as the linear ops take it, at the temperature of the run."""
        head = tower.head()
        head["temperature"] = self.config.temperature * head.get("temperature", 1.0)
        return head

    def policy_loss(
        self,
        out: Forward,
        seqs: Sequences,
        old: Tensor,
        advantages: Tensor,
        backend: str,
        **options: Any,
    ) -> ppo_fast.HeadLoss:
        """The policy loss over the n kept tokens; `old` and `advantages` (n,)."""
        options |= {"backend": backend, "cu_seqlens": seqs.cu_seqlens()}
        tokens = seqs.flat(seqs.response)
        if out.logits is not None:
            # The logits are this call's own: their gradient may overwrite them.
            own = backend != "reference"
            return ppo_fast.logits_ppo_loss(
                out.logits,
                tokens,
                old,
                advantages,
                temperature=self.config.temperature,
                inplace=own,
                **options,
            )
        head = self._head(self.policy)
        weight = head.pop("weight")
        with self.autocast():
            return ppo_fast.linear_ppo_loss(
                out.hidden, weight, tokens, old, advantages, **head, **options
            )

    def score(self, seqs: Sequences, parts: list[Tensor], backend: str) -> Scored:
        """Score finished sequences with policy, reference and critic.

        `parts` are the micro-batches of the coming first epoch: the old log-probs come from the
        training forward on exactly these rows, with gradients recorded (kernels may be chosen by
        that), so that the first ratio is 1 to the last bit. Ranks score their share, and add up.
        """
        scored = with_room(self, lambda: self._score(seqs, self.pieces(parts), backend))
        self.ranks.sum_([scored.old, scored.ref, scored.values])
        self.ranks.sum_([] if scored.trunk is None else [scored.trunk])
        return scored

    @torch.no_grad()
    def _score(self, seqs: Sequences, parts: list[Tensor], backend: str) -> Scored:
        zeros = torch.zeros(seqs.mask.shape, dtype=self.dtype, device=seqs.mask.device)
        old, ref, values = zeros, zeros.clone(), zeros.clone()
        trunk: Tensor | None = None
        for part in parts:
            rows = seqs.rows(part)
            scored, bottom = self._reference_logprobs(rows, backend)
            ref[part] = rows.unflatten(scored)
            if bottom is not None:
                if trunk is None:
                    trunk = bottom.new_zeros(len(seqs.tokens), *bottom.shape[1:])
                trunk[part] = bottom
            with torch.enable_grad():
                out = self.forward(rows, bottom)
            logprobs = self.logprobs(self.policy, out.hidden, out.logits, rows, backend)
            old[part], values[part] = rows.unflatten(logprobs), rows.unflatten(out.values.detach())
        return Scored(old, ref, values, trunk)

    def _reference_logprobs(self, rows: Sequences, backend: str) -> tuple[Tensor, Tensor | None]:
        tower = self.reference
        if self.config.head == "logits":
            (logits, hidden), bottom = tower.with_trunk(lambda: tower.logits(rows))
            return self.logprobs(tower, hidden, logits, rows, backend), bottom
        hidden, bottom = tower.with_trunk(lambda: tower.hidden(rows))
        return self.logprobs(tower, hidden, None, rows, backend), bottom
