"""Sanitizer builds of this checkout, and the ops' tests or a fuzzer run in them.

`python tests/scripts/sanitizers.py address|thread [pytest arguments]`, or `fuzz MINUTES`; see
`make sanitize` and `make fuzz`. It wants clang, and g++ for `thread`. The copies are
build/sanitize/<name>. Python and torch are not compiled with the sanitizer, whose runtime is
preloaded; the first finding ends the run. All of it is run by path: a trainer may have installed a
package named tests, which `python -m tests...` would find instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("ppo_fast", "kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md")
# The op tests: what of them is Triton's or emulated CUDA's is skipped here.
TESTS = (
    "gae",
    "rlhf_advantages",
    "ppo_loss",
    "value_loss",
    "logprobs",
    "logits_ppo_loss",
    "whiten",
    "linear_logprobs",
    "linear_logprobs_at",
    "linear_token_stats",
    "linear_ppo_loss",
    "bf16_product",
    "support",
    "sparse_head",
    "divergence_kernel",
    "masking",
    "strides",
    "invariance",
    "loss_sequences",
    "advantage_invariance",
    "errors",
    "huge",
    "threads",
)
OPS = (
    "gae",
    "rlhf_advantages",
    "ppo_loss",
    "value_loss",
    "token_logprobs",
    "logits_ppo_loss",
    "linear_token_logprobs",
    "linear_logprobs_at",
    "linear_token_stats",
    "linear_ppo_loss",
    "whiten",
)


class Build(NamedTuple):
    """Compiler, its -fsanitize, the preloaded runtime, the run's environment."""

    compiler: str
    sanitize: str
    runtime: str
    environment: dict[str, str]


BUILDS = {
    # Leaks: CPython and torch keep what they allocate when they are imported.
    "address": Build(
        "clang++",
        "address,undefined",
        "libclang_rt.asan-x86_64.so",
        {
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    ),
    # Interceptors that torch and Python call say nothing about our code. The runtime is GCC's:
    # that of clang 14 ends every program that preloads it.
    "thread": Build(
        "g++",
        "thread",
        "libtsan.so",
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"},
    ),
    "fuzz": Build(
        "clang++",
        "address,fuzzer-no-link",
        "asan_with_fuzzer.so",
        {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=32"},
    ),
}


def copied(name: str) -> Path:
    """A copy of the checkout without what was built in it."""
    tree = ROOT / "build/sanitize" / name
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, tree / part)
    return tree


def compile_extension(tree: Path, build: Build) -> None:
    """`ppo_fast/_C*.so` in the copy."""
    env = {"PPO_FAST_BUILD": "cpu", "PPO_FAST_SANITIZE": build.sanitize}
    env |= {"CC": build.compiler, "CXX": build.compiler}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # ninja
    subprocess.run(command, cwd=tree, env={**os.environ, **env, "PATH": path}, check=True)


def preloaded(name: str, tree: Path) -> str:
    """The sanitizer's runtime, and for `thread` what starts the kernels' threads."""
    if name == "fuzz":
        import atheris

        return str(Path(atheris.path()) / BUILDS[name].runtime)
    command = [BUILDS[name].compiler, f"-print-file-name={BUILDS[name].runtime}"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return os.pathsep.join([runtime, *([_threads(tree)] if name == "thread" else [])])


def _threads(tree: Path) -> str:
    from torch.utils import cpp_extension

    out = tree / "libtsan_parallel.so"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cpu")]
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fsanitize=thread"]
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    source = str(tree / "tests/scripts/tsan_parallel.cpp")
    command = [BUILDS["thread"].compiler, *flags, target, *includes, source, "-o", str(out)]
    subprocess.run(command, check=True)
    return str(out)


def environment(name: str, tree: Path) -> dict[str, str]:
    """Of the run: the copy before anything installed, only the backends `cpu` and reference."""
    return {
        **os.environ,
        **BUILDS[name].environment,
        "LD_PRELOAD": preloaded(name, tree),
        "PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "PPO_FAST_CUDA_EMULATE": "0",
    }


def run_tests(name: str, arguments: list[str]) -> int:
    """The exit code of pytest over the op tests."""
    tree = copied(name)
    compile_extension(tree, BUILDS[name])
    files = [str(p) for stem in TESTS for p in (tree / "tests").rglob(f"test_{stem}.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    env = environment(name, tree)
    # A sanitizer's shadow does not fit at random addresses of 32 bits: nor does setarch's own.
    fixed = ["setarch", "-R", "env", f"LD_PRELOAD={env.pop('LD_PRELOAD')}"]
    command = [*fixed, *command, "-m", "not long", *files, *arguments]
    return subprocess.run(command, cwd=tree, env=env, check=False).returncode


def fuzz(minutes: float) -> int:
    """Every op's target in turn, an equal share of the minutes each; 1 if one found something."""
    tree = copied("fuzz")
    compile_extension(tree, BUILDS["fuzz"])
    seconds = max(1, int(60 * minutes / len(OPS)))
    found = 0
    for op in OPS:
        corpus = tree / "corpus" / op
        corpus.mkdir(parents=True)
        command = [
            sys.executable,
            "tests/fuzz",
            op,
            f"-max_total_time={seconds}",
            "-rss_limit_mb=4096",
            "-print_final_stats=1",
            f"-artifact_prefix=crash-{op}-",
            str(corpus),
        ]
        done = subprocess.run(command, cwd=tree, env=environment("fuzz", tree), check=False)
        found |= done.returncode != 0
    return int(found)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    sys.exit(fuzz(float(rest[0])) if what == "fuzz" else run_tests(what, rest))
