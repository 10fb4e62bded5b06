"""What a wheel and an sdist hold, with torch at hand and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("ppo_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
NO_TORCH = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is built, its symlinks kept, without build products."""
    tree = tmp_path / "tree"
    tree.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tree / name)
    return tree


def setup(
    tree: Path, *args: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`setup.py args` in a fresh interpreter that also sees the modules in `path`."""
    env = {k: v for k, v in os.environ.items() if k != "PPO_FAST_BUILD"} | environment
    env["PYTHONPATH"] = str(path or "")
    return subprocess.run(
        [sys.executable, "setup.py", *args],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def built(tree: Path, pattern: str) -> Path:
    (found,) = (tree / "dist").glob(pattern)
    return found


def expected(suffixes: tuple[str, ...]) -> set[str]:
    """Every source of the package, by the name it is imported by."""
    names = set()
    for folder, prefix in (
        ("ppo_fast", "ppo_fast"),
        ("kernels", "ppo_fast/kernels"),
        ("csrc", "ppo_fast/csrc"),
    ):
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder).as_posix()
            linked = folder == "ppo_fast" and inside.startswith(("kernels", "csrc"))
            if path.suffix in suffixes and not linked and "__pycache__" not in inside:
                names.add(f"{prefix}/{inside}")
    return names


def test_a_wheel_without_torch_is_pure(checkout: Path, tmp_path: Path) -> None:
    """It builds, says so, and holds kernels, C++ sources and py.typed; no tests."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text(NO_TORCH)
    done = setup(checkout, "bdist_wheel", path=blocked)
    assert done.returncode == 0, done.stderr
    assert "building without the C++ extension" in done.stdout
    wheel = built(checkout, "*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert held == expected((".py", ".h", ".cpp")) | {"ppo_fast/py.typed"}


def test_an_explicit_request_never_degrades(checkout: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "torch.py").write_text(NO_TORCH)
    done = setup(checkout, "bdist_wheel", path=blocked, PPO_FAST_BUILD="cpu")
    assert done.returncode != 0 and "PPO_FAST_BUILD=cpu needs torch" in done.stderr
    wrong = setup(checkout, "bdist_wheel", PPO_FAST_BUILD="gpu")
    assert (
        wrong.returncode != 0 and "must be one of auto, none, cpu, cuda, got 'gpu'" in wrong.stderr
    )


def test_the_sdist_follows_both_symlinks(checkout: Path) -> None:
    done = setup(checkout, "sdist", PPO_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(built(checkout, "*.tar.gz")) as archive:
        names = archive.getnames()
    held = {name.split("/", 1)[1] for name in names if "/" in name}
    assert (
        expected((".py", ".h", ".cpp")) | {"ppo_fast/py.typed", "setup.py", "pyproject.toml"}
        <= held
    )


@pytest.mark.long
def test_an_installed_wheel_runs(checkout: Path, tmp_path: Path) -> None:
    """Built with the extension, installed elsewhere: the cpu kernels run without the checkout."""
    done = setup(checkout, "bdist_wheel", PPO_FAST_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(target),
            str(built(checkout, "*.whl")),
        ],
        check=True,
    )
    code = (
        "import ppo_fast, torch; x = torch.ones(2, 3);"
        "print(ppo_fast.__file__, ppo_fast.gae(x, x, backend='cpu').advantages.shape)"
    )
    env = os.environ | {"PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(target) in out.stdout and "[2, 3]" in out.stdout
