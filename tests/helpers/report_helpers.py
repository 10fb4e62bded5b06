"""Folders of runs, made by hand, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>window.hit = 1</script><img src=x onerror='window.hit=1'>\u202e\x00\ud800"
)


def record(update: int, **changes: Any) -> dict[str, Any]:
    """An update as the log has it."""
    return {
        "update": update,
        "reward": 0.1 * update,
        "dropped": {},
        "batch": 4,
        "kl": 0.5 * update,
        "seconds": {"rollout": 0.2, "reward": 0.05, "update": 0.25},
        "tokens_per_second": 100.0,
        "n_tokens": 64.0,
        "n_seqs": 8.0,
        "clip_frac": 0.1,
        "entropy": 3.0,
        "value_loss": 0.2,
        "explained_variance": 0.3,
        "grad_norm": 1.0,
        "ess": 0.9,
        "rollout_gap_mean": 1e-7,
    } | changes


def bare(update: int) -> dict[str, Any]:
    """An update whose every sample was dropped."""
    faults = {str(i): "reward returned nan" for i in range(4)}
    return {
        "update": update,
        "reward": None,
        "dropped": faults,
        "batch": 4,
        "seconds": {"rollout": 0.2, "reward": 0.05},
        "tokens_per_second": 100.0,
    }


def write(
    folder: Path, records: list[dict], samples: list[dict] | None = None, **config: Any
) -> Path:
    """A run's folder; its options are `config` beside a few defaults."""
    folder.mkdir(parents=True)
    options = {"model": "tiny", "reward": "letters", "updates": 10, "lr": 0.01, "seed": 0}
    options |= {"out": str(folder), **config}
    (folder / "config.json").write_text(json.dumps(options))
    (folder / "versions.json").write_text(json.dumps({"torch": "2.13.0", "cores": 2}))
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if samples is None:
        samples = [
            {
                "update": r["update"],
                "prompt": f"prompt {r['update']}",
                "completion": " and so on",
                "reward": 0.5,
            }
            for r in records
        ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder
