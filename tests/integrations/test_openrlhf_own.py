"""OpenRLHF's own CPU tests of its core algorithms, with the patch applied."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import needs

needs("openrlhf")

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.find_spec("openrlhf")
assert SPEC is not None
FOLDER = Path(str(SPEC.origin)).parents[1] / "tests"
# Each file, and the ops that it calls.
WHOLE = {
    "test_loss_aggregation.py": ("policy_loss",),  # from 0.10.3
    "test_kl_estimator_gradient.py": ("kl",),  # from 0.11.1
    "test_actor_entropy_temperature.py": ("logprobs", "entropy"),  # from 0.11.1
}
OWN = {name: ops for name, ops in WHOLE.items() if (FOLDER / name).exists()}
CODE = f"""
import sys
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

rc = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=",
                  *{[str(FOLDER / name) for name in OWN]!r}], plugins=[Copies()])
print({{op: (n.fused, n.left) for op, n in v.integration.calls.items()}})
sys.exit(rc)
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    here = str(Path(__file__).parent)
    search = os.pathsep.join([str(folder), here, str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": search},
    )


@pytest.mark.skipif(
    not OWN,
    reason=f"openrlhf {importlib.metadata.version('openrlhf')} comes without tests of its losses",
)
def test_openrlhfs_own_tests_pass_on_ppo_fast(tmp_path: Path) -> None:
    done = python(CODE, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *_, summary, calls = done.stdout.strip().splitlines()
    assert " passed" in summary and "failed" not in summary
    counts = eval(calls)
    assert all(counts[op][0] > 0 for ops in OWN.values() for op in ops), counts


RAY = """
import os
import ray

@ray.remote
class Worker:
    def work(self):
        import torch
        from openrlhf.models import PolicyLoss
        from ppo_fast.integrations import openrlhf
        x = torch.full((2, 3), -1.0)
        loss = PolicyLoss()(x, x, torch.ones(2, 3), action_mask=torch.ones(2, 3))[0]
        fused = {op: n.fused for op, n in openrlhf.integration.calls.items()}
        return os.getpid(), float(loss), fused

hook = {"worker_process_setup_hook": "ppo_fast.integrations.openrlhf.apply"}
ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", runtime_env=hook)
pid, loss, fused = ray.get(Worker.remote().work.remote())
assert pid != os.getpid()
print(loss, fused["policy_loss"], sorted(fused))
ray.shutdown()
"""


def test_a_ray_worker_is_patched_by_the_setup_hook(tmp_path: Path) -> None:
    """The line of docs/integrations/openrlhf.md; every process has the stand-ins."""
    (tmp_path / "sitecustomize.py").write_text("import openrlhf_imports\n")
    done = python(RAY, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ops = ["advantages", "entropy", "kl", "logprobs", "policy_loss", "value_loss"]
    assert done.stdout.strip().splitlines()[-1] == f"-1.0 1 {ops}"
