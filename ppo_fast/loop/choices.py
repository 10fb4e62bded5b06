"""Names that options take, where there are many: data."""

from __future__ import annotations

from typing import Literal

Variant = Literal[
    "clip",
    "gspo",
    "cispo",
    "penalty",
    "linear",
    "sapo",
    "dppo-tv",
    "dppo-kl",
    "reinforce",
    "dro",
    "gmpo",
    "vespo",
    "clip-cov",
    "kl-cov",
]
Estimator = Literal["k1", "k2", "k3", "abs"]
LossEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
Advantages = Literal[
    "gae",
    "grpo",
    "grpo-batch-std",
    "grpo-passk",
    "rloo",
    "dr_grpo",
    "opo",
    "maxrl",
    "reinforce++",
]
Reduction = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
Distill = Literal["reverse", "forward", "jsd", "mixed", "pg"]
