"""Tests of the runs of docs/support.md: both scorings of one batch, numbers and tables by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import ppo_fast
from benchmarks.loop import truncation
from benchmarks.loop.truncation import (
    CURVES,
    FIGURE,
    PAGE,
    SUPPORT,
    WAYS,
    WHOLE,
    Curves,
    Scorings,
    both_ways,
    pair,
    tables,
    written,
)
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.experience import Scored
from ppo_fast.loop.data.sequences import Cut, Rollout, Sequences
from ppo_fast.loop.run import load_trainer

# fp32 sums in another order than the training forward's: 2**-24 times a condition below 1e4.
_GAP = 2**-24 * 1e4


def quick(folder: Path, **options: object) -> TrainConfig:
    return TrainConfig(
        **{"quick": True, "updates": 2, "batch": 6, "top_p": 0.9, "out": folder} | options
    )


@pytest.fixture(scope="module", params=WAYS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Scorings]:
    """A way, and the batch of a trainer's one update."""
    trainer = load_trainer(quick(tmp_path_factory.mktemp(request.param)), lambda text: None)
    with both_ways(trainer, request.param) as found:
        trainer.step()
    trainer.close()
    (scorings,) = found
    return request.param, scorings


def test_what_is_learnt_from_has_the_support_or_has_not(
    trained: tuple[str, Scorings],
) -> None:
    way, scorings = trained
    assert (scorings.seqs.support is None) == (way == WHOLE)
    assert scorings.drawn.seqs.support is not None
    # The old log-probs of the update: with the ids they are the sampler's.
    gap = float(scorings.gaps(way).abs().max())
    assert gap < _GAP if way == SUPPORT else gap > 0.05


def test_the_whole_vocabulary_s_ratio_is_the_mass_kept(
    trained: tuple[str, Scorings],
) -> None:
    """e^(log-prob over all − log-prob over the kept ids) = Σ of the kept ids' probabilities."""
    _, scorings = trained
    drawn, mask = scorings.drawn, scorings.seqs.mask
    assert drawn.cut is not None
    mass = torch.where(mask, 1 - drawn.cut.mass.double(), 1.0)
    assert float((scorings.gaps(WHOLE) - mass.log()).abs().max()) < _GAP
    assert float(scorings.gaps(SUPPORT).abs().max()) < _GAP
    numbers = {name: scorings.numbers(name) for name in WAYS}
    assert numbers[WHOLE]["gap"] == pytest.approx(float(mass.log()[mask].mean()), abs=_GAP)
    assert scorings.drawing()["cut"] == pytest.approx(1 - float(mass[mask].mean()))


def test_a_run_that_cuts_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was cut"):
        truncation.run(quick(tmp_path, top_p=1.0), SUPPORT, lambda text: None)


def test_a_pair_of_runs_begins_with_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = pair(quick(tmp_path), said.append)
    assert found.keys() == {"first", *WAYS}
    one, other = (found[way] for way in WAYS)
    # Before the first step they are one policy, and then they are not.
    for way in WAYS:
        for name, values in one["scored"][way].items():
            assert len(values) == 2
            assert values[0] == other["scored"][way][name][0]
            assert way == SUPPORT or name != "gap" or values[1] != other["scored"][way][name][1]
    assert one["size"][0] == other["size"][0] and one["reward"][0] == other["reward"][0]
    tokens, completions = (found["first"][WHOLE][of] for of in ("tokens", "completions"))
    assert len(completions) == 6 and len(tokens) <= 6 * 8
    assert math.prod(tokens) == pytest.approx(math.prod(completions), rel=1e-3)
    assert not (tmp_path / "log.jsonl").exists()

    drawn = truncation.run

    def shifted(config: TrainConfig, way: str, say: object) -> tuple[Curves, Scorings]:
        curves, first = drawn(config, way, lambda text: None)
        if way == WHOLE:
            first = first._replace(seqs=first.seqs._replace(tokens=first.seqs.tokens + 1))
        return curves, first

    monkeypatch.setattr(truncation, "run", shifted)
    with pytest.raises(RuntimeError, match="seed 0: the first batches of both runs must be the s"):
        pair(quick(tmp_path), said.append)


