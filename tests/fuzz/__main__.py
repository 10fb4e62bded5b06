"""A libFuzzer target for each op on the `cpu` backend: `python tests/fuzz gae [-flags]`.

Run by `make fuzz`, in a copy built with clang, AddressSanitizer and libFuzzer's counters, so that
it is the branches of the kernels that guide it. No call may crash, read or write outside its
tensors, or raise anything but ValueError and TypeError; what a tame call gives is within the
reference's budget. libFuzzer writes what fails to `crash-*`; give that file as the only argument
to see it again.
"""

from __future__ import annotations

import sys

import atheris
import torch
from calls import CALLS
from draw import Draw

import ppo_fast
from ppo_fast import _ext, testing

ISAS = ("auto", "scalar", "avx2")


def once(op: str, data: bytes) -> None:
    """One call from these bytes."""
    d = Draw(atheris.FuzzedDataProvider(data))
    _ext.module().set_isa(d.one_of(ISAS))
    call = CALLS[op](d)
    try:
        actual = testing.run(call, "cpu")
    except (ValueError, TypeError):
        if d.tame:
            raise
        return
    if d.tame:
        testing.assert_agrees(call, "cpu", actual)


def main() -> None:
    """The target named by the first argument; the rest is libFuzzer's."""
    op = sys.argv.pop(1)
    assert ppo_fast.backends()["cpu"] is None, ppo_fast.backends()["cpu"]
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, lambda data: once(op, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
