"""Records of a run as it goes on: log, samples, versions, TensorBoard, progress."""

from __future__ import annotations

import io
import json
import math
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from loop_helpers import trainer
from rich.console import Console

import ppo_fast
from ppo_fast.loop.data.sequences import Scores
from ppo_fast.loop.log.fields import FieldError
from ppo_fast.loop.log.history import NUMBERS, History
from ppo_fast.loop.log.progress import progress_bar, summary
from ppo_fast.loop.log.tensorboard import TAGS
from ppo_fast.loop.log.versions import versions

QUIET = Console(quiet=True)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seconds_and_tokens_per_second(tmp_path: Path) -> None:
    t = trainer(tmp_path, updates=2)
    t.run(QUIET)
    for record in lines_of(tmp_path / "log.jsonl"):
        seconds = record["seconds"]
        assert set(seconds) == {"rollout", "reward", "scoring", "advantages", "update"}
        # every sample was kept, and the statistics count each token once an epoch
        tokens = record["n_tokens"] / t.config.epochs
        assert record["tokens_per_second"] * sum(seconds.values()) == pytest.approx(tokens)
        assert record["batch"] == 8 and record["lr"] == t.config.lr


def test_lengths_ends_and_spread_of_an_update(tmp_path: Path) -> None:
    """Counted again from the stored samples, of which those without a reward are left out."""

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [math.nan, *[float(i) for i in range(1, len(texts))]]

    t = trainer(tmp_path)
    t.sampler.eos = list(range(0, t.agent.policy.model.config.vocab_size, 8))  # likelier ends
    t.reward = lambda prompts, texts: [float(i) for i in range(len(texts))]
    record, sample = t.iteration()
    width = sample.rollout.seqs.mask.shape[1]
    responses = [
        [token for token, kept in zip(row[-width:], mask, strict=True) if kept]
        for row, mask in zip(
            sample.rollout.seqs.tokens.tolist(), sample.rollout.seqs.mask.tolist(), strict=True
        )
    ]
    ended = [row[-1] in t.eos for row in responses]
    assert True in ended and False in ended
    assert record["response_length"] == sum(map(len, responses)) / 8
    assert record["ended"] == sum(ended) / 8
    assert record["reward_std"] == pytest.approx(math.sqrt((8**2 - 1) / 12))
    t.reward = reward
    record, sample = t.iteration()
    assert sample.scores.faults and record["reward_std"] == 2.0  # of 1 to 7


def test_no_reward_has_no_spread() -> None:
    assert math.isnan(Scores([0.0, 0.0], {0: "late", 1: "late"}).std)
    assert Scores([0.0, 0.7], {0: "late"}).std == 0.0


def test_samples_are_lines_of_json(tmp_path: Path) -> None:
    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        return [math.nan, *[0.5] * (len(prompts) - 1)]

    trainer(tmp_path, reward, updates=2).run(QUIET)
    samples = lines_of(tmp_path / "samples.jsonl")
    assert [s["update"] for s in samples] == [0] * 4 + [1] * 4
    assert samples[0]["fault"] == "reward returned nan" and "reward" not in samples[0]
    assert samples[1]["reward"] == 0.5 and "fault" not in samples[1]
    assert all(isinstance(s["prompt"], str) and isinstance(s["completion"], str) for s in samples)


