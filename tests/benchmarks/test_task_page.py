"""Tests of docs/tasks.md: its table is that of the committed curves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loop.task_page import CURVES, DOCS, PAGE, collect, gain, table, written
from ppo_fast.loop.rewards import REWARDS
from ppo_fast.loop.tasks import TASKS


def curves() -> dict:
    return json.loads(CURVES.read_text())


def test_the_table_is_that_of_the_curves() -> None:
    page = PAGE.read_text()
    assert written(page, curves()) == page
    for name in curves():
        assert (DOCS / "tasks" / f"{name}.png").exists()
        assert (DOCS / "tasks" / f"{name}.html").exists()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gains_more_than_its_seeds_differ(name: str) -> None:
    entry = curves()[name]
    assert (entry["task"], entry["reward"]) == (name, "task") and len(entry["seeds"]) == 3
    _, _, gained, spread = gain(entry)
    assert gained > spread
    assert all(seed["seconds"] < 15 * 60 for seed in entry["seeds"].values())


def test_the_page_names_every_task_and_reward() -> None:
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in [*TASKS, *REWARDS])


def test_a_table_computed_by_hand(tmp_path: Path) -> None:
    """Fifths of five updates are the outer ones: 0 and 0.2 to 1 and 1.1."""
    for seed, (first, last) in enumerate([(0.0, 1.0), (0.2, 1.1)]):
        folder = tmp_path / "mine" / str(seed)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"task": "qa", "reward": "task"}')
        rewards = [first, 0.5, 0.5, 0.5, last]
        records = [{"reward": r, "kl": 2.0, "seconds": {"a": 1, "b": 2}} for r in rewards]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = collect(tmp_path)
    assert gain(found["mine"]) == pytest.approx((0.1, 1.05, 0.95, 0.2))
    row = table(found).splitlines()[2]
    wanted = "qa, task | 2 | 5 | +0.100 | +1.050 | +0.950 | 0.200 | 2.0 | 15"
    assert row == f"| [mine](tasks/mine.png) | {wanted} | [report](tasks/mine.html) |"
