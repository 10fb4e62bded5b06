"""How the C++ extension is compiled: shared by setup.py and the just-in-time build. No imports
of torch or of ppo_fast, because setup.py runs this file by its path.
"""

from __future__ import annotations

from pathlib import Path

# Contraction stays off so that vectors, tails and scalars round alike; kernels call fma by name.
CFLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    # GCC 12 warns of its own intrinsics.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


def build_flags() -> list[str]:
    """The flags, and the flags as a string for `build_info()`."""
    return [*CFLAGS, f'-DPPO_FAST_FLAGS="{" ".join(CFLAGS)}"']


def cpu_sources(csrc: Path) -> list[str]:
    """Every C++ source under `csrc`, in a fixed order."""
    return [str(path) for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")])]
