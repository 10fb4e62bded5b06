"""Reward functions: return values, exceptions and side effects, and what each costs."""

from __future__ import annotations

import asyncio
import fractions
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loop_helpers import trainer, weights
from rich.console import Console

from ppo_fast.loop import RewardLengthError, TrainConfig
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.rewards import letters, score, shaped

LARGEST = float(torch.finfo(torch.float32).max)


class Odd:
    """Raises in each method that looks at it."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error

    def __repr__(self) -> str:
        raise self.error


@pytest.mark.case("R3")
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (10**400, "reward returned 1" + "0" * 116 + "..."),
        (10**5000, "reward returned a int whose repr raises ValueError"),
        (fractions.Fraction(10**400, 3), "reward returned Fraction(1000"),
        (Odd(LookupError("no verdict")), "reward returned a Odd whose repr raises LookupError"),
        (torch.empty(1, device="meta"), "reward returned tensor(..., device='meta', size=(1,))"),
        (np.complex64(1 + 2j), "reward returned np.complex64(1+2j)"),
        (np.array(1 + 0j), "reward returned array(1.+0.j)"),
        (torch.tensor(1 + 0j), "reward returned tensor(1.+0.j)"),
        (np.ma.masked, "reward returned masked"),
        (np.ones(2), "reward returned array([1., 1.])"),
        ("x" * 10**6, "reward returned '" + "x" * 116 + "..."),
        (torch.zeros(9, 9), "reward returned tensor([[0., 0., 0."),
        (2.0**128, "reward returned 3.402823669209385e+38, infinite in fp32"),
        (-1e39, "reward returned -1e+39, infinite in fp32"),
        (torch.tensor(1e300, dtype=torch.float64), "reward returned tensor(1.0000e+300, dtype="),
        ("4e38", "reward returned '4e38', infinite in fp32"),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.filterwarnings("ignore:Warning. converting a masked element to nan")
@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
def test_a_value_that_is_no_fp32_number_costs_its_sample(value: Any, reason: str) -> None:
    found = score(lambda p, c: [0.5, value, 1.5], ["p"] * 3, ["c"] * 3)
    assert found.values == [0.5, 0.0, 1.5] and list(found.faults) == [1]
    assert found.faults[1].startswith(reason) and len(found.faults[1]) < 180
    assert "\n" not in found.faults[1]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        ("1.5", 1.5),
        (3, 3.0),
        (Decimal("0.25"), 0.25),
        (-LARGEST, -LARGEST),
        (fractions.Fraction(1, 4), 0.25),
        (np.float16(0.5), 0.5),
        (np.array([0.5]), 0.5),
        (np.array([[2]]), 2.0),
        (torch.tensor([[0.5]], requires_grad=True), 0.5),
    ],
)
def test_what_counts_as_a_number(value: Any, number: float) -> None:
    assert score(lambda p, c: [value], ["p"], ["c"]) == Scores([number])


def generator(values: list[float]) -> Iterator[float]:
    yield from values


@pytest.mark.parametrize(
    "rewards",
    [
        (1.0, 2.0),
        generator([1.0, 2.0]),
        np.array([1.0, 2.0]),
        np.array([[1.0], [2.0]]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0], [2.0]]),
        {"a": 1.0, "b": 2.0}.values(),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_counts_as_a_list(rewards: Any) -> None:
    assert score(lambda p, c: rewards, ["p"] * 2, ["c"] * 2) == Scores([1.0, 2.0])


class Table:
    """A data frame: iteration gives the names of its columns."""

    columns = (0, 1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.columns)


@pytest.mark.parametrize(
    ("rewards", "got"),
    [
        ({0: 5.0, 1: 7.0}, "got a dict, which is no list of numbers: {0: 5.0, 1: 7.0}"),
        ({3.0, 4.0}, "got a set, which is no list of numbers"),
        ("12", "got a str, which is no list of numbers: '12'"),
        (b"12", "got a bytes, which is no list of numbers"),
        (Table(), "got a Table, which is no list of numbers"),
        (torch.tensor(2.0), r"got tensor\(2.\)"),
        ([1.0] * 5, "got 5"),
        (generator([1.0] * 5), "got more"),
    ],
)
def test_an_answer_without_the_samples_order_is_refused(rewards: Any, got: str) -> None:
    """Each of the first four has two entries that `float` takes, none of which is a reward."""
    with pytest.raises(RewardLengthError, match=f"reward must return 2 numbers, {got}"):
        score(lambda p, c: rewards, ["p"] * 2, ["c"] * 2)


@pytest.mark.filterwarnings("error")
def test_an_async_reward_is_refused() -> None:
    async def judge(prompts: list[str], texts: list[str]) -> list[float]:
        return [1.0] * len(texts)

    with pytest.raises(RewardLengthError, match="got a coroutine: an async function must be run"):
        score(judge, ["p"], ["c"])  # type: ignore[arg-type]
    assert score(lambda p, c: asyncio.run(judge(p, c)), ["p"], ["c"]) == Scores([1.0])


@pytest.mark.case("R4")
@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SystemExit(3), "reward raised SystemExit: 3"),
        (GeneratorExit(), "reward raised GeneratorExit: "),
        (asyncio.CancelledError(), "reward raised CancelledError: "),
        (BaseException("base"), "reward raised BaseException: base"),
        (ValueError(" a\n\x1b[31mb \ud83d" + "y" * 999), r"reward raised ValueError: a \x1b[31mb"),
        (KeyError(Odd(OSError())), "reward raised KeyError: (its str raises OSError)"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_whatever_is_raised_costs_its_sample(
    error: BaseException, reason: str, timeout: float | None
) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        if "bad" in texts:
            raise error
        return [2.0] * len(texts)

    found = score(reward, ["p"] * 3, ["good", "bad", "good"], timeout)
    assert found.values == [2.0, 0.0, 2.0] and found.faults[1].startswith(reason)
    assert found.faults[1].isprintable() and len(found.faults[1]) < 250


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_ctrl_c_in_a_reward_interrupts(timeout: float | None) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(reward, ["p"] * 2, ["c"] * 2, timeout)


def test_a_raising_reward_is_called_once_more_for_each_sample() -> None:
    sizes: list[int] = []

    def reward(prompts: list[str], texts: list[str]) -> Iterator[float]:
        sizes.append(len(texts))
        for text in texts:
            if text == "bad":
                raise TypeError("of the function's own")
            yield 1.0

    found = score(reward, ["p"] * 3, ["good", "bad", "good"])  # type: ignore[arg-type]
    assert found.faults == {1: "reward raised TypeError: of the function's own"}
    assert sizes == [3, 1, 1, 1] and len(found.errors) == 1


def test_a_score_that_shaping_takes_out_of_fp32_is_dropped() -> None:
    scores = Scores([-LARGEST, -LARGEST, 1.0])
    config = TrainConfig(missing_eos_penalty=1e38)
    got = shaped(scores, config, [False, True, False], [1] * 3)
    assert got.values == [0.0, -LARGEST, 1.0 - 1e38] and list(got.faults) == [0]
    assert got.faults[0] == "reward -3.40282e+38 became -4.40282e+38 by clip and penalties"
    assert scores.faults == {} and scores.values[0] == -LARGEST


def _default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def _device() -> None:
    torch.set_default_device("meta")


def _threads() -> None:
    torch.set_num_threads(torch.get_num_threads() + 1)


def _folder() -> None:
    os.chdir("/")


def _seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


CHANGES: dict[str, Callable[[], Any]] = {
    "gradients": lambda: torch.set_grad_enabled(False),
    "inference": lambda: torch.inference_mode().__enter__(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__(),
    "dtype": _default_dtype,
    "device": _device,
    "threads": _threads,
    "folder": _folder,
    "seeds": _seeds,
}


def settings() -> list[Any]:
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"),
        Path.cwd(),
    ]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_reward_changes_is_put_back(change: Callable[[], Any]) -> None:
    kept: list[Any] = []  # a guard that is collected would end its mode

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        kept.append(change())
        return letters(prompts, texts)

    before = settings()
    for timeout in (None, 60.0):
        assert score(reward, ["p"], ["ab1 "], timeout) == Scores([0.5])
        assert settings() == before
    assert len(kept) == 2


def test_what_a_late_call_changed_is_put_back(tmp_path: Path) -> None:
    release = threading.Event()

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        os.chdir(tmp_path)
        release.wait()
        return [1.0]

    before = Path.cwd()
    assert score(reward, ["p"], ["c"], 0.5).late
    after = Path.cwd()
    release.set()
    assert after == before


def run(out: Path, reward: Any, **options: Any) -> tuple[list[torch.Tensor], str]:
    """Weights and samples of two updates."""
    t = trainer(out, reward, updates=2, **options)
    t.run(Console(quiet=True))
    return weights(t), (out / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], str]:
    return run(tmp_path_factory.mktemp("plain"), letters)


def test_a_run_is_the_same_whatever_its_reward_changes(tmp_path: Path, plain: Any) -> None:
    kept: list[Any] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        out = letters(prompts, texts)
        kept.extend(change() for change in CHANGES.values())
        return out

    got, samples = run(tmp_path, reward)
    assert all(map(torch.equal, got, plain[0])) and samples == plain[1]


def test_a_reward_edits_lists_of_its_own(tmp_path: Path, plain: Any) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        out = letters(prompts, texts)
        texts[:] = ["another"] * len(texts)
        prompts.clear()
        return out

    got, samples = run(tmp_path, reward)
    assert all(map(torch.equal, got, plain[0])) and samples == plain[1]


def test_a_deleted_folder_stops_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        if gone.exists():
            gone.rmdir()
        return [1.0] * len(texts)

    assert [score(reward, ["p"], ["c"]) for _ in range(2)] == [Scores([1.0])] * 2


def test_a_traceback_is_told_once_and_a_line_for_each_fault(tmp_path: Path) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        if len(texts) > 1 or len(prompts[0]) % 2:
            raise LookupError("an odd length, or many")
        return [1.0] * len(texts)

    with (tmp_path / "said.txt").open("w") as file:
        trainer(tmp_path / "out", reward).run(Console(file=file, width=200))
    said = (tmp_path / "said.txt").read_text()
    assert said.count("Traceback (most recent call last)") == 1
    assert said.count(", in reward") == 1 and sys._getframe().f_code.co_filename in said
    lines = [line for line in said.splitlines() if "dropped: reward raised LookupError" in line]
    assert len(lines) == 3 and all(": samples " in line for line in lines)
