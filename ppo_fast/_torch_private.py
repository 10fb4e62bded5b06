"""Private names of torch that have no public counterpart, in this file alone.

`import ppo_fast` raises ImportError with the name of one that this torch has dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable[..., Any])


def require(module: Any, name: str) -> None:
    """Raise ImportError where a module of torch lacks a name that an op needs."""
    if not hasattr(module, name):
        raise ImportError(
            f"ppo_fast needs {module.__name__}.{name}, which torch {torch.__version__} does not"
            " have: install a version of torch that docs/compatibility.md names"
        )


# torch._dynamo is left out: the compiler, a second's import, is loaded by those who compile.
require(forward_ad, "_current_level")
require(torch._C._autograd, "_get_current_graph_task_keep_graph")


def in_forward_mode() -> bool:
    """True within a level of forward-mode differentiation, by a single comparison."""
    return forward_ad._current_level >= 0


def keeps_graph() -> bool:
    """True in a backward under `retain_graph`, after which the graph is used again."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def graph_break() -> None:
    """The end of a compiled graph; what follows is traced into the next one."""
    torch._dynamo.graph_break()


def constant_in_graphs(fn: F) -> F:
    """`torch.compiler.assume_constant_result`, which would load the compiler at once."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
