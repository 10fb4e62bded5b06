"""A trainer `toytrainer` made for the tests of patching, in versions that differ."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from known_sources import recorded

from ppo_fast.integrations._known import Known
from ppo_fast.integrations._patch import Integration, Swap

SOURCES = {
    "__init__": "",
    "core": """
import logging
import torch

logger = logging.getLogger(__name__)

def double(x, times=2):
    if times > 9:
        raise ValueError(f"{times} is too much")
    return x * times

def scale(x):
    return x.mul_(3)

TABLE = {"double": double}

class Trainer:
    rate = 2.0

    def total(self, x):
        if self.rate > 1:
            squares = []
            for item in x:
                square = item * item
                squares.append(square)
            total = sum(squares)
            mean = total / len(squares)
        with torch.no_grad():
            half = mean / self.rate
            del squares
        return total, half

def use(x):
    return double(x)

class Registry:
    table = {"twice": double}
""",
    "user": "from toytrainer.core import double\n\ndef use(x):\n    return double(x)\n",
    "needy": "import no_such_module\n",
    "late": "from toytrainer.core import double\n\ndef use(x):\n    return x + x\n",
}


@contextmanager
def installed(folder: Path, version: str = "1.2.0", *changes: tuple[str, str]) -> Iterator[Any]:
    """The package in this folder, its core with each text replaced; `late` is not imported yet."""
    sources = dict(SOURCES)
    for old, new in changes:
        assert old in sources["core"], old
        sources["core"] = sources["core"].replace(old, new)
    package, info = folder / "toytrainer", folder / f"toytrainer-{version}.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: toytrainer\nVersion: {version}\n"
    )
    for name, source in sources.items():
        (package / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield SimpleNamespace(
            core=importlib.import_module("toytrainer.core"),
            user=importlib.import_module("toytrainer.user"),
        )
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "toytrainer"]:
            del sys.modules[name]


def integration(*swaps: Swap | tuple[Swap, ...], known: Known, **changed: Any) -> Integration:
    fields: dict[str, Any] = {"name": "toy", "package": "toytrainer", "extra": "toy"}
    return Integration(**{**fields, **changed}, swaps=swaps, known=known)


def learnt(
    *swaps: Swap | tuple[Swap, ...], known: Known | None = None, tested: bool = True
) -> Known:
    """`known`, and what is installed now."""
    known = known or Known()
    return recorded(integration(*swaps, known=known), known, tested)
