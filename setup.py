"""Builds the wheel: with the C++ CPU extension where torch is installed, else pure Python.

PPO_FAST_BUILD=auto|none|cpu|cuda (auto): auto builds the extension if torch can be imported;
cpu insists on it; none never builds it. An explicit request never degrades.
"""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup

os.chdir(Path(__file__).parent)
MODES = ("auto", "none", "cpu", "cuda")


def chosen_mode() -> str:
    mode = os.environ.get("PPO_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"PPO_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda":
        sys.exit(
            "PPO_FAST_BUILD=cuda: there are no CUDA C++ sources yet; GPUs run the Triton kernels,"
            " which need no build. Use PPO_FAST_BUILD=cpu (or auto) for the CPU extension."
        )
    return mode


def cpu_build() -> dict:
    """Keyword arguments of setup() for `ppo_fast._C`. Raises ImportError without torch."""
    import pybind11
    from torch.utils import cpp_extension

    build = runpy.run_path("ppo_fast/_cflags.py")
    extension = Extension(
        "ppo_fast._C",
        # Named through the package's symlink: an sdist and a wheel then hold them too.
        sources=build["cpu_sources"](Path("ppo_fast/csrc")),
        depends=[str(header) for header in sorted(Path("ppo_fast/csrc").rglob("*.h"))],
        # torch bundles an older pybind11, so ours comes first.
        include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        # Only the stable C symbols are used: no torch_python, so one build serves torch >= 2.10.
        libraries=["c10", "torch_cpu", "torch"],
        extra_compile_args=build["build_flags"](),
        language="c++",
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


def build_arguments() -> dict:
    mode = chosen_mode()
    if mode == "none":
        return {}
    try:
        return cpu_build()
    except ImportError as error:
        if mode == "cpu":
            sys.exit(f"PPO_FAST_BUILD=cpu needs torch and pybind11 in this environment ({error})")
        print(
            f"ppo_fast: {error}; building without the C++ extension (pip install torch first, then"
            " pip install --no-build-isolation, to have it)"
        )
        return {}


setup(**build_arguments())
