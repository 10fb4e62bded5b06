"""Compiler flags of the C++ and CUDA sources, for setup.py, the just-in-time builds and the tests.

No imports of torch or of ppo_fast, because setup.py runs this file by its path.
"""

from __future__ import annotations

import os
from pathlib import Path

_SHARED = ("-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# Contraction stays off so that vectors, tails and scalars round alike; kernels call fma by name.
CFLAGS = (
    *_SHARED,
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # GCC 12 warns of its own intrinsics; clang does not know that warning.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
)
# Added by PPO_FAST_SANITIZE=address,undefined (what the compiler's -fsanitize takes): a build for
# `make sanitize` and `make fuzz` that stops at the first finding and names its line.
_SANITIZE = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
# csrc/cuda as C++ over csrc/emulate. _longjmp between stacks is what fortified libcs forbid.
EMULATE_FLAGS = (
    *_SHARED,
    "-O1",
    "-g0",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-DPPO_EMULATE",
    "-x",
    "c++",
)
# No contraction here either. USE_CUDA declares the stable ABI's current stream.
NVCC_FLAGS = (
    *_SHARED,
    "-O3",
    "-fmad=false",
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
)
# What a build without a GPU in the machine is made for, oldest first: name -> the compute
# capabilities (major * 10 + minor) that run it. sm_90a runs on 9.0 alone.
ARCHITECTURES = {"80": range(80, 90), "90a": range(90, 91), "100": range(100, 110)}


def build_flags() -> list[str]:
    """The flags, and the flags as a string for `build_info()`."""
    flags = [*CFLAGS, *(_SANITIZE if os.environ.get("PPO_FAST_SANITIZE") else ()), *link_flags()]
    return [*flags, f'-DPPO_FAST_FLAGS="{" ".join(flags)}"']


def link_flags() -> list[str]:
    """Further linker flags of a build with sanitizers."""
    asked = os.environ.get("PPO_FAST_SANITIZE")
    return [f"-fsanitize={asked}"] if asked else []


def gencode(architecture: str) -> str:
    """The nvcc flag for machine code of one architecture; the `-arch` shorthand drops the `a`."""
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def cpu_sources(csrc: Path) -> list[str]:
    """The C++ sources under `csrc` without CUDA, in a fixed order."""
    return [str(path) for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/*/*.cpp")])]


def cuda_sources(csrc: Path) -> list[str]:
    """The CUDA sources."""
    return [str(path) for path in sorted(csrc.glob("cuda/*/*.cu"))]


def emulated_sources(csrc: Path) -> list[str]:
    """The CUDA sources and the device they are emulated on."""
    return [*cuda_sources(csrc), *(str(path) for path in sorted(csrc.glob("emulate/*.cpp")))]
