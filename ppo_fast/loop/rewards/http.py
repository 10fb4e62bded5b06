"""Reward computed by a server, asked over HTTP with JSON."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from ppo_fast.loop.rewards.calls import NoAnswerError

_AGAIN = {408, 429, 500, 502, 503, 504}  # statuses of which a later answer may differ
_SHOWN = 200  # characters of an answer in a message


class HttpReward:
    """Answers of the server at `url` to {"prompts": [...], "completions": [...], column: [...]}.

    It must answer with a list of numbers, or an object whose "rewards" is one; null drops a
    sample. A call takes at most `timeout` seconds a try. One that finds no server, or a status of
    which a later answer may differ, is tried `retries` times more, after 1, 2, 4, ... times `wait`
    seconds.

    Raises NoAnswerError with the last reason.
    """

    def __init__(
        self, url: str, timeout: float = 60.0, retries: int = 3, wait: float = 1.0
    ) -> None:
        self.url, self.timeout, self.retries, self.wait = url, timeout, retries, wait

    def __call__(
        self, prompts: list[Any], completions: list[str], **columns: list[Any]
    ) -> list[Any]:
        asked = {**columns, "prompts": prompts, "completions": completions}
        body = json.dumps(asked, default=str).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2.0 ** (attempt - 1))
            try:
                return self._answer(body)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code} {error.reason}: {self._said(error)}"
                if error.code not in _AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:  # no server, or no whole answer
                reason = f"{type(error).__name__}: {error}"
        tries = f"{attempt + 1} tries" if attempt else "1 try"
        raise NoAnswerError(f"reward {self.url} after {tries}: {reason}")

    def _answer(self, body: bytes) -> list[Any]:
        request = urllib.request.Request(
            self.url, body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            text = response.read()
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"reward {self.url} must answer with JSON, got {text[:_SHOWN]!r}"
            ) from error
        rewards = found.get("rewards") if isinstance(found, dict) else found
        if not isinstance(rewards, list):
            raise ValueError(
                f'reward {self.url} must answer with a list or {{"rewards": [...]}},'
                f" got {text[:_SHOWN]!r}"
            )
        return rewards

    @staticmethod
    def _said(error: urllib.error.HTTPError) -> str:
        with error:
            return repr(error.read(_SHOWN))
