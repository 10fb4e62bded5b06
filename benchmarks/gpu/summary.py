"""The newest GPU results of a folder in short: `python -m benchmarks.gpu.summary FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.ops.registry import GOALS
from benchmarks.report import results, tables
from benchmarks.report.judge import verdicts


def newest(folder: Path) -> Path | None:
    """The results file of a GPU that was written last."""
    written = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in written if "gpu" in results.load(path).runs[-1]), None)


def main(folder: Path) -> int:
    """Print what went wrong, then the goals on the GPU; 1 if there is no such file."""
    path = newest(folder)
    if path is None:
        print(f"nothing was measured on a GPU: no file in {folder}")
        return 1
    found = results.load(path)
    rows = [row for row in found.rows if row["device"] == "cuda"]
    for case, block in results.by_case(rows).items():
        for row in block:
            if row["status"] in ("red", "error"):
                print(f"{case.name} {row['provider']}: {row['status']}: {row['detail']}"[:200])
    for line in tables.verdict_table(
        verdicts(rows, [goal for goal in GOALS if goal.case.device == "cuda"])
    ):
        print(line)
    print(f"{tables.describe_facts(found.runs[-1])}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
