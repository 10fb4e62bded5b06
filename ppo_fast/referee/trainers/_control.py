"""Common to the control libraries: flat minibatches without masks, and steps of environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppo_fast.referee.cases import Steps, Tokens
from ppo_fast.referee.judge import Given
from ppo_fast.referee.trainers import Function, Window, over_step

_MASKS = "a minibatch has no masked slots"
_STEPS = "every minibatch is an optimiser step of its own"
LEFT_OUT = {
    **dict.fromkeys(("tool-tokens", "empty-row", "nan-masked"), _MASKS),
    **dict.fromkeys(("micro-batches", "uneven-rows", "two-ranks"), _STEPS),
    **dict.fromkeys(("uneven-ranks", "ranks-and-micro-batches"), _STEPS),
}
ONE = {"one-token": "a minibatch of one is not whitened"}


def flat(
    loss: Callable[[Function, dict[str, Tensor]], Tensor], leaf: str = "logprobs"
) -> Callable[[Function, Tokens], Given]:
    """A call of a loss whose inputs are the tokens in one row."""

    def micro(function: Function, batch: Tokens, _: Window) -> Tensor:
        rows = {k: v[batch.mask] for k, v in vars(batch).items() if isinstance(v, Tensor)}
        return loss(function, rows)

    return over_step(micro, leaf)


def whitened(call: Callable[[Function, Tensor], Tensor]) -> Callable[[Function, Tokens], Given]:
    """A call that whitens the tokens in one row."""

    def whiten(function: Function, batch: Tokens) -> Given:
        x = batch.rewards.float()
        x[batch.mask] = call(function, x[batch.mask])
        return {"value": x}

    return whiten


def single(batch: Steps) -> Any:
    """The steps in fp32."""
    return Steps(*(x.float() if x.is_floating_point() else x for x in batch))
