"""The trainable state of a run, and the scoring pass over a batch of finished sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.models import freeze_below
from ppo_fast.loop.policy import Critic, Sequences, Tower


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

    def __init__(self, model: Any, config: TrainConfig) -> None:
        self.config = config
        # eval mode throughout: dropout would move the ratio of unchanged weights away from 1
        self.policy = Tower(model.eval(), freeze_below(model, config.train_layers))
        self.reference = self.policy.copy()
        self.reference.model.requires_grad_(False)
        body = self.policy.copy() if config.critic == "separate" else None
        weight = model.get_output_embeddings().weight
        # fp32 for half-precision models, fp64 for fp64 ones, as the ops compute
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.critic = Critic(weight.shape[1], body, weight.device, self.dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters += [p for p in self.critic.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, eps=1e-5, weight_decay=0.0, fused=True
        )

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming optimiser steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

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
        options: dict[str, Any] = {"temperature": self.config.temperature, "backend": backend}
        tokens = seqs.flat(seqs.response)
        if logits is not None:
            return ppo_fast.token_logprobs(logits, tokens, **options).logprobs
        head = tower.head()
        weight = head.pop("weight")
        return ppo_fast.linear_token_logprobs(hidden, weight, tokens, **head, **options).logprobs

    def policy_loss(
        self, out: Forward, seqs: Sequences, old: Tensor, advantages: Tensor, backend: str,
        **options: Any,
    ) -> ppo_fast.HeadLoss:  # fmt: skip
        """The policy loss over the n kept tokens; `old` and `advantages` (n,)."""
        options |= {"temperature": self.config.temperature, "backend": backend}
        options["cu_seqlens"] = seqs.cu_seqlens()
        tokens = seqs.flat(seqs.response)
        if out.logits is not None:
            # The logits are this call's own: their gradient may overwrite them.
            own = backend != "reference"
            return ppo_fast.logits_ppo_loss(
                out.logits, tokens, old, advantages, inplace=own, **options
            )
        head = self.policy.head()
        weight = head.pop("weight")
        return ppo_fast.linear_ppo_loss(
            out.hidden, weight, tokens, old, advantages, **head, **options
        )

    @torch.no_grad()
    def score(self, seqs: Sequences, parts: list[Tensor], backend: str) -> Scored:
        """Score finished sequences with policy, reference and critic.

        `parts` are the micro-batches of the coming first epoch: the old log-probs come from the
        training forward on exactly these rows, with gradients recorded (kernels may be chosen by
        that), so that the first ratio is 1 to the last bit.
        """
        zeros = torch.zeros(seqs.mask.shape, dtype=self.dtype, device=seqs.mask.device)
        old, ref, values = zeros, zeros.clone(), zeros.clone()
        trunk: Tensor | None = None
        for part in parts:
            rows = seqs.rows(part)
            if not rows.mask.any():
                continue
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
