"""Tests of the comparison with other trainers: counts, turns, and no ratio for unequal work."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
from bench_rows import FACTS, lines_with, row
from trainer_sides_helpers import prepared, updates

from benchmarks.harness.worker import BrokenError
from benchmarks.loop import bench_trainers, trainer_sides
from benchmarks.loop.bench_trainers import COMPARISONS, Comparison, Side, measure
from benchmarks.loop.equal_work import (
    MODEL,
    Counts,
    Meter,
    Update,
    Work,
    differences,
    read_prompts,
)
from benchmarks.report import pages, readme, trainers
from benchmarks.report import results as files
from benchmarks.report.results import Results, Row

WORK = Work("ppo", 4, 3, epochs=2, minibatches=2, micro_batch=1, critic="shared")
CASE = trainers.PPO_64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("comparison"))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_loop_does_the_work_that_it_is_given(folder: Path, critic: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    prompts = [tokenizer(text)["input_ids"] for text in read_prompts(folder, 4)]
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    weights, head = sum(p.numel() for p in model.parameters()), model.config.hidden_size + 1
    wanted = Counts(
        prompt_tokens=sum(map(len, prompts)),
        response_tokens=12,
        trained_tokens=24,
        value_tokens=24,
        forwards=8,
        optimizer_steps=4,
        parameters=weights * (2 if critic == "separate" else 1) + head,
        logprobs=36,  # of sampling, the old policy, the reference
    )
    wanted.prompted(prompts)
    wanted.prompt_tokens //= 2
    found = updates("ppo_fast", dataclasses.replace(WORK, critic=critic), folder, 2)
    assert [update.counts for update in found] == [wanted, wanted]
    for update in found:
        assert set(update.phases) == set(trainers.PHASES) and min(update.phases.values()) > 0
        assert sum(update.phases.values()) == pytest.approx(update.seconds)
        assert 0.0 <= update.reward <= 1.0 and update.peak_bytes > 2**20


@pytest.mark.parametrize("what", ["pad_token", "eos_token"])
def test_no_model_samples_the_token_that_would_end_a_completion(folder: Path, what: str) -> None:
    """The tiny model has more embeddings than its tokenizer has tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder / MODEL)
    embeddings = model.get_input_embeddings().num_embeddings
    assert len(tokenizer) < embeddings
    trainer_sides.set_unsampled(tokenizer, what, model)
    assert getattr(tokenizer, f"{what}_id") == embeddings


def test_less_work_is_a_difference_and_more_scoring_is_none() -> None:
    theirs = Counts("a", 5, 6, 12, 12, 4, 2, 100, 12)
    assert differences(theirs, theirs) == []
    assert differences(dataclasses.replace(theirs, logprobs=18), theirs) == []
    for name, value in dataclasses.asdict(theirs).items():
        less = "b" if name == "prompts" else value - 1
        changed = dataclasses.replace(theirs, **{name: less})
        assert differences(changed, theirs) == [f"{name} {less} against {value}"]
        if name not in ("prompts", "logprobs"):
            more = dataclasses.replace(theirs, **{name: value + 1})
            assert differences(more, theirs) == [f"{name} {value + 1} against {value}"]


def test_prompts_are_the_same_in_any_order() -> None:
    one, other, third = Counts(), Counts(), Counts()
    one.prompted([[1, 2], [3]]), other.prompted([[3], [1, 2]]), third.prompted([[1], [2, 3]])
    assert one == other and one.prompt_tokens == 3
    assert one.prompts != third.prompts and third.prompt_tokens == 3


def test_an_update_survives_its_journey_between_processes() -> None:
    meter = Meter()
    meter.begin()
    meter.counts.prompted([[1, 2]])
    assert meter.rewarded(lambda prompts, texts: [0.25, 0.75])(["", ""], ["a", "b"]) == [
        0.25,
        0.75,
    ]
    update = meter.end()
    assert update.reward == 0.5 and update.phases["update"] == update.seconds
    assert Update.from_json(dataclasses.asdict(update)) == update
    assert Work(**dataclasses.asdict(WORK)) == WORK


def test_sides_take_turns_and_unequal_work_has_no_ratio(folder: Path) -> None:
    """Two processes of the loop, one of which does an epoch less."""
    fewer = dataclasses.replace(WORK, epochs=1)
    sides = [Side("less", "ppo_fast", fewer), Side("ppo_fast", "ppo_fast", WORK)]
    rows = measure(Comparison(CASE, sides, 1.0), folder, {"ppo_fast": sys.executable}, 2, 600.0)
    status = {made["provider"]: made["status"] for made in rows}
    assert status == {"less": "red", "ppo_fast": "ok"}
    assert [made["samples"] for made in rows] == [2, 2]
    assert "update 0: trained_tokens 24 against 12; " in rows[0]["detail"]
    assert all(made["min_ms"] <= made["median_ms"] for made in rows)
    assert [line[-1] for line in trainers.cells(rows)[1:]] == ["-", "-"]
    alike = [made | {"status": "ok"} for made in rows]
    assert trainers.cells(alike)[1][-1].endswith("×")


