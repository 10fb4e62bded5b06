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

    def forward(
        self, seqs: Sequences, trunk: Tensor | None, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The training forward: log-prob, entropy and value of each response token, (B, R).

        The logits (n, V) of the kept tokens are this call's own, so their gradient may overwrite
        them. All three are 0 at the tokens that are not kept.
        """
        logits, hidden = self.policy.logits(seqs, trunk)
        scored = ppo_fast.token_logprobs(
            logits,
            seqs.response[seqs.mask],
            temperature=self.config.temperature,
            inplace_backward=backend != "reference",
            backend=backend,
        )
        values = self.critic(hidden, seqs, trunk)
        logprobs, entropy = scored.logprobs, scored.entropy
        return seqs.unflatten(logprobs), seqs.unflatten(entropy), seqs.unflatten(values)

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
            logits, bottom = self.reference.logits_and_trunk(rows)
            scored = ppo_fast.token_logprobs(
                logits,
                rows.response[rows.mask],
                temperature=self.config.temperature,
                backend=backend,
            )
            del logits
            ref[part] = rows.unflatten(scored.logprobs)
            if bottom is not None:
                if trunk is None:
                    trunk = bottom.new_zeros(len(seqs.tokens), *bottom.shape[1:])
                trunk[part] = bottom
            with torch.enable_grad():
                logprobs, _, value = self.forward(rows, bottom, backend)
            old[part], values[part] = logprobs.detach(), value.detach()
        return Scored(old, ref, values, trunk)
