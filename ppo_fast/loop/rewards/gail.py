"""A reward trained alongside the policy: a discriminator between its texts and demonstrations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from ppo_fast.loop.rewards.frozen import Encoder


class Discriminator:
    """Generative adversarial imitation (Ho and Ermon 2016) on sentence embeddings.

    D is the probability that a text is a demonstration; the reward is -log(1 - D), at least 0.
    Every call scores its completions first and then takes one step of D on them against the column
    `reference`, so the reward is a moving target and falls as D learns.
    """

    def __init__(self, encoder: Encoder, seed: int, lr: float = 3e-3) -> None:
        self.encoder = encoder
        width, device = encoder.model.config.hidden_size, encoder.model.device
        with torch.random.fork_rng(devices=[]):  # the policy's random numbers stay its own
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 1))
        self.net = net.to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)

    def __call__(
        self, prompts: list[str], completions: list[str], reference: list[str]
    ) -> list[float]:
        fake, real = self.encoder(completions), self.encoder(reference)
        with torch.no_grad():
            rewards = softplus(self.net(fake).squeeze(1)).tolist()
        with torch.enable_grad():
            logits = self.net(torch.cat([real, fake])).squeeze(1)
            labels = torch.cat([logits.new_ones(len(real)), logits.new_zeros(len(fake))])
            self.optimizer.zero_grad(set_to_none=True)
            binary_cross_entropy_with_logits(logits, labels).backward()
            self.optimizer.step()
        return rewards

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and Adam's moments, flat: every entry a tensor."""
        out = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            out |= {f"adam.{i}.{k}": v for k, v in state.items()}
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        net: dict[str, Tensor] = {}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, name = key.split(".", 1)
            if kind == "net":
                net[name] = value
            else:
                index, name = name.split(".", 1)
                moments.setdefault(int(index), {})[name] = value.clone()
        self.net.load_state_dict(net)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
