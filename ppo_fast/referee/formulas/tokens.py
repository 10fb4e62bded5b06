"""Per-token quantities in fp64: log-probabilities, entropies, KL estimates.

KL estimates: J. Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppo_fast.referee.cases import Logits, Tokens
from ppo_fast.referee.formulas import Change, Exact, Reading

KL_WORDS = {
    "k1": "k1, log(new/ref)",
    "k2": "k2, half the square",
    "k3": "k3, ref/new − 1 − log(ref/new)",
    "abs": "the absolute log-ratio",
    "-k1": "k1 with its sign turned, log(ref/new)",
    "-k3": "k3 with its sign turned, new/ref − 1 − log(new/ref)",
}


def estimate(kind: str, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate of KL(new‖ref) from log(new/ref) of the sampled token, and its roundings' size."""
    if kind.startswith("-"):
        kind, gap = kind[1:], -gap
    size = gap.abs()
    if kind == "k1":
        value = gap
    elif kind == "abs":
        value = gap.abs()
    elif kind == "k2":
        value, size = gap.square() / 2, gap.square()
    else:
        value, size = (-gap).exp() - 1 + gap, (-gap).exp() * (2 + gap.abs()) + gap.abs() + 1
    return value, size.detach().nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class KL(Reading):
    """A KL estimate per token, and the gradient of its sum by the new log-probabilities.

    `gradient="k2"`: the value is the estimate's, the gradient k2's, which is that of the KL.
    """

    part: ClassVar[str] = "KL"
    paper: ClassVar[str] = "Schulman, joschu.net/blog/kl-approx.html"
    kind: str = "k3"
    gradient: str = "own"
    sign: float = 1.0
    input_clamp: float | None = None
    output_clamp: float | None = None

    def exact(self, batch: Tokens, eps: float) -> dict[str, Exact]:
        """`value` of unmasked tokens, and `gradient`."""
        new = batch.logprobs.double().clone().requires_grad_()
        gap = new - torch.where(batch.mask, batch.ref_logprobs, 0.0)
        value, size = self._value(gap)
        source = self._value(gap)[0] if self.gradient == "own" else gap.square() / 2
        (gradient,) = torch.autograd.grad(source[batch.mask].sum(), new)
        edge = torch.zeros_like(value)
        if self.output_clamp is not None:
            near = (value.abs() - self.output_clamp).abs() <= 64 * eps * size
            edge = torch.where(near, size, 0.0)
        keep = batch.mask
        slope = size + gap.abs().detach() + 1
        if self.output_clamp is not None:
            slope = torch.where(gradient == 0, 0.0, slope)
            size = torch.where(value.abs() >= self.output_clamp, self.output_clamp, size)
        return {
            "value": Exact(self.sign * value.detach(), size, 0.0, keep),
            "gradient": Exact(self.sign * gradient, slope, edge.detach(), keep),
        }

    def _value(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        if self.input_clamp is not None:
            gap = gap.clamp(-self.input_clamp, self.input_clamp)
        value, size = estimate(self.kind, gap)
        if self.output_clamp is not None:
            value = value.clamp(-self.output_clamp, self.output_clamp)
        return value, size

    def changes(self) -> list[Change]:
        """Other estimators, signs, gradients and clamps."""
        clamps = [
            Change("KL: the estimate is clamped to ±10", {"output_clamp": 10.0}, "kl.clamp"),
            Change(
                "KL: the log-ratio is clamped to ±20, and the estimate to ±10",
                {"input_clamp": 20.0, "output_clamp": 10.0},
                "kl.clamp",
            ),
            Change("KL: the log-ratio is clamped to ±20", {"input_clamp": 20.0}, "kl.clamp"),
        ]
        named = [Change(f"KL: {words}", {"kind": k}, f"kl.{k}") for k, words in KL_WORDS.items()]
        ways = [
            Change("KL: the value's sign is turned", {"sign": -1.0}, "kl.sign"),
            Change("KL: the gradient is k2's, not its own", {"gradient": "k2"}, "kl.gradient"),
            Change("KL: the gradient is its own, not k2's", {"gradient": "own"}, "kl.gradient"),
        ]
        return self.others([*named, *ways, *clamps])


@dataclass(frozen=True)
class LogProbs(Reading):
    """log softmax(z / temperature) of the label, and the gradient of the sum by the logits."""

    part: ClassVar[str] = "log-probabilities"
    paper: ClassVar[str] = "the definition: log softmax(logits / temperature)[label]"
    temperature: str = "divides"
    sign: float = 1.0

    def exact(self, batch: Logits, eps: float) -> dict[str, Exact]:
        """`value` `(N,)` and `gradient` `(N, V)`."""
        z = batch.logits.double().clone().requires_grad_()
        x = _scaled(z, batch.temperature, self.temperature)
        value = x.gather(-1, batch.labels[:, None])[:, 0] - torch.logsumexp(x, -1)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        size = _finite(x).abs().amax(-1) * 2 + value.detach().abs() + 1
        spread = (1 / batch.temperature + 1) * size[:, None] * (gradient.abs() + eps)
        return {
            "value": Exact(self.sign * value.detach(), size),
            "gradient": Exact(self.sign * gradient, spread),
        }

    def changes(self) -> list[Change]:
        """Other temperatures and signs."""
        sign = Change("sign: the negative log-likelihood", {"sign": -1.0}, "sign")
        return self.others([*_temperatures(), sign])


@dataclass(frozen=True)
class Entropy(Reading):
    """−Σ p ln p of softmax(z / temperature), and the gradient of its sum by the logits."""

    part: ClassVar[str] = "entropy"
    paper: ClassVar[str] = "the definition: −Σ p ln p, where 0·ln 0 is 0"
    temperature: str = "divides"
    sign: float = 1.0
    zeros: str = "select"

    def exact(self, batch: Logits, eps: float) -> dict[str, Exact]:
        """`value` `(N,)` and `gradient` `(N, V)`."""
        z = batch.logits.double().clone().requires_grad_()
        x = _scaled(z, batch.temperature, self.temperature)
        p = torch.softmax(x, -1)
        if self.zeros == "select":
            live = x > -torch.inf
            terms = torch.where(live, p * torch.where(live, x, 0.0), 0.0)
        else:
            terms = p * x
        value = torch.logsumexp(x, -1) - terms.sum(-1)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        size = _finite(x).abs().amax(-1) * 2 + 5
        slope = size[:, None] * size[:, None] * (p.detach() + eps) * (1 + 1 / batch.temperature)
        return {
            "value": Exact(self.sign * value.detach(), size),
            "gradient": Exact(self.sign * gradient, slope),
        }

    def changes(self) -> list[Change]:
        """Other temperatures and signs, and −inf logits that reach a product."""
        return self.others(
            [
                Change(
                    "entropy: NaN where a token was removed (0 · −inf)",
                    {"zeros": "multiply"},
                    "entropy.inf",
                ),
                *_temperatures(),
                Change("sign: the negative entropy", {"sign": -1.0}, "sign"),
            ]
        )


def _temperatures() -> list[Change]:
    return [
        Change("temperature: left out", {"temperature": "ignored"}, "temperature"),
        Change("temperature: multiplies the logits", {"temperature": "multiplies"}, "temperature"),
    ]


def _scaled(z: Tensor, temperature: float, how: str) -> Tensor:
    return z * {"divides": 1 / temperature, "ignored": 1.0, "multiplies": temperature}[how]


def _finite(x: Tensor) -> Tensor:
    return x.detach().nan_to_num(0.0, 0.0, 0.0)
