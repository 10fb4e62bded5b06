"""OpenRLHF's own CPU tests of its core algorithms, with the patch applied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from trainers import needs

needs("openrlhf")

ROOT = Path(__file__).resolve().parents[2]
OWN = (
    "test_loss_aggregation.py",
    "test_kl_estimator_gradient.py",
    "test_actor_entropy_temperature.py",
)
CODE = f"""
import importlib.util, pathlib, sys
import openrlhf_imports
import pytest
from ppo_fast.integrations import openrlhf as v
from openrlhf.models import loss, utils
v.apply(("policy_loss", "value_loss", "logprobs", "entropy", "kl"))

class Copies:
    # These tests run the package's files once more, and take functions from there.
    def pytest_collection_modifyitems(self):
        for name, module in [*sys.modules.items()]:
            if name.startswith(("_openrlhf", "test_", "tests.test_")):
                for cls in ("PolicyLoss", "ValueLoss"):
                    if hasattr(module, cls):
                        getattr(module, cls).forward = getattr(loss, cls).forward
                for function in ("log_probs_from_logits", "compute_entropy", "compute_approx_kl"):
                    if hasattr(module, function):
                        setattr(module, function, getattr(utils, function))

folder = pathlib.Path(importlib.util.find_spec("openrlhf").origin).parents[1] / "tests"
rc = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=",
                  *(str(folder / f) for f in {OWN!r})], plugins=[Copies()])
print({{op: (n.fused, n.left) for op, n in v.integration.calls.items()}})
sys.exit(rc)
"""


def test_openrlhfs_own_tests_pass_on_ppo_fast(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    search = os.pathsep.join([here, str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *_, summary, calls = done.stdout.strip().splitlines()
    assert " passed" in summary and "failed" not in summary
    counts = eval(calls)
    assert all(counts[op][0] > 0 for op in ("policy_loss", "logprobs", "entropy", "kl")), counts
