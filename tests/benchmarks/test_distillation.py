"""Tests of the runs of docs/distillation.md: numbers by hand, the table, the committed curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.loop import distillation
from benchmarks.loop.distillation import CURVES, FIGURE, FORMS, PAGE, Curves, table, written
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.run import load_trainer


class Fixed:
    """A tower of one distribution for every token."""

    def __init__(self, *probabilities: float) -> None:
        self.row = torch.tensor(probabilities).log()

    def logits(self, seqs: Sequences) -> tuple[torch.Tensor, None]:
        """The same logits for each kept token."""
        return self.row.expand(int(seqs.mask.sum()), -1), None


def test_numbers_computed_by_hand() -> None:
    """Three of six sequences, the first half, of which one token is masked."""
    mask = torch.tensor([[True, True], [True, False], [True, True]] * 2)
    seqs = Sequences(torch.zeros(6, 3), torch.ones(6, 3), mask)
    agent: Any = SimpleNamespace(
        policy=Fixed(0.5, 0.5), teacher=Fixed(0.75, 0.25), temperature=lambda tower: 1.0
    )
    found = distillation.measured(agent, seqs, rows=2)
    # fp32's ln of numbers near 1: a few of its roundings.
    assert found == pytest.approx(
        {
            "kl": 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
            "forward": 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5),
            "agree": 1.0,
        },
        abs=1e-6,
    )
    agent.teacher = None
    with pytest.raises(ValueError, match=r"^agent must have a teacher, got none$"):
        distillation.measured(agent, seqs)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_leaves_curves_alone(tmp_path: Path, form: str) -> None:
    quick: dict[str, Any] = {"quick": True, "updates": 2, "batch": 6, "device": "cpu"}
    teacher = load_trainer(TrainConfig(out=tmp_path, seed=1, **quick), lambda text: None)
    teacher.agent.policy.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    quick |= {"teacher": str(tmp_path / "teacher"), "distill": form, "reward_coef": 0.0}
    said: list[str] = []
    curves = distillation.run(TrainConfig(out=tmp_path / "run", **quick), said.append)
    assert {len(values) for values in curves.values()} == {2}
    assert curves["kl"][0] > 0 and sum("KL" in text for text in said) == 2
    if form == "reverse":  # what the op says of the update, and both models' logits before it
        assert curves["divergence"][0] == pytest.approx(curves["kl"][0], rel=0.3)
    assert not (tmp_path / "run").exists()


def made_by_hand() -> Curves:
    """Two seeds of five updates, whose outer fifths are the first and the last update."""

    def curves(first: float, last: float) -> Curves:
        names = ("kl", "agree", "reward")
        return {name: [first, 0.0, 0.0, 0.0, last] for name in names}

    seeds = {str(i): {form: curves(0.5 + i, 0.25) for form in FORMS} for i in (0, 1)}
    return {"options": [], "teacher": [0.1, 0.0, 0.0, 0.0, 0.7], "seeds": seeds}


def test_the_table_computed_by_hand() -> None:
    lines = table(made_by_hand()).splitlines()
    assert len(lines) == 2 + 4 + 1
    assert lines[2] == (
        "| reverse KL, whole distributions | 0 | 0.500 | 0.250 | 50.0% | 25.0% | +0.500 | +0.250 |"
    )
    assert "| 1 | 1.500 | 0.250 | 150.0% | 25.0% | +1.500 | +0.250 |" in lines[3]
    assert lines[-1].endswith("| +0.100 | +0.700 |")
    assert {line.count("|") for line in lines} == {9}


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure is drawn by matplotlib")
    distillation.plot(made_by_hand(), tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_rewards_and_runs_of_before_are_read(tmp_path: Path) -> None:
    assert distillation.rewards_of(tmp_path) == []
    (tmp_path / "log.jsonl").write_text('{"reward": 0.25}\n{"reward": 0.5}\n')
    assert distillation.rewards_of(tmp_path) == [0.25, 0.5]
    path = tmp_path / "distillation.json"
    assert distillation.kept(path, []) == {"options": [], "seeds": {}}
    path.write_text(json.dumps(made_by_hand()))
    assert distillation.kept(path, []) == made_by_hand()
    assert distillation.kept(path, ["--lr", "1"]) == {"options": ["--lr", "1"], "seeds": {}}


def test_the_page_is_that_of_the_committed_curves() -> None:
    curves, page = json.loads(CURVES.read_text()), PAGE.read_text()
    assert written(page, curves) == page
    assert FIGURE.exists() and f"({FIGURE.name})" in page
    options = " ".join(curves["options"])
    assert f"python -m benchmarks.loop.distillation {options}\n" in page


def test_the_committed_runs_learn() -> None:
    """Three seeds of both forms come nearer to the teacher, and to its reward, unseen."""
    curves = json.loads(CURVES.read_text())
    assert len(curves["seeds"]) == 3
    for runs in curves["seeds"].values():
        assert runs.keys() == FORMS.keys()
        for form in FORMS:
            first, last = distillation.fifths(runs[form]["kl"])
            assert last < 0.7 * first
            first, last = distillation.fifths(runs[form]["reward"])
            assert last > first
