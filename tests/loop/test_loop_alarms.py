"""Alarms: each on a log made for it, none on a run that goes well, the same live and later."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_helpers import trainer
from rich.console import Console

from ppo_fast.loop import TrainConfig
from ppo_fast.loop.log.alarms import alarms, rolling
from ppo_fast.loop.log.history import History

Log = list[dict[str, Any]]


def log(n: int, **columns: Any) -> Log:
    """A run of n updates that goes well, with `columns` (value, list or function) put in."""
    random = np.random.default_rng(0)
    noise = random.normal(scale=0.05, size=n)
    records = [
        {
            "update": i,
            "reward": 0.1 + 0.6 * i / n + noise[i],
            "kl": 12 * i / n,
            "dropped": {},
            "batch": 8,
            "n_tokens": 256.0,
            "n_seqs": 16.0,
            "clip_frac": 0.15,
            "entropy": 3.8 - i / n,
            "explained_variance": 0.4 * i / n,
            "rollout_gap_mean": 1e-6,
        }
        for i in range(n)
    ]
    for name, value in columns.items():
        for i, record in enumerate(records):
            record[name] = value(i) if callable(value) else value
    return records


def seen(records: Log) -> list[tuple[int, str]]:
    return [(a.update, a.name) for a in alarms(History(records))]


def test_none_on_a_run_that_goes_well() -> None:
    for n in (0, 1, 4, 5, 40, 200):
        assert alarms(History(log(n))) == []


@pytest.mark.parametrize(
    ("columns", "onset", "name", "says"),
    [
        # kl / 16 tokens a sequence passes 2 nats as the mean of five, i.e. at 32 + 2
        ({"kl": lambda i: float(i)}, 35, "KL runs away", "2.06 nats a token"),
        # 0.05 * 1.15^i: the mean of five from 0.1 at update 6 on, times 4 every ten
        (
            {"kl": lambda i: min(0.05 * 16 * 1.15**i, 30.0), "reward": 0.3},
            17,
            "KL runs away",
            "0.41 nats a token from the reference, 0.10 ten updates ago, and",
        ),
        ({"clip_frac": lambda i: 0.8 if i >= 20 else 0.1}, 22, "ratios saturate", "52%"),
        ({"explained_variance": 0.0}, 39, "critic explains nothing", "+0.00 over 20"),
        ({"entropy": lambda i: 3.0 * 0.9**i}, 26, "entropy collapses", "0.242 nats a token, 2.46"),
        ({"rollout_gap_mean": lambda i: 0.1 if i >= 10 else 0.0}, 12, "rollout gap", "0.060"),
        (
            {"dropped": lambda i: {0: "a", 1: "b", 2: "boom"} if i >= 10 else {}},
            13,
            "samples dropped",
            "30% of the samples have no reward. Mend the reward function; the last fault: boom",
        ),
    ],
)
def test_each_sets_in_once(columns: dict, onset: int, name: str, says: str) -> None:
    (alarm,) = alarms(History(log(44, **columns)))
    assert (alarm.update, alarm.name) == (onset, name)
    assert alarm.text.startswith(f"{name}: ") and says in alarm.text


def test_a_reward_that_collapses() -> None:
    records = log(60)
    for record in records[40:]:
        record["reward"] -= 0.5
    (alarm,) = alarms(History(records))
    assert alarm.name == "reward collapses" and 41 <= alarm.update <= 44
    best = float(rolling(np.array([r["reward"] for r in records]), 5)[39])
    assert f"after a best of {best:+.3f}" in alarm.text


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_collapse(seed: int) -> None:
    noise = np.random.default_rng(seed).normal(size=400)
    assert seen(log(400, reward=lambda i: float(noise[i]), kl=0.5)) == []


def test_a_constant_reward_is_no_collapse() -> None:
    assert seen(log(60, reward=0.3, kl=0.5)) == []


def test_a_pause_is_no_second_onset_and_a_return_is() -> None:
    bad = {*range(10, 20), *range(24, 40), *range(60, 80)}
    records = log(100, clip_frac=lambda i: 0.9 if i in bad else 0.0)
    assert seen(records) == [(12, "ratios saturate"), (62, "ratios saturate")]


def test_nothing_of_what_comes_later_is_used() -> None:
    records = log(70, kl=lambda i: float(i), clip_frac=lambda i: 0.9 * (i % 30 > 20))
    for record in records[50:]:
        record["reward"] = -1.0
    whole = alarms(History(records))
    assert {a.name for a in whole} == {"KL runs away", "ratios saturate", "reward collapses"}
    for n in range(len(records) + 1):
        assert alarms(History(records[:n])) == [a for a in whole if a.update < n]


def test_missing_numbers_are_left_out() -> None:
    records = log(12, reward=lambda i: math.nan if i % 2 else 0.5)
    for record in records[3:6]:
        for name in ("kl", "clip_frac", "entropy", "n_tokens"):
            del record[name]
    records[8]["reward"] = None  # as the log on disk writes it
    assert alarms(History(records)) == []
    every = dict.fromkeys(range(8), "reward returned None")
    bare = [{"update": i, "reward": math.nan, "dropped": every, "batch": 8} for i in range(6)]
    assert seen(bare) == [(4, "samples dropped")]


@pytest.mark.parametrize("first", [math.nan, None])
def test_a_start_without_numbers_silences_no_alarm(first: float | None) -> None:
    def late(i: int, value: float) -> float | None:
        return first if i < 7 else value

    records = log(60, reward=lambda i: late(i, i / 20 if i < 40 else 0.5))
    assert seen(records) == [(42, "reward collapses")]
    records = log(44, entropy=lambda i: late(i, 3.0 * 0.9**i))
    found = [(u, name) for u, name in seen(records) if name != "numbers not finite"]
    assert found == [(31, "entropy collapses")]


def test_noise_is_seen_between_updates_without_a_reward() -> None:
    noise = np.random.default_rng(1).normal(size=400)
    records = log(400, reward=lambda i: None if i % 2 else float(noise[i]), kl=0.5)
    assert seen(records) == []


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_not_finite_is_an_alarm(lost: float | None) -> None:
    (alarm,) = alarms(History(log(30, kl=lambda i: lost if i >= 20 else 1.0)))
    assert (alarm.update, alarm.name) == (20, "numbers not finite")
    assert alarm.text.startswith("numbers not finite: kl. Other alarms leave these out.")
    records = log(30)
    records[8] |= {"entropy": lost, "clip_frac": lost}
    assert seen(records) == [(8, "numbers not finite")]


def test_one_number_that_is_not_finite_silences_no_other_alarm() -> None:
    records = log(44, kl=lambda i: math.nan if i == 3 else float(i))
    assert seen(records) == [(3, "numbers not finite"), (35, "KL runs away")]


def test_alarms_of_rewards_do_not_hang_on_their_scale() -> None:
    random = np.random.default_rng(3)
    rewards = np.concatenate([np.arange(40.0), np.full(40, 5.0)]) + random.normal(size=80)
    whole = seen(log(80, reward=lambda i: float(rewards[i]), kl=0.5))
    assert [name for _, name in whole] == ["reward collapses"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (2.0**-900, 2.0**-600, 2.0**600, 2.0**1000, 2.0**1018):
            assert seen(log(80, reward=lambda i, s=scale: float(rewards[i] * s), kl=0.5)) == whole
        noise = random.choice([-1e308, 1e308], size=400)
        assert seen(log(400, reward=lambda i: float(noise[i]), kl=0.5)) == []


def test_no_count_is_divided_by_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seen(log(40, n_seqs=0.0, n_tokens=0.0, batch=0, kl=1e3)) == []
        some = log(40, n_seqs=lambda i: float(i % 2), n_tokens=16.0, kl=48.0)
        assert seen(some) == [(4, "KL runs away")]
        assert seen(log(30, kl=1e308, n_tokens=8.0)) == [(4, "KL runs away")]


def test_rolling_mean_of_large_numbers() -> None:
    largest = np.finfo(float).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (1, 3, 5, 20):
            full = rolling(np.full(30, largest), n)[n - 1 :]
            assert np.isfinite(full).all() and full == pytest.approx(largest, rel=1e-15)
            assert rolling(np.full(30, -1e308), n)[-1] == pytest.approx(-1e308, rel=1e-15)
        signs = np.where(np.arange(12) % 2, -1e308, 1e308)
        np.testing.assert_allclose(rolling(signs, 4)[3:], 0.0, atol=1e292)


def test_rolling_mean_against_its_spelling() -> None:
    values = np.array([1.0, np.nan, 3.0, 4.0, np.nan, np.nan, np.nan, 8.0])
    expected = [np.nan, np.nan, 2.0, 3.5, 3.5, 4.0, np.nan, 8.0]
    np.testing.assert_array_equal(rolling(values, 3), expected)
    assert np.isnan(rolling(values[:2], 3)).all() and len(rolling(values[:0], 3)) == 0


def test_a_default_quick_run_alarms_nobody(tmp_path: Path) -> None:
    config = TrainConfig(quick=True).resolved()
    names = ("updates", "batch", "micro_batch", "max_new_tokens", "train_layers", "lr", "warmup")
    t = trainer(tmp_path, **{name: getattr(config, name) for name in names})
    t.run(Console(quiet=True))
    assert len(t.history) == 30 and alarms(t.history) == []


@pytest.mark.case("R11")
def test_a_learning_rate_far_too_large_is_seen(tmp_path: Path) -> None:
    t = trainer(tmp_path, updates=12, lr=1.0, train_layers=0)
    t.run(Console(quiet=True))
    names = {alarm.name for alarm in alarms(t.history)}
    assert "KL runs away" in names