def test_a_trainer_that_cannot_start_is_named(folder: Path) -> None:
    bad = dataclasses.replace(WORK, minibatches=9)
    comparison = Comparison(CASE, [Side("ppo_fast", "ppo_fast", bad)], 1.0)
    with pytest.raises(BrokenError, match=r"minibatches must be in \[1, 4\], got 9") as caught:
        measure(comparison, folder, {"ppo_fast": sys.executable}, 1, 600.0)
    assert caught.value.provider == "ppo_fast"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trl-ppo", "/nowhere/python"], "--trl-ppo must be a Python interpreter, got /nowhere"),
        (["--only", "dpo"], "argument --only: invalid choice: 'dpo'"),
        (["--rounds", "0"], "--rounds: must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_trainers.main(options)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_every_comparison_is_one_that_a_goal_or_a_reader_can_find() -> None:
    names = [comparison.name for comparison in COMPARISONS]
    assert len(set(names)) == len(names) and "ppo-shared:16x64" in names
    assert {goal.case for goal in trainers.GOALS} <= {c.case for c in COMPARISONS}
    for comparison in COMPARISONS:
        assert trainers.OURS in {side.name for side in comparison.sides}
        for side in comparison.sides:
            assert comparison.case.shape.dims == (side.work.sequences, side.work.new_tokens)
            assert side.name.endswith("-bf16") == (side.work.dtype == "bfloat16")
        for goal in trainers.GOALS:
            if goal.case == comparison.case:
                assert {goal.provider, goal.against} <= {side.name for side in comparison.sides}


def made(provider: str, seconds: float, **fields: object) -> Row:
    """A row of a comparison."""
    more = {"version": "1", "min_ms": 900 * seconds, "first_ms": 2e3 * seconds, "run": 0}
    more |= {"cpu_ms": 1900 * seconds, "rewards": [0.5, 0.75], "peak_mb": 2048 * seconds}
    phases = {"rollout": 300.0, "scoring": 200.0, "update": 500.0}
    return row(CASE, provider, 1e3 * seconds, **(more | {"phases_ms": phases} | fields))


def test_the_pages_have_a_table_and_the_verdicts() -> None:
    rows = [made("trl-ppo", 4.0), made("trl-ppo-bf16", 3.0)]
    held = Results([FACTS], [*rows, made("ppo_fast", 2.0), made("ppo_fast-bf16", 1.0)])
    beside = {Path("some-cpu-avx2-2026-01-02.json"): held}
    text = pages.page({}, beside)
    assert "](results/trainers/some-cpu-avx2-2026-01-02.json)" in text
    (line,) = lines_with(text, "| trl-ppo 1 |")
    cells = "4.00 | 3.60 | 8.00 | 7.60 | 0.300 | 0.200 | 0.500 | 8.00 | 0.500 | 0.750 | 25"
    assert line == f"| trl-ppo 1 | {cells} | 0.500× | 0.250× |"
    assert lines_with(
        text, "ppo_fast against trl-ppo |", "| 0.500× | ≤ 0.65× | met | ≤ 0.5× | met |"
    )
    assert lines_with(text, "ppo_fast-bf16 against trl-ppo |", "| 0.250× | ≤ 0.4× | met |")
    assert lines_with(text, "ppo_fast-bf16 against trl-ppo-bf16 |", "| 0.333× | ≤ 0.85× | met |")
    for words in (readme.ENGLISH, readme.CHINESE):
        front = readme.section({}, words, beside)
        (full,), (half,) = (lines_with(front, "PPO", dtype, "GiB |") for dtype in ("fp32", "bf16"))
        assert full.endswith("| 2.00× | 8.00 → 4.00 GiB |")
        assert half.endswith("| 3.00× | 6.00 → 2.00 GiB |")
        assert "](benchmarks/results/trainers/some-cpu-avx2-2026-01-02.json)" in front


def test_unequal_work_is_said_and_judged_nowhere() -> None:
    red = made("trl-ppo", 4.0, status="red", detail="update 1: prompt_tokens 5 against 6")
    rows = [red, made("ppo_fast", 2.0)]
    assert trainers.cells(rows)[1][-1] == "-"
    text = "\n".join(trainers.section(rows))
    assert "- trl-ppo: `red: update 1: prompt_tokens 5 against 6`" in text
    assert "×" not in text and trainers.found(rows) == []
    assert trainers.summary(rows, readme.ENGLISH.trainers) == []


def test_rows_are_saved_beside_those_of_the_ops(tmp_path: Path) -> None:
    path = files.save(tmp_path, [made("trl-ppo", 4.0), made("ppo_fast", 2.0)], FACTS)
    assert trainers.cells(files.load(path).rows)[1][-1] == "0.500×"
