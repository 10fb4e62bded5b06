"""Mutation check: plants the mistakes of mutant_list.py one at a time and runs their tests.

    python tests/mutants [GROUP ...] [words of a mutant's name]

Groups: triton, cpu, cuda, python, divergence, head, loop, inputs, models, numbers,
report, runs, stats, support, surrogates, trainers, truncation, weights.

Works on a copy of the checkout. A mutant is killed by a test that fails with it and passes without
it, not by a build that breaks. Exits with 1 unless all are killed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutant import Mutant, files_of_tests, mutated
from mutant_list import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
CACHES = ("__pycache__", "*_cache", ".hypothesis", "sysroot")
LEFT_BEHIND = (".git", ".venv", "results", "shared", *CACHES)
TESTS_FAILED = 1  # pytest's exit status


class Copy:
    """A copy of the checkout that tests run in."""

    def __init__(self, root: Path) -> None:
        self.root = root / "checkout"
        ignore = shutil.ignore_patterns(*LEFT_BEHIND)
        shutil.copytree(ROOT, self.root, symlinks=True, ignore=ignore)
        extensions = str(root / "emulated")
        self.env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(self.root),
            "TORCH_EXTENSIONS_DIR": extensions,
        }

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A Python command in the copy."""
        return subprocess.run(
            [sys.executable, *args],
            cwd=self.root,
            env=self.env | env,
            capture_output=True,
            text=True,
            check=False,
        )

    def build(self) -> None:
        """Compile the CPU extension; raises RuntimeError with the compiler's last words."""
        done = self.run("setup.py", "build_ext", "--inplace", "--force", PPO_FAST_BUILD="cpu")
        if done.returncode:
            raise RuntimeError(f"the extension does not build: {done.stderr[-2000:]}")

    def test(self, *args: str) -> subprocess.CompletedProcess[str]:
        """The tests named, up to the first that fails."""
        return self.run(
            "-m",
            "pytest",
            "-x",
            "-q",
            "-n",
            "0",
            "-m",
            "not long",
            "-p",
            "no:cacheprovider",
            *args,
        )

    def failing(self, mutant: Mutant, compiled: bool) -> str | None:
        """The first test that fails with the mistake planted; None if none does."""
        path = self.root / mutant.path
        text = path.read_text()
        built = {x: x.read_bytes() for x in self.root.glob("ppo_fast/_C*.so")} if compiled else {}
        path.write_text(mutated(text, mutant))
        try:
            if compiled:
                self.build()
            files = map(str, files_of_tests(self.root, mutant))
            done = self.test(*(["-k", mutant.select] if mutant.select else []), *files)
        finally:
            path.write_text(text)
            for library, content in built.items():
                library.write_bytes(content)
        if done.returncode not in (0, TESTS_FAILED):
            raise RuntimeError(f"pytest stopped: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
        return first[1] if first else None

    def outcome(self, mutant: Mutant, compiled: bool) -> str:
        """Verdict of the tests: "killed by ...", or the reason why not."""
        try:
            name = self.failing(mutant, compiled)
        except RuntimeError as error:
            return f"NOT TRIED: {error}"
        if name is None:
            return "SURVIVED"
        if self.test(name).returncode:
            return f"NOT TRIED: {name} fails without it"
        return f"killed by {name}"


def main(words: list[str]) -> int:
    """Try the mutants of the groups named, or those with one of the words in their name."""
    chosen = [
        (group, mutant)
        for group, mutants in MUTANTS.items()
        for mutant in mutants
        if not words or group in words or any(word in mutant.name for word in words)
    ]
    for _, mutant in chosen:
        mutated((ROOT / mutant.path).read_text(), mutant)
    killed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        if any(group == "cpu" for group, _ in chosen):
            copy.build()
        for group, mutant in chosen:
            start = time.monotonic()
            said = copy.outcome(mutant, group == "cpu")
            killed += said.startswith("killed")
            seconds = time.monotonic() - start
            print(f"{group:6} {mutant.name:45} {seconds:4.0f} s  {said}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
