"""Cross build for aarch64 and its tests under emulation: `make test-arm`.

`python tests/arm [step ...]`, the steps in order: sysroot, build, code, smoke, ops, count. A
Debian arm64 Python and torch's aarch64 wheel are unpacked into build/arm/sysroot, without root;
setup.py runs in that Python under qemu and calls the cross compiler, which runs as it is. `code`
reads the machine code; `smoke` runs tests/scripts/smoke.py and `ops` the tests of `TESTS` on the
`cpu` backend that are not long, both on a CPU with SVE and on one without; `count` counts
instructions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
ARM = ROOT / "build/arm"
SYSROOT, LIBRARY = ARM / "sysroot", ARM / "lib"
TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "gcc": "gcc",
    "ninja": "ninja-build",
}
DEBIAN = ("python3.11", "libpython3.11-dev", "libgomp1", "libstdc++6")
# The oldest torch that is supported: its aarch64 wheel comes without CUDA, as 2.13's does not.
WHEELS = (
    *("torch==2.10.0", "numpy", "typing_extensions", "sympy", "mpmath", "filelock", "jinja2"),
    *(
        "markupsafe",
        "networkx",
        "fsspec",
        "pytest",
        "iniconfig",
        "packaging",
        "pluggy",
        "pygments",
    ),
    *("hypothesis", "sortedcontainers", "attrs", "setuptools<82", "wheel"),
)
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64")
CPUS = ("max", "neoverse-n1")  # with SVE and without; torch itself needs Armv8.2
ISAS = ("neon", "scalar")
TESTS = [
    *(f"tests/ops/test_{op}.py" for op in ("logprobs", "ppo_loss", "value_loss", "gae", "whiten")),
    *(f"tests/ops/test_{op}.py" for op in ("logits_ppo_loss", "rlhf_advantages")),
    *("tests/ops/test_few_rows_linear.py", "tests/ops/test_rollout_weights.py"),
    *("tests/contract/test_masking.py", "tests/contract/test_invariance.py"),
]
LEAST = 2.5  # times fewer instructions than the scalar kernels


def run(*command: object, **environment: str) -> None:
    subprocess.run(
        [str(part) for part in command], check=True, cwd=ROOT, env=os.environ | environment
    )


def python(*args: object, cpu: str = "max", plugin: Path | None = None) -> list[object]:
    """Command of the arm64 Python under emulation."""
    counted = ["-plugin", plugin] if plugin else []
    interpreter = SYSROOT / "usr/bin/python3.11"
    return ["qemu-aarch64", "-L", SYSROOT, "-cpu", cpu, *counted, interpreter, "-P", *args]


def environment(isa: str = "auto") -> dict[str, str]:
    """Variables of the arm64 Python: the cross-built package first."""
    paths = (LIBRARY, SYSROOT / "site", ROOT)
    return {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PPO_FAST_ISA": isa,
        "PPO_FAST_CUDA_EMULATE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def sysroot() -> None:
    """Debian's and PyPI's packages for arm64, unpacked once."""
    done = SYSROOT / "complete"
    if done.exists():
        return
    apt = ARM / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    run("apt-get", *options, "-q", "update")
    run("apt-get", *options, "-qy", "--download-only", "install", *DEBIAN)
    for package in sorted((apt / "archives").glob("*.deb")):
        run("dpkg-deb", "-x", package, SYSROOT)
    only = ["--only-binary=:all:", *(f"--platform={name}" for name in PLATFORMS)]
    where = ["--python-version=3.11", "--implementation=cp", "--target", SYSROOT / "site"]
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", *only, *where, *WHEELS)
    done.touch()


def build() -> None:
    """`setup.py build` in the arm64 Python, with the cross compiler."""
    shutil.rmtree(LIBRARY, ignore_errors=True)
    include = SYSROOT / "usr/include"
    flags = f"-I{include}/python3.11 -idirafter {include}"
    compilers = {"CC": "aarch64-linux-gnu-gcc", "CXX": "aarch64-linux-gnu-g++", "CFLAGS": flags}
    folders = ("--build-base", ARM / "setup", "--build-lib", LIBRARY)
    variables = environment() | compilers | {"PPO_FAST_BUILD": "cpu"}
    run(*python("setup.py", "-q", "build", *folders), **variables)


def code() -> None:
    """The inner loops in machine code."""
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "machine_code.py")


def smoke() -> None:
    """Every op on every CPU and instruction set."""
    for cpu in CPUS:
        for isa in ISAS:
            print(f"smoke.py, -cpu {cpu}, PPO_FAST_ISA={isa}", flush=True)
            run(*python("tests/scripts/smoke.py", "cpu", cpu=cpu), **environment(isa))


def ops() -> None:
    """Tests of the ops; those that take an instruction set themselves run on both each time."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not long", "-k", "cpu or neon or scalar"]
    for cpu, isa in (("max", "neon"), ("neoverse-n1", "neon"), ("neoverse-n1", "scalar")):
        print(f"tests, -cpu {cpu}, PPO_FAST_ISA={isa}", flush=True)
        run(*python("-m", "pytest", *options, *TESTS, cpu=cpu), **environment(isa))


def count() -> None:
    """Instructions of a call: the difference between 2N calls and N, whatever N is."""
    plugin = ARM / "instructions.so"
    run("gcc", "-O2", "-shared", "-fPIC", "-o", plugin, HERE / "instructions.c")
    command = [str(part) for part in python(HERE / "calls.py", plugin=plugin)]
    told = subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env=os.environ | environment(),
        stderr=subprocess.PIPE,
        text=True,
    ).stderr
    counts = {
        (op, isa): (int(c) - 2 * int(b) + int(a)) / int(n)
        for op, isa, n, a, b, c in re.findall(
            r"(\w+) (\w+) (\d+)\ninstructions (\d+)\ninstructions (\d+)\ninstructions (\d+)", told
        )
    }
    print("| op | scalar | neon | times fewer |\n|---|---|---|---|")
    few = []
    for op in dict.fromkeys(op for op, _ in counts):
        scalar, neon = counts[op, "scalar"], counts[op, "neon"]
        print(f"| `{op}` | {scalar:,.0f} | {neon:,.0f} | {scalar / neon:.2f} |")
        few += [op] if scalar < LEAST * neon else []
    if few or len(counts) != 8:
        raise SystemExit(f"count: fewer than {LEAST} times in {few}, of {len(counts)} counts")


STEPS = {step.__name__: step for step in (sysroot, build, code, smoke, ops, count)}


def main(names: list[str]) -> None:
    """Run the steps, all of them if none is named."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise SystemExit(f"test-arm: steps are {', '.join(STEPS)}, got {', '.join(unknown)}")
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"test-arm: apt-get install {' '.join(missing)}")
    for name in names or STEPS:
        STEPS[name]()
    print(f"test-arm: {', '.join(names or STEPS)} passed")


if __name__ == "__main__":
    main(sys.argv[1:])
