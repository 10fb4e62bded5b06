"""Named problem sizes and the cases made of them: what is measured, apart from who does it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FORWARD = "forward"
BOTH = "forward+backward"
# One call on tiny tensors, without and with a gradient to be recorded: the cost of calling.
CALL = "call"
CALL_GRAD = "call-with-grad"

# Transparent huge pages for large blocks; torch's CPU allocator reads it when the process starts.
THP = (("THP_MEM_ALLOC_ENABLE", "1"),)


@dataclass(frozen=True)
class Shape:
    """A problem size: rows × vocabulary for logits, sequences × tokens elsewhere."""

    name: str
    dims: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.dims[0] * self.dims[1]

    def __str__(self) -> str:
        return "x".join(map(str, self.dims))


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2", (512, 50257)),  # 512 tokens of GPT-2's vocabulary: 103 MB of fp32 logits
        Shape("rlhf-256k", (256, 1024)),  # 262,144 tokens
        Shape("rlhf-long", (64, 4096)),
        Shape("tiny", (2, 8)),
    )
}


@dataclass(frozen=True)
class Case:
    """One op at one size, direction and dtype; its providers are timed together."""

    op: str
    direction: str
    shape: Shape
    dtype: str = "fp32"
    env: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        parts = [self.op, self.direction, f"{self.shape.name}:{self.shape}", self.dtype]
        return " ".join(parts + [f"{key}={value}" for key, value in self.env])

    @property
    def grad(self) -> bool:
        """Whether gradients are asked for (in a call: recorded, not taken)."""
        return self.direction in (BOTH, CALL_GRAD)

    @property
    def missing_env(self) -> dict[str, str]:
        """What this process was not started with, although the case needs it."""
        return {key: value for key, value in self.env if os.environ.get(key) != value}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        shape = Shape(fields["shape"]["name"], tuple(fields["shape"]["dims"]))
        env = tuple((key, value) for key, value in fields["env"])
        return cls(**{**fields, "shape": shape, "env": env})


_GPT2, _TOKENS, _LONG, _TINY = (
    SHAPES[name] for name in ("gpt2", "rlhf-256k", "rlhf-long", "tiny")
)

LOGPROBS_FORWARD = Case("token_logprobs", FORWARD, _GPT2)
LOGPROBS_BOTH = Case("token_logprobs", BOTH, _GPT2)
LOGPROBS_BOTH_THP = Case("token_logprobs", BOTH, _GPT2, env=THP)
PPO_LOSS_BOTH = Case("ppo_loss", BOTH, _TOKENS)
VALUE_LOSS_BOTH = Case("value_loss", BOTH, _TOKENS)
GAE = Case("gae", FORWARD, _LONG)

CALLS = tuple(
    Case(op, CALL, _TINY)
    for op in ("token_logprobs", "ppo_loss", "value_loss", "gae", "rlhf_advantages", "whiten")
)
CALLS_WITH_GRAD = tuple(
    Case(op, CALL_GRAD, _TINY) for op in ("token_logprobs", "ppo_loss", "value_loss")
)
