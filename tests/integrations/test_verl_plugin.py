"""verl's own tests with the plugin; the plugin's two ways in; a Ray worker."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainers import needs

needs("verl")

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "ppo_fast.integrations.verl_plugin"
OWN = (
    "test_core_algos_on_cpu.py",
    "test_dynamic_policy_losses_on_cpu.py",
    "test_loss_aggregation_on_cpu.py",
    "test_rollout_corr.py",
    "test_rollout_corr_integration.py",
    "test_value_loss_normalization_on_cpu.py",
)
ACTIVE = (
    "import verl; from ppo_fast.integrations import verl as v; print(sorted(v.integration.calls))"
)
ALL = "['entropy', 'gae', 'kl', 'linear_logprobs', 'logprobs', 'policy_loss', 'value_loss']"


# 0.8.0 loads no entry points; the module itself is not imported here.
LOADER = Path(str(importlib.util.find_spec("verl").origin)).read_text()  # type: ignore[union-attr]
by_entry_point = pytest.mark.skipif(
    "verl.plugins" not in LOADER,
    reason=f"verl {importlib.metadata.version('verl')} loads no entry points",
)


def python(code: str, *paths: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, without an installed ppo_fast's entry point."""
    search = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env={**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "PYTHONPATH": search, **env},
    )


def entry_point(folder: Path, module: str) -> Path:
    """Metadata of an installed package with this entry point."""
    info = folder / "some_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\nsome_plugin = {module}\n")
    return folder


def test_verls_own_tests_pass_on_ppo_fast() -> None:
    """Those that came with verl, in one process that the plugin has patched."""
    code = f"""
import sys, pathlib, pytest, verl
from ppo_fast.integrations import verl as v
folder = pathlib.Path(verl.__file__).parent.parent / "tests/trainer/ppo"
files = [folder / f for f in {OWN!r} if (folder / f).exists()]  # of its version
rc = pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib",
                  "-o", "addopts=", *map(str, files)])
print(len(files))
print({{op: (n.fused, n.left) for op, n in v.integration.calls.items()}})
sys.exit(rc)
"""
    done = python(code, VERL_USE_EXTERNAL_MODULES=PLUGIN)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    *_, summary, files, calls = done.stdout.strip().splitlines()
    assert " passed" in summary and "failed" not in summary
    counts, everything = eval(calls), int(files) == len(OWN)
    assert everything or int(files) >= 3, "0.8.0 comes with three of them"
    ops = ("gae", "kl", "policy_loss", "value_loss") if everything else ("policy_loss",)
    assert all(counts[op][0] > 0 for op in ops), counts
    # One test has verl refuse a `dro_beta` of None.
    left = {op: n[1] for op, n in counts.items() if n[1]}
    assert left == ({"policy_loss": 1} if everything else {}), counts


def test_loaded_by_the_environment_variable() -> None:
    done = python(ACTIVE, VERL_USE_EXTERNAL_MODULES=PLUGIN)
    assert done.stdout.strip() == ALL, done.stderr
    assert "ppo_fast: patched verl.trainer.ppo.core_algos" in done.stderr


def test_ops_by_name() -> None:
    done = python(ACTIVE, VERL_USE_EXTERNAL_MODULES=PLUGIN, PPO_FAST_VERL_OPS="kl,gae")
    assert done.stdout.strip() == "['gae', 'kl']", done.stderr
    done = python(ACTIVE, VERL_USE_EXTERNAL_MODULES=PLUGIN, PPO_FAST_VERL_OPS="gea")
    assert done.returncode != 0 and "verl: ops must be among" in done.stderr


@by_entry_point
def test_loaded_by_the_entry_point(tmp_path: Path) -> None:
    """pyproject.toml's own entry point, in the group that verl looks through."""
    assert f'ppo_fast = "{PLUGIN}"' in (ROOT / "pyproject.toml").read_text()
    folder = entry_point(tmp_path, PLUGIN)
    done = python(ACTIVE, folder, VERL_USE_EXTERNAL_PLUGINS="some_plugin")
    assert done.stdout.strip() == ALL, done.stderr
    assert python(ACTIVE, folder).stdout.strip() == "[]"  # VERL_USE_EXTERNAL_PLUGINS=none


@pytest.mark.parametrize("way", ["environment", pytest.param("entry point", marks=by_entry_point)])
def test_a_failure_is_heard(tmp_path: Path, way: str) -> None:
    """An op that there is not: the variable stops the import, and both say why."""
    ops = {"PPO_FAST_VERL_OPS": "gea"}
    if way == "environment":
        done = python(ACTIVE, tmp_path, VERL_USE_EXTERNAL_MODULES=PLUGIN, **ops)
        assert done.returncode != 0 and "ValueError" in done.stderr
    else:
        folder = entry_point(tmp_path, PLUGIN)
        done = python(ACTIVE, folder, VERL_USE_EXTERNAL_PLUGINS="some_plugin", **ops)
        assert done.stdout.strip() == "[]"
    assert "ppo_fast: verl runs without ppo_fast: verl: ops must be among ('policy_loss'," in (
        done.stderr
    )


def test_another_version_of_known_source_is_patched(tmp_path: Path) -> None:
    """With a line that says which versions are tested."""
    info = tmp_path / "verl-0.99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.99.0\n")
    done = python(ACTIVE, tmp_path, VERL_USE_EXTERNAL_MODULES=PLUGIN)
    assert done.stdout.strip() == ALL, done.stderr
    assert "verl: verl 0.99.0 is patched although not tested (tested: 0.8.0–0.9.1)" in done.stderr


def test_a_ray_worker_is_patched() -> None:
    """A process that Ray starts, which imports verl by itself and computes a loss with it."""
    code = """
import ray

@ray.remote
def work():
    import os, torch
    from verl.trainer.ppo import core_algos
    from ppo_fast.integrations import verl as v
    x = torch.arange(6.0).view(2, 3)
    loss, _ = core_algos.compute_value_loss(x, x + 1, x, torch.ones(2, 3), 0.2)
    return os.getpid(), float(loss), {op: n.fused for op, n in v.integration.calls.items()}

ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
import os
pid, loss, calls = ray.get(work.remote())
assert pid != os.getpid()
print(loss, calls["value_loss"])
ray.shutdown()
"""
    done = python(code, VERL_USE_EXTERNAL_MODULES=PLUGIN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "0.5 1"