def test_numbers_computed_by_hand() -> None:
    """Two completions of two tokens, the last masked; ratios 0.75, 1, 1.25 over all ids."""
    mask = torch.tensor([[True, True], [True, False]])
    sampled = torch.tensor([[-1.0, -2.0], [-3.0, 99.0]])
    old = sampled + torch.tensor([[0.75, 1.0], [1.25, 1.0]]).log()
    zeros = torch.zeros_like(old)
    scored = {
        SUPPORT: Scored(sampled, sampled - 0.5, zeros, None),
        WHOLE: Scored(old, old - torch.tensor([[1.0, 2.0], [4.0, 9.0]]), zeros, None),
    }
    ids = torch.tensor([[5, 6, -1], [7, -1, -1], [1, 2, 3], [8, -1, -1]])
    seqs = Sequences(torch.zeros(2, 3), torch.ones(2, 3), mask, ppo_fast.Support(ids))
    cut = Cut(torch.tensor([[0.1, 0.2], [0.3, 0.9]]), torch.zeros(2, 2, dtype=torch.bool))
    made = Scorings(Rollout(seqs, sampled, cut), seqs, scored)
    assert made.drawing() == pytest.approx({"size": 2.0, "cut": 0.2, "surprisal": 2.0})
    assert made.numbers(SUPPORT) == pytest.approx(
        {"gap": 0.0, "outside": 0.0, "outside_completions": 0.0, "kl": 0.75}
    )
    assert made.numbers(WHOLE) == pytest.approx(
        {
            "gap": (math.log(0.75) + math.log(1.25)) / 3,
            "outside": 2 / 3,
            "outside_completions": 1.0,
            "kl": 3.5,
        },
        rel=1e-6,
    )


def made_by_hand() -> Curves:
    """Two seeds of five updates, whose outer fifths are the first and the last update."""

    def curves(first: float, last: float) -> Curves:
        def line(a: float, b: float) -> list[float]:
            return [a, 0.0, 0.0, 0.0, b]

        scored = {way: {"kl": line(0.0, 2.0), "gap": line(-0.1, -0.2)} for way in WAYS}
        drawn = {"surprisal": line(4.0, 3.0), "size": [10.0] * 5, "cut": [0.05] * 5}
        return {"reward": line(first, last), "scored": scored, **drawn}

    first = {
        SUPPORT: {"tokens": [1.0, 1.0], "completions": [1.0]},
        WHOLE: {"tokens": [0.75, 0.95], "completions": [0.7125]},
    }
    seeds = {
        str(seed): {"first": first, SUPPORT: curves(0.1 * seed, 1.0), WHOLE: curves(0.0, 0.5)}
        for seed in (0, 1)
    }
    return {"options": [], "seeds": seeds}


def test_tables_computed_by_hand() -> None:
    lines = tables(made_by_hand()).splitlines()
    assert "| the kept ids | 4 tokens | 1.000 | 1.000 | 1.000 | 0.0% |" in lines
    assert "| the whole vocabulary | 4 tokens | 0.750 | 0.850 | 0.950 | 50.0% |" in lines
    assert "| the whole vocabulary | 2 completions | 0.713 | 0.713 | 0.713 | 100.0% |" in lines
    rest = "2.00 | 4.00 | 3.00 | 10 | 5.0% |"
    assert f"| the kept ids | 2 | 5 | +0.050 | +1.000 | +0.950 | 0.100 | {rest}" in lines
    assert f"| the whole vocabulary | 2 | 5 | +0.000 | +0.500 | +0.500 | 0.000 | {rest}" in lines


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure is drawn by matplotlib")
    truncation.plot(made_by_hand(), tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_of_other_options_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "support.json"
    assert truncation.kept(path, []) == {"options": [], "seeds": {}}
    path.write_text(json.dumps(made_by_hand()))
    assert truncation.kept(path, []) == made_by_hand()
    assert truncation.kept(path, ["--top-p", "0.8"]) == {
        "options": ["--top-p", "0.8"],
        "seeds": {},
    }


def test_the_page_is_that_of_the_committed_curves() -> None:
    curves, page = json.loads(CURVES.read_text()), PAGE.read_text()
    assert written(page, curves) == page
    assert FIGURE.exists() and f"({FIGURE.name})" in page


def test_the_committed_runs_learn_and_show_the_bias() -> None:
    """Three seeds: a ratio of 1 over the kept ids, and of the mass that is kept over all."""
    curves = json.loads(CURVES.read_text())
    assert len(curves["seeds"]) == 3 and curves["options"] == ["--quick", "--top-p", "0.9"]
    for seed in curves["seeds"].values():
        own, whole = (seed["first"][way]["tokens"] for way in WAYS)
        assert max(abs(x - 1) for x in own) < 2 * _GAP
        assert max(whole) < 1 + _GAP and sum(whole) / len(whole) < 0.97
        first, last = truncation.fifths(seed[SUPPORT]["reward"])
        assert last > first
