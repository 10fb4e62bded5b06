"""Builds the wheel: with the C++ extension where torch and a compiler are, else pure Python.

PPO_FAST_BUILD=auto|none|cpu|cuda (auto): auto builds the extension if it can, with the CUDA
kernels if torch has CUDA and there is an nvcc for it; cpu and cuda insist; none never builds it.
An explicit request never degrades. A wheel without the extension holds the reason, in
ppo_fast/not_built.txt, because pip shows no output of a build that succeeds.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

os.chdir(Path(__file__).parent)
MODES = ("auto", "none", "cpu", "cuda")
OLDEST_TORCH = (2, 10)
MEND = (
    "; torch and a C++ compiler must be there first, and other installers than pip see a torch"
    " that is installed with --no-build-isolation alone"
)
# Named through the package's symlink: an sdist and a wheel then hold the sources too.
CSRC = Path("ppo_fast/csrc")


def chosen_mode() -> str:
    mode = os.environ.get("PPO_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"PPO_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def see_installed_torch() -> None:
    """Let an isolated build import the torch of the interpreter that pip installs for.

    pip hides its packages by these two variables; after ours on the path, they replace none.
    """
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hiding}
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    sys.path += [path for path in shown.splitlines() if path not in sys.path]


def cpu_problem() -> str | None:
    """Why the extension cannot be built here."""
    try:
        import torch
    except ImportError as error:
        return f"torch could not be imported ({error})"
    found = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
    if found < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]  # as torch's build has it
    return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def links_cudart(folders: list[str]) -> bool:
    """True where the C++ compiler finds CUDA's runtime, which some packages of nvcc leave out."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-shared", "-o", f"{folder}/out", *(f"-L{path}" for path in folders)]
        command = [*shlex.split(os.environ.get("CXX", "c++")), *options, "-x", "c", os.devnull]
        done = subprocess.run([*command, "-x", "none", "-lcudart"], capture_output=True)
    return done.returncode == 0


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot be built here, and what mends it. Raises without torch."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, library_paths

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a build of torch that has"
    wanted = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    name = ".".join(map(str, wanted))
    nvcc = Path(CUDA_HOME or "") / "bin/nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return f"no nvcc was found; install the CUDA {name} toolkit, or set CUDA_HOME to it"
    found = nvcc_version(nvcc)
    if found < wanted or found[0] != wanted[0]:
        return (
            f"{nvcc} is CUDA {found[0]}.{found[1]}, torch is built for {name}; install the CUDA"
            f" {name} toolkit, or set CUDA_HOME to it"
        )
    if not links_cudart(library_paths("cuda")):
        return f"{nvcc} is without libcudart; install the whole CUDA {name} toolkit"
    return None


def architectures(known: dict[str, range]) -> list[str]:
    """The one that this machine's GPU runs; all of them where there is none to be seen."""
    import torch

    if not torch.cuda.is_available():
        return list(known)
    major, minor = torch.cuda.get_device_capability()
    mine = [name for name, runs in known.items() if 10 * major + minor in runs]
    if not mine:
        sys.exit(
            f"PPO_FAST_BUILD: the GPU is sm_{major}{minor}, and there are kernels for"
            f" {', '.join(f'sm_{name}' for name in known)}; PPO_FAST_BUILD=cpu builds without them"
        )
    return mine


def extension(with_cuda: bool) -> dict:
    """Keyword arguments of setup() for `ppo_fast._C`."""
    from torch.utils import cpp_extension

    build = runpy.run_path("ppo_fast/_cflags.py")
    sources, flags = build["cpu_sources"](CSRC), {"cxx": build["build_flags"]()}
    # Stable symbols alone: one build serves torch >= 2.10 and, if it has a GIL, Python >= 3.10.
    libraries = ["c10", "torch_cpu", "torch"]
    stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
    if with_cuda:
        names = architectures(build["ARCHITECTURES"])
        sources += build["cuda_sources"](CSRC)
        flags["cxx"].append(f'-DPPO_FAST_CUDA="{" ".join(names)}"')
        flags["nvcc"] = [*build["NVCC_FLAGS"], *map(build["gencode"], names)]
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    module = Extension(
        "ppo_fast._C",
        sources=sources,
        depends=[str(header) for e in ("*.h", "*.cuh") for header in sorted(CSRC.rglob(e))],
        include_dirs=cpp_extension.include_paths("cuda" if with_cuda else "cpu"),
        library_dirs=cpp_extension.library_paths("cuda" if with_cuda else "cpu"),
        libraries=libraries,
        extra_compile_args=flags,
        extra_link_args=build["link_flags"](),
        language="c++",
        py_limited_api=stable,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
    }


def pure(reason: str) -> dict:
    """Keyword arguments of setup() for a package without the extension, which says why."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                Path(self.build_lib, "ppo_fast/not_built.txt").write_text(f"{reason}\n")

    print(f"ppo_fast: building without the C++ extension: {reason}{MEND}")
    return {"cmdclass": {"build_py": BuildPy}}


def build_arguments() -> dict:
    mode = chosen_mode()
    if mode == "none":
        return pure("PPO_FAST_BUILD=none")
    if importlib.util.find_spec("torch") is None:
        see_installed_torch()
    problem = cpu_problem()
    if problem and mode == "auto":
        return pure(problem)
    if problem:
        sys.exit(f"PPO_FAST_BUILD={mode}: {problem}{MEND}")
    without_cuda = None if mode == "cpu" else cuda_problem()
    if without_cuda and mode == "cuda":
        sys.exit(f"PPO_FAST_BUILD=cuda: {without_cuda}")
    return extension(with_cuda=mode != "cpu" and without_cuda is None)


setup(**build_arguments())
