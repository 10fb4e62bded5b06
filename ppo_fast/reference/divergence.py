"""Divergences of two categorical distributions, from their log-probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence_terms(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Terms of the divergence of log-probabilities (..., V), to be summed over the last dimension.

    A term of probability 0 is 0; a probability of the first beside 0 of the second is infinite.
    """
    if kind == "reverse":
        return _kl(student, teacher)
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "mixed":
        return beta * _kl(student, teacher) + (1 - beta) * _kl(teacher, student)
    mixture = _mixture(student, teacher, beta)
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """p·ln(p / q) of log-probabilities."""
    none = p.isneginf()
    return torch.where(
        none, 0.0, p.exp() * (torch.where(none, 0.0, p) - torch.where(none, 0.0, q))
    )


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """ln((1 − β)s + βt), which is −∞ where both are; no gradient is NaN there."""
    none = student.isneginf() & teacher.isneginf()
    s, t = (torch.where(none, 0.0, x) for x in (student, teacher))
    mixed = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
    return torch.where(none, -torch.inf, mixed)
