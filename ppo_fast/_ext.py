"""Loading the C++ extension `ppo_fast._C`, or saying why it cannot be used.

Loading it adds the implementations of the `cpu` overloads that `_schema` defines.
"""

from __future__ import annotations

import functools
import importlib
import os
import shlex
from pathlib import Path
from types import ModuleType

import ppo_fast._schema  # noqa: F401  (the library implements schemas that must exist first)
from ppo_fast import _cflags

_MEND = "PPO_FAST_BUILD=cpu pip install --no-build-isolation --force-reinstall --no-deps ppo_fast"
_CSRC = Path(__file__).parent / "csrc"


@functools.cache
def load() -> str | None:
    """None if the extension is usable, else the reason it is not and the command that mends it."""
    try:
        module().build_info()
    except ValueError as error:  # PPO_FAST_ISA
        return str(error)
    except ModuleNotFoundError as error:
        if error.name != "ppo_fast._C":
            return f"the C++ extension did not load ({error})"
        return (
            f"the C++ extension is not built; run `{_MEND}` (in a checkout `pip install"
            " --no-build-isolation -e .`), or set PPO_FAST_JIT=1 to compile it on first use"
        )
    except (ImportError, OSError) as error:
        return f"the C++ extension did not load ({error}); rebuild it with `{_MEND}`"
    except RuntimeError as error:
        return f"the C++ extension did not compile ({error}); it needs g++ or clang++, and ninja"
    return None


@functools.cache
def module() -> ModuleType:
    """The extension module: `build_info()` and `set_isa(name)`. Raises what loading it raises."""
    try:
        return importlib.import_module("ppo_fast._C")
    except ModuleNotFoundError:
        if os.environ.get("PPO_FAST_JIT") != "1":
            raise
    return _compile()


def _compile() -> ModuleType:
    from torch.utils import cpp_extension

    return cpp_extension.load(
        name="ppo_fast_C",
        sources=_cflags.cpu_sources(_CSRC),
        extra_cflags=[shlex.quote(flag) for flag in _cflags.build_flags()],
        with_cuda=False,
    )