def test_versions(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.begin()
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found == versions(t.backend)
    assert found["ppo_fast"] == ppo_fast.__version__ and found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["backend"] == t.backend != "auto"


def test_tensorboard_has_the_numbers_of_the_log(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, tensorboard=True).run(QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = lines_of(tmp_path / "log.jsonl")
    assert set(TAGS.values()) <= set(events.Tags()["scalars"])
    for name, tag in TAGS.items():
        scalars = events.Scalars(tag)
        assert [e.step for e in scalars] == [0, 1, 2]
        assert [e.value for e in scalars] == pytest.approx([r[name] for r in records], rel=1e-6)
    assert len(events.Scalars("seconds/rollout")) == 3


def test_tensorboard_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        trainer(tmp_path, tensorboard=True).step()


def test_summary_says_what_there_is() -> None:
    record = {"reward": 0.71364, "kl": 11.441, "clip_frac": 0.1964, "tokens_per_second": 5571.2}
    assert summary(record) == "reward +0.714, KL 11.44, clip 0.20, tokens/s 5571"
    assert summary({"reward": math.nan, "tokens_per_second": 10.0}) == "tokens/s 10"


def test_progress_prints_faults_alarms_and_a_line_a_tenth() -> None:
    out = io.StringIO()
    console = Console(file=out, width=200)
    history = History()
    with progress_bar(console, 0, 20) as show:
        for i in range(20):
            faults = {3: "reward [b]returned[/b] nan"} if i == 7 else {}
            clipped = 0.9 if i > 10 else 0.1
            record = {
                "update": i,
                "reward": 0.5,
                "kl": 1.0,
                "clip_frac": clipped,
                "dropped": faults,
            }
            history.append(record)
            show(record, history)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("update")]
    assert lines.count("update 7: sample 3 dropped: reward [b]returned[/b] nan") == 1
    assert sum("ratios saturate: 58% of the tokens are clipped" in line for line in lines) == 1
    assert sum(line.startswith("update 13: ratios saturate") for line in lines) == 1
    assert sum(line.endswith("reward +0.500, KL 1.00, clip 0.10") for line in lines) == 5
    assert len(lines) == 12


def test_history_has_the_numbers_that_are_there() -> None:
    first = {"update": 0, "reward": 0.5, "kl": None, "dropped": {0: "late", 3: "nan"}, "lr": 1.0}
    history = History([first, {"update": 1, "reward": math.nan, "batch": 8}])
    assert len(history) == 2 and history.column("update").tolist() == [0.0, 1.0]
    assert history.column("reward")[0] == 0.5 and np.isnan(history.column("reward")[1])
    assert np.isnan(history.column("kl")).all() and np.isnan(history.column("batch")[0])
    assert history.column("dropped").tolist() == [2.0, 0.0]
    assert history.fault(0) == history.fault(1) == "nan"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"reward": "0.5"}, "reward must be a number or null, got '0.5'"),
        ({"kl": [1.0]}, r"kl must be a number or null, got \[1.0\]"),
        ({"batch": True}, "batch must be a number or null, got True"),
        ({"dropped": [1]}, r"dropped must be an object, got \[1\]"),
        ({"dropped": {"0": None}}, r"dropped\['0'\] must be a text, got None"),
    ],
)
def test_history_takes_nothing_that_is_no_number(changes: dict, says: str) -> None:
    history = History([{"update": 0, "reward": 0.5}])
    with pytest.raises(FieldError, match=says):
        history.append({"update": 1, "reward": 0.5} | changes)
    assert {len(history.column(name)) for name in (*NUMBERS, "dropped")} == {1}
    assert history.lost == {}


def test_history_knows_numbers_lost_from_numbers_lacking() -> None:
    history = History([{"update": 0, "reward": None}, {"update": 1, "kl": None, "entropy": 1e3}])
    history.append({"update": 2, "kl": math.inf, "entropy": 10**400, "batch": 8})
    assert history.lost == {1: "kl", 2: "kl, entropy"}
    assert np.isnan(history.column("kl")).all() and np.isnan(history.column("entropy")[2])


@pytest.mark.case("R10")
def test_memory_grows_by_numbers_alone() -> None:
    """An update keeps eight bytes a number, and an eighth more that arrays grow ahead."""
    history = History()
    tracemalloc.start()
    try:
        for i in range(4000):
            numbers = {f"number {j}": float(i + j) for j in range(40)}
            history.append({"update": i, "reward": 0.5, "seconds": dict(numbers)} | numbers)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    columns = len(NUMBERS) + 1
    assert 8 * columns * 4000 <= held <= 9 * columns * 4000 + 4096
