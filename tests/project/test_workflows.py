"""Tests of the workflows: they read only, end in time, and call what the repository has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def workflow(path: Path) -> dict[Any, Any]:
    loaded: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    loaded["on"] = loaded.pop(True)  # YAML 1.1 reads `on` so
    return loaded


def commands(job: dict[str, Any]) -> list[str]:
    """The shell lines of a job, for every row of its matrix."""
    runs = [step["run"] for step in job["steps"] if "run" in step]
    rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])

    def filled(run: str, row: dict[str, str]) -> str:
        return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: row[found[1]], run)

    return [filled(run, row) for row in rows for run in runs]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_reads_only_and_calls_what_is_there(path: Path) -> None:
    loaded = workflow(path)
    assert loaded["permissions"] == {"contents": "read"}
    assert not re.search(r"secrets\.|github\.token|GITHUB_TOKEN|: write", path.read_text())
    targets = set(re.findall(r"^(?:\.PHONY: )?([\w. -]+):", MAKEFILE, re.MULTILINE))
    known = {word for line in targets for word in line.split()}
    trainers = re.search(r"^TRAINERS := (.+)", MAKEFILE, re.MULTILINE)
    assert trainers
    known |= {f"test-{name}" for name in trainers[1].split()} | {".venv/.installed"}
    for name, job in loaded["jobs"].items():
        for command in commands(job):
            for target in re.findall(r"\bmake ([\w./-]+)", command):
                assert target in known, f"{path.name}, {name}: make {target}"
            for script in re.findall(r"[\w./]+/[\w.]+\.(?:py|sh)\b|\.ci/run", command):
                assert (ROOT / script).exists(), f"{path.name}, {name}: {script}"


def test_the_weekly_run_has_the_newest_the_lowest_and_an_end() -> None:
    weekly = workflow(ROOT / ".github/workflows/weekly.yml")
    assert set(weekly["on"]) == {"schedule", "workflow_dispatch"}
    assert all(job["timeout-minutes"] <= 120 for job in weekly["jobs"].values())
    rows = weekly["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows if row["torch"] == "torch"} == {"3.11", "3.14"}
    newest = [set(row["others"].split()) for row in rows if row["torch"] == "torch"]
    assert all({"--upgrade", "triton", "transformers", "peft"} <= names for names in newest)
    (lowest,) = (row for row in rows if row["torch"] != "torch")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-python = ">={lowest["python"]}"' in project
    for pin in (lowest["torch"], *lowest["others"].split()):
        name, _, version = pin.partition("==")
        bound = re.search(rf'"{name}>=([\d.]+)', project)
        assert bound, name
        assert version.startswith(bound[1]), f"{name} is to be tried at {bound[1]}, got {version}"


def test_the_weekly_run_has_every_trainer_with_a_highest_version() -> None:
    """TRL has no PPO from 1.13 on, and `compat` runs none of the trainers that it reads."""
    weekly = workflow(ROOT / ".github/workflows/weekly.yml")
    rows = weekly["jobs"]["trainers"]["strategy"]["matrix"]["include"]
    for row in rows:
        highest = re.search(rf"^HIGH_{row['trainer']} := (.+)", MAKEFILE, re.MULTILINE)
        assert highest
        assert re.sub(r"==\S+", "", highest[1]).split() == row["newest"].split()
    named = set(re.findall(r"^HIGH_([\w-]+) :=", MAKEFILE, re.MULTILINE))
    assert {row["trainer"] for row in rows} == named - {"trl-ppo", "compat"}
