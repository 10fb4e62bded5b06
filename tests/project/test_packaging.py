"""Contents of a wheel and an sdist, built with torch at hand and without, and what is linked."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import ppo_fast
from ppo_fast import _ext, testing

ROOT = Path(__file__).resolve().parents[2]
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


SOURCES = expected((".py", ".h", ".cpp", ".cu", ".cuh", ".html", ".css", ".js", ".json")) | {
    "ppo_fast/py.typed"
}


def modules(tmp_path: Path, torch: str) -> Path:
    """A folder for PYTHONPATH, where `torch` is this source."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "torch.py").write_text(torch)
    return folder


# torch, the compiler, and the reason that setup.py gives for a build without the extension.
PROBLEMS = (
    (NO_TORCH, "c++", "torch could not be imported (No module named 'torch')"),
    ("__version__ = '2.9.1'", "c++", "torch 2.9.1 is older than 2.10"),
    (
        "__version__ = '2.10.0'",
        "no-such-compiler -O2",
        "there is no C++ compiler 'no-such-compiler'",
    ),
)


@pytest.mark.parametrize(("torch", "compiler", "reason"), PROBLEMS)
def test_a_wheel_without_the_extension_is_pure_and_says_why(
    checkout: Path, tmp_path: Path, torch: str, compiler: str, reason: str
) -> None:
    """The build's output has the reason; so has the wheel beside kernels, C++ and py.typed."""
    done = setup(checkout, "bdist_wheel", path=modules(tmp_path, torch), CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert f"building without the C++ extension: {reason}" in done.stdout
    wheel = built(checkout, "*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert archive.read("ppo_fast/not_built.txt").decode() == f"{reason}\n"
    assert held == SOURCES | {"ppo_fast/not_built.txt"}


def test_a_package_without_the_extension_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip shows no output of a build that succeeds: the reason is kept for `backends()`."""
    why = tmp_path / "not_built.txt"
    why.write_text("there is no C++ compiler 'c++'\n")
    monkeypatch.setattr(_ext, "_NOT_BUILT", why)

    def missing() -> None:
        raise ModuleNotFoundError(name="ppo_fast._C")

    monkeypatch.setattr(_ext, "module", missing)
    reason = _ext.load.__wrapped__()
    assert "the C++ extension was not built: there is no C++ compiler 'c++'; run `PPO" in reason


def test_an_isolated_build_sees_the_torch_that_is_installed(
    checkout: Path, tmp_path: Path
) -> None:
    """Isolated as by pip: packages on PYTHONPATH, and a sitecustomize that hides others."""
    import setuptools

    path = tmp_path / "isolated"
    path.mkdir()
    (path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    (path / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if '-packages' not in p]"
    )
    seen = setup(checkout, "--version", path=path, PPO_FAST_BUILD="cpu", PYTHONNOUSERSITE="1")
    assert seen.returncode == 0, seen.stderr
    assert seen.stdout.splitlines()[-1] == ppo_fast.__version__


def test_an_explicit_request_never_degrades(checkout: Path, tmp_path: Path) -> None:
    blocked = modules(tmp_path, NO_TORCH)
    for mode in ("cpu", "cuda"):
        done = setup(checkout, "bdist_wheel", path=blocked, PPO_FAST_BUILD=mode)
        assert done.returncode != 0
        assert f"PPO_FAST_BUILD={mode}: torch could not be imported" in done.stderr
    wrong = setup(checkout, "bdist_wheel", PPO_FAST_BUILD="gpu")
    assert (
        wrong.returncode != 0 and "must be one of auto, none, cpu, cuda, got 'gpu'" in wrong.stderr
    )


# A torch that says it is built for this CUDA, and where the toolkit is.
TORCH = """
import types
__version__ = "2.11.0"
version = types.SimpleNamespace(cuda={cuda!r})
"""


@pytest.mark.parametrize(
    ("cuda", "release", "message"),
    [
        (None, None, "torch 2.11.0 has no CUDA; install a build of torch that has"),
        ("13.0", None, "no nvcc was found; install the CUDA 13.0 toolkit, or set CUDA_HOME to it"),
        ("13.0", "12.8", "is CUDA 12.8, torch is built for 13.0; install the CUDA 13.0 toolkit"),
        ("12.4", "13.1", "is CUDA 13.1, torch is built for 12.4; install the CUDA 12.4 toolkit"),
        ("12.8", "12.6", "is CUDA 12.6, torch is built for 12.8; install the CUDA 12.8 toolkit"),
        ("12.8", "12.8", "is without libcudart; install the whole CUDA 12.8 toolkit"),
    ],
)
def test_cuda_asked_for_and_not_to_be_had(
    checkout: Path, tmp_path: Path, cuda: str | None, release: str | None, message: str
) -> None:
    """One line with the mend; a linker that finds nothing is `false`."""
    home, torch = tmp_path / "cuda", tmp_path / "modules/torch"
    (torch / "utils").mkdir(parents=True)
    (torch / "__init__.py").write_text(TORCH.format(cuda=cuda))
    (torch / "utils/__init__.py").touch()
    (torch / "utils/cpp_extension.py").write_text(
        f"CUDA_HOME = {str(home)!r}\nlibrary_paths = lambda device: [CUDA_HOME]\n"
    )
    if release is not None:
        (home / "bin").mkdir(parents=True)
        (home / "bin/nvcc").write_text(f"#!/bin/sh\necho 'tools, release {release}, V{release}'\n")
        (home / "bin/nvcc").chmod(0o755)
    done = setup(checkout, "build_ext", path=torch.parent, PPO_FAST_BUILD="cuda", CXX="false")
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("PPO_FAST_BUILD=cuda: ") and message in line


def test_the_sdist_follows_both_symlinks(checkout: Path) -> None:
    done = setup(checkout, "sdist", PPO_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    with tarfile.open(built(checkout, "*.tar.gz")) as archive:
        names = archive.getnames()
    held = {name.split("/", 1)[1] for name in names if "/" in name}
    folders = {str(parent) for name in SOURCES for parent in Path(name).parents} - {"."}
    metadata = {n for n in held if n.startswith("ppo_fast.egg-info")} | {"PKG-INFO", "setup.cfg"}
    root = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert held - folders - metadata == SOURCES | root


def install(archive: Path, target: Path) -> None:
    """By pip into a folder of its own, fetching nothing."""
    options = ("-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, str(archive)]
    env = os.environ | {"PPO_FAST_BUILD": "cpu"}
    subprocess.run(command, env=env, check=True)


# What a process that has imported torch holds already, or every Linux has. A runtime of OpenMP is
# not among it: threads are torch's own, by its stable ABI.
LINKED = r"lib(c10|torch|torch_cpu|c10_cuda|torch_cuda|cudart|stdc\+\+|m|gcc_s|c)\.so.*|ld-linux.*"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_the_extension_links_torch_and_the_c_library_alone() -> None:
    """One extension for every Python, so no libpython; a wheel carries no library."""
    spec = importlib.util.find_spec("ppo_fast._C")
    if spec is None:
        pytest.skip("the C++ extension is not built")
    path = str(spec.origin)
    command = ["readelf", "-d", "-W", path]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", shown)
    assert needed and [name for name in needed if not re.fullmatch(LINKED, name)] == []
    assert "RPATH" not in shown and "RUNPATH" not in shown
    stable = path.endswith(".abi3.so") or sysconfig.get_config_var("Py_GIL_DISABLED")
    assert stable, f"{path} is of a build before the stable ABI, and hides a newer one: delete it"


def test_the_changelog_begins_with_this_version() -> None:
    """And a release's tag, v and the version, is what wheels.yml runs for."""
    text = (ROOT / "CHANGELOG.md").read_text()
    (first, *_) = re.findall(r"(?m)^## \[(.+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", text)
    assert first[0] == ppo_fast.__version__


@pytest.mark.long
@pytest.mark.parametrize("kind", ["bdist_wheel", "sdist"])
def test_what_is_installed_runs(checkout: Path, tmp_path: Path, kind: str) -> None:
    """From a wheel and from an sdist, outside the checkout: every op agrees with the reference."""
    done = setup(checkout, kind, PPO_FAST_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert kind == "sdist" or "-cp310-abi3-" in built(checkout, "*.whl").name
    target = tmp_path / "site"
    install(built(checkout, "*.whl" if kind == "bdist_wheel" else "*.tar.gz"), target)
    env = os.environ | {"PYTHONPATH": str(target)}
    out = subprocess.run(
        [sys.executable, ROOT / "tests/scripts/smoke.py", "reference", "cpu"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert f"in {target}/ppo_fast" in out.stdout
    count = len(testing.FACTORIES | testing.HEADS | testing.DIVERGENCES)
    for name in ("reference", "cpu"):
        assert f"{count} ops agree with the reference on {name}" in out.stdout
