"""Inner loops of the aarch64 build: vector multiply-adds, and no scalar arithmetic beside them.

Run by `make test-arm`, which builds the library that is read.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "build/arm/lib/ppo_fast"
VECTOR = re.compile(r"fmla\s+v\d+\.4s")
SCALAR = re.compile(r"f(n?madd|n?msub|mul|add|sub|div)\s+s\d")
BRANCH = re.compile(r"(?:b|b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+) <")
F = r"ppo::neon::F"
# Functions of a kernel's fp32 loops and their number: storage types, or variants of the loss.
KERNELS = {
    "log-probabilities": (rf"ppo::neon::segment_state<{F}, [\w:]+>", 3),
    "gradient of the logits": (rf"ppo::neon::segment_gradient<{F}, [\w:]+, [\w:]+>", 5),
    "policy loss": (rf"ppo::neon::policy_run<.*, {F}>", 7),
    "gae": (rf"ppo::neon::sweep_rows<ppo::neon::Chunk<{F}, 1>, ppo::neon::GaeJob<.*>", 1),
}
Instructions = list[tuple[int, str]]


@functools.cache
def listing() -> dict[str, Instructions]:
    """Instructions (address, text) of every function."""
    (path,) = LIBRARY.glob("_C*.so")
    command = ["aarch64-linux-gnu-objdump", "-d", "-C", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Instructions] = {}
    here: Instructions = []
    for line in text.splitlines():
        if name := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            here = found.setdefault(name[1], [])
        elif row := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            here.append((int(row[1], 16), row[2]))
    return found


def inner_loops(code: Instructions) -> list[list[str]]:
    """Bodies of the loops that hold no other loop, from a branch's target back to the branch."""
    start = code[0][0]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := BRANCH.match(text))]
    loops = {(to, at) for to, at in jumps if start <= to <= at}
    inner = [
        loop
        for loop in loops
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)
    ]
    return [[text for at, text in code if first <= at <= last] for first, last in inner]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_inner_loop_is_vector_code(kernel: str) -> None:
    pattern, expected = KERNELS[kernel]
    functions = {
        name: code for name, code in listing().items() if re.search(rf"{pattern}\(", name)
    }
    assert len(functions) == expected, list(functions)
    for name, code in functions.items():
        main = max(inner_loops(code), key=lambda body: sum(map(bool, map(VECTOR.match, body))))
        assert sum(map(bool, map(VECTOR.match, main))) >= 8, name
        assert not [text for text in main if SCALAR.match(text)], name


def test_the_scalar_build_has_no_such_loop() -> None:
    """The reader tells them apart: the scalar log-probabilities multiply and add one lane."""
    (name,) = (n for n in listing() if re.search(r"ppo::scalar::segment_state<float, float>\(", n))
    main = max(inner_loops(listing()[name]), key=len)
    assert any(SCALAR.match(text) for text in main)
    assert not any(VECTOR.match(text) for text in main)
