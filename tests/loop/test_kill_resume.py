"""SIGKILL at random moments: every run resumes and ends as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "kill_resume.py"


@pytest.mark.case("R1")
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_killed_runs_end_bitwise_equal(kills: int) -> None:
    """In a process of its own: forks want one without threads."""
    path = os.pathsep.join(str(x) for x in (SCRIPT.parents[2], SCRIPT.parents[1] / "helpers"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", str(kills)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{kills} of {kills} kills resumed and ended bitwise equal" in done.stdout
