"""Builds the wheel: with the C++ extension where torch is installed, else pure Python.

PPO_FAST_BUILD=auto|none|cpu|cuda (auto): auto builds the extension if torch can be imported, with
the CUDA kernels if torch has CUDA and there is an nvcc for it; cpu and cuda insist; none never
builds it. An explicit request never degrades.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

os.chdir(Path(__file__).parent)
MODES = ("auto", "none", "cpu", "cuda")
# Named through the package's symlink: an sdist and a wheel then hold the sources too.
CSRC = Path("ppo_fast/csrc")


def chosen_mode() -> str:
    mode = os.environ.get("PPO_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"PPO_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"release (\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot be built here, and what mends it. Raises without torch."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

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
    """Keyword arguments of setup() for `ppo_fast._C`. Raises ImportError without torch."""
    import pybind11
    from torch.utils import cpp_extension

    build = runpy.run_path("ppo_fast/_cflags.py")
    sources, flags = build["cpu_sources"](CSRC), {"cxx": build["build_flags"]()}
    # Only the stable C symbols are used: no torch_python, so one build serves torch >= 2.10.
    libraries = ["c10", "torch_cpu", "torch"]
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
        # torch bundles an older pybind11, so ours comes first.
        include_dirs=[
            pybind11.get_include(),
            *cpp_extension.include_paths("cuda" if with_cuda else "cpu"),
        ],
        library_dirs=cpp_extension.library_paths("cuda" if with_cuda else "cpu"),
        libraries=libraries,
        extra_compile_args=flags,
        extra_link_args=build["link_flags"](),
        language="c++",
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


def build_arguments() -> dict:
    mode = chosen_mode()
    if mode == "none":
        return {}
    try:
        problem = "" if mode == "cpu" else cuda_problem()
        if problem and mode == "cuda":
            sys.exit(f"PPO_FAST_BUILD=cuda: {problem}")
        return extension(with_cuda=problem is None)
    except ImportError as error:
        if mode != "auto":
            sys.exit(
                f"PPO_FAST_BUILD={mode} needs torch and pybind11 in this environment ({error})"
            )
        print(
            f"ppo_fast: {error}; building without the C++ extension (pip install torch first, then"
            " pip install --no-build-isolation, to have it)"
        )
        return {}


setup(**build_arguments())
