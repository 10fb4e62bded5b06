"""Matrix of installations: `python tests/scripts/wheels.py DIST PYTHON ...`.

DIST holds one wheel with the extension and one sdist (`make wheels`). Each PYTHON is a command of
an interpreter that imports torch, as "python3.13" or "chroot /srv/debian python3". Wheel and sdist
are installed for it into empty environments, which see its torch, and smoke.py runs there:

    wheel                    no compiler on the PATH; reference and cpu agree
    sdist                    under build isolation; reference and cpu agree
    sdist, no compiler       reference agrees, and the reason for the lack of cpu is given
    sdist, no torch          the same; torch is added after the installation
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SMOKE = Path(__file__).with_name("smoke.py").resolve()
# Not the standard library, which pip would hide from an isolated build with what a .pth names.
PATHS = """
import sys
for path in sys.path[1:]:
    if "-packages" in path or not path.startswith(sys.base_prefix):
        print(path)
"""
REASON = "import ppo_fast; print(ppo_fast.backends()['cpu'])"


class Environment:
    """An empty environment of an interpreter, in a folder of its own."""

    def __init__(self, command: str, folder: Path) -> None:
        *self.prefix, self.outer = shlex.split(command)
        self.folder, self.python = folder, str(folder / "bin/python")
        self.run(self.outer, "-m", "venv", str(folder))

    def run(self, python: str, *args: str, compiler: bool = True, build: str = "auto") -> str:
        """The output of a command; without a compiler the PATH is the environment's own folder."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PPO_FAST"))}
        env |= {"PPO_FAST_BUILD": build}
        bare = [] if compiler else ["env", f"PATH={self.folder / 'bin'}", "CXX=c++"]
        command = [*self.prefix, *bare, python, *args]
        where = self.folder.parent  # not a checkout, which `python -c` would import
        done = subprocess.run(
            command, env=env, cwd=where, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def see_torch(self) -> None:
        """The outer interpreter's packages, after the environment's own."""
        (site,) = self.folder.glob("lib/python*/site-packages")
        (site / "outer.pth").write_text(self.run(self.outer, "-c", PATHS))

    def install(self, archive: Path, compiler: bool, build: str) -> None:
        """By pip, which fetches setuptools and ninja to build an sdist."""
        pip = ("-m", "pip", "install", "-q", "--no-deps", "--no-cache-dir", str(archive))
        self.run(self.python, *pip, compiler=compiler, build=build)

    def smoke(self, *backends: str) -> str:
        """Output of smoke.py, run on the package of this environment."""
        out = self.run(self.python, str(SMOKE), *backends, compiler=False)
        if f"in {self.folder}/lib" not in out:
            raise SystemExit(f"another ppo_fast was tested: {out}")
        return out.replace("\n", "; ")


def check(command: str, archive: Path, *, torch: bool = True, compiler: bool = True) -> str:
    """One line on what is installed from an archive. Raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        made = Environment(command, Path(folder).resolve() / "env")
        if torch:
            made.see_torch()
        # Without CUDA, which a torch with CUDA and an nvcc would take minutes more for.
        made.install(archive, compiler, "cpu" if torch and compiler else "auto")
        made.see_torch()
        built = archive.suffix == ".whl" or (torch and compiler)
        said = made.smoke(*(("reference", "cpu") if built else ("reference",)))
        if built:
            return said
        reason = made.run(made.python, "-c", REASON, compiler=False).strip()
        missing = "there is no C++ compiler" if torch else "torch could not be imported"
        if missing not in reason:
            raise SystemExit(f"{archive.name} does not say that {missing}: {reason}")
        return f"{said}cpu: {reason}"


def main(dist: Path, commands: list[str]) -> None:
    """Every case for every interpreter, a line each."""
    (wheel,), (sdist,) = dist.glob("*abi3*.whl"), dist.glob("*.tar.gz")
    for command in commands:
        print("wheel:", check(command, wheel, compiler=False), flush=True)
        print("sdist:", check(command, sdist), flush=True)
        print("sdist, no compiler:", check(command, sdist, compiler=False), flush=True)
        print("sdist, no torch:", check(command, sdist, torch=False), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
