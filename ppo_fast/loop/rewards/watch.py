"""Watch over a reward function: new exceptions shown once, and an end without any reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards.calls import RewardError
from ppo_fast.loop.rewards.scoring import place
from ppo_fast.loop.values import traceback_of

_IN_A_ROW = 3


class NoRewardError(RewardError):
    """No sample has a reward: of a run's first batch, or of three batches in a row."""


class Watch:
    """A check of each batch's scores that stops a run without any and keeps new tracebacks."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str, int]] = set()
        self._untold: list[str] = []

    def checked(self, scores: Scores, means: Sequence[float]) -> Scores:
        """The same scores, without their exceptions.

        `means` are the mean rewards of the updates before, NaN for none. Raises `NoRewardError`
        from the first exception.
        """
        found, scores.errors = scores.errors, []  # they hold frames, and other ranks get scores
        self._require_some(scores, means, found[0] if found else None)
        for error in found:
            if place(error) not in self._known:
                self._known.add(place(error))
                self._untold.append(traceback_of(error))
        return scores

    def tell(self, say: Callable[[str], None]) -> None:
        """Give `say` the tracebacks that it has not had."""
        while self._untold:
            say(self._untold.pop(0))

    @staticmethod
    def _require_some(scores: Scores, means: Sequence[float], error: BaseException | None) -> None:
        if any(scores.kept):
            return
        last = means[1 - _IN_A_ROW :]
        if len(means) == 0 and not scores.late:
            which = "the first update"
        elif len(last) == _IN_A_ROW - 1 and all(map(math.isnan, last)):
            which = f"this update and of the {len(last)} before"
        else:
            return
        raise NoRewardError(
            f"none of the {len(scores.values)} samples of {which} has a reward:"
            f" {scores.faults[0]}. reward must be fn(prompts, completions) -> list[float]"
        ) from error
