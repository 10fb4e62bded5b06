"""Faults planted in the compiled kernels, and whether each is found: one JSON object.

    PYTHONPATH=.:tests/ptx python tests/ptx/planted.py gae_kernel ...

A fault changes an instruction that the kernel's call runs, every such instruction in turn. It is
found where the interpreter raises, or where a result is out of its budget.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import ptx_launch
import torch
from ptx_memory import GpuError
from ptx_parse import Program, instruction

from ppo_fast import testing
from ppo_fast.testing import Call

# Entry kernel -> op of the call that runs it, and the call's shape.
CALLS = {
    "gae_kernel": ("gae", (9, 300)),
    "rlhf_kernel": ("rlhf_advantages", (9, 150)),
    "value_kernel": ("value_loss", (9, 70)),
    "ppo_kernel": ("ppo_loss", (9, 70)),
    "moments_kernel": ("whiten", (9, 300)),
    "merge_moments_kernel": ("whiten", (9, 300)),
    "segments_kernel": ("token_logprobs", (3, 5)),
    "dlogits_kernel": ("token_logprobs", (3, 5)),
}
COUNTED = ("gae", "rlhf_advantages", "ppo_loss", "value_loss")  # files with an arrival counter
NOTHING = instruction("membar.gl")
_ORDERING = re.compile(r"\b(?:ld|st|atom|bra)\.|\bbra\b")  # what a barrier can stand between


class Fault(NamedTuple):
    """Instructions that a fault may change, by their text, and the change."""

    name: str
    where: str
    change: Callable[[str], str]


FAULTS = (
    Fault("no barrier", r"^bar\.sync", lambda text: NOTHING.text),
    Fault("no store", r"\bst\.global\.", lambda text: NOTHING.text),
    Fault(
        "one byte off",
        r"\b(?:ld|st)\.global\.(?!.*\.b8)",
        lambda text: re.sub(r"\+ (\d+) \]", lambda m: f"+ {int(m[1]) + 1} ]", text),
    ),
    Fault(
        "half a store",
        r"\bst\.global.*\.b(?:32|64)\b",
        lambda text: re.sub(r"\.b(32|64)\b", lambda m: f".b{int(m[1]) // 2}", text),
    ),
    Fault(
        "the last block is the one of the highest number",
        r"\batom\.",
        lambda text: re.sub(r"atom\S*\s+(%r\d+),.*", r"mov.u32 \1, %ctaid.x", text),
    ),
)


def sites(program: Program, fault: Fault) -> list[list[int]]:
    """Places of a fault: an instruction, or barriers with nothing between them to order."""
    found: list[list[int]] = []
    before = ""
    for k, i in enumerate(program.code):
        if re.search(fault.where, i.text):
            if i.name == before == "bar":
                found[-1].append(k)
            else:
                found.append([k])
        if i.name == "bar" or _ORDERING.search(i.text):
            before = i.name
    return found


def run(call: Call, kernel: str, change: Callable[[Program], None]) -> ptx_launch.Gpu:
    """Two calls with one counter, as on one stream, under a change of the kernel."""
    counter = torch.zeros(4, dtype=torch.int32)

    def of_kernel(name: str, program: Program) -> None:
        if name == kernel:
            change(program)

    with contextlib.ExitStack() as stack:
        gpu = stack.enter_context(ptx_launch.interpreted(1, of_kernel))
        for stem in COUNTED:
            module = importlib.import_module(f"ppo_fast.kernels.{stem}")
            stack.enter_context(mock.patch.object(module, "counter", lambda like: counter))
        for _ in range(2):
            with testing.poisoned_allocations():
                out = testing.run(call, "triton")
            testing.assert_agrees(call, "triton", out)
    return gpu


def verdict(call: Call, kernel: str, fault: Fault, site: list[int]) -> str:
    def change(program: Program) -> None:
        for k in site:
            program.code[k] = instruction(fault.change(program.code[k].text))

    try:
        run(call, kernel, change)
    except GpuError as error:
        return str(error)
    except AssertionError:
        return "wrong result"
    return "not found"


def plant(kernel: str, most: int) -> dict[str, dict[str, str]]:
    """Fault -> "instruction's number: text" -> verdict, at `most` places each, evenly spread."""
    op, shape = CALLS[kernel]
    call = testing.FACTORIES[op](shape)
    gpu = run(call, kernel, lambda program: None)
    (decoded,) = (found for (name, _), (found, _) in gpu.decoded.items() if name == kernel)
    found: dict[str, dict[str, str]] = {}
    for fault in FAULTS:
        places = [s for s in sites(decoded.program, fault) if any(decoded.reached[k] for k in s)]
        places = places[:: -(-len(places) // most)] if places else []
        found[fault.name] = {
            f"{site[0]}: {decoded.program.code[site[0]].text}": verdict(call, kernel, fault, site)
            for site in places
        }
    return found


def main(kernels: list[str], most: int = 1000) -> None:
    print(json.dumps({kernel: plant(kernel, most) for kernel in kernels or CALLS}))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    main([word for word in sys.argv[1:] if not word.isdigit()], *numbers)
