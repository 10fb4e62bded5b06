"""Loader of the C++ extension `ppo_fast._C`, with the reason where it cannot be used.

Loading it adds the implementations of the `cpu` overloads that `_boundary` defines, and of the
`cuda` ones where it was built with them. `PPO_FAST_CUDA_EMULATE=1` adds those for CPU tensors:
every CUDA thread a fiber, which is for tests and slow.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import shlex
from pathlib import Path
from types import ModuleType

import torch

import ppo_fast._boundary.schema  # noqa: F401  (the library implements schemas that must exist first)
from ppo_fast import _cflags

_MEND = "PPO_FAST_BUILD={} pip install --force-reinstall --no-deps ."
_NOT_BUILT = Path(__file__).with_name("not_built.txt")  # written by setup.py
_CSRC = Path(__file__).parent / "csrc"
# "1", or the compute capability to emulate: "80" runs what older GPUs than sm_90 run.
EMULATED = os.environ.get("PPO_FAST_CUDA_EMULATE", "0") not in ("", "0")


@functools.cache
def load() -> str | None:
    """None if the extension is usable, else the reason it is not, with the command to run."""
    mend = _MEND.format("cpu")
    try:
        module().build_info()
    except ValueError as error:  # PPO_FAST_ISA
        return str(error)
    except ModuleNotFoundError as error:
        if error.name != "ppo_fast._C":
            return f"the C++ extension did not load ({error})"
        why = f": {_NOT_BUILT.read_text().strip()}" if _NOT_BUILT.exists() else ""
        return (
            f"the C++ extension was not built{why}; run `{mend}` in a checkout, where torch and a"
            " C++ compiler are, or set PPO_FAST_JIT=1 to compile it on first use"
        )
    except (ImportError, OSError) as error:
        return f"the C++ extension did not load ({error}); rebuild it with `{mend}`"
    except RuntimeError as error:
        return f"the C++ extension did not compile ({error}); it needs g++ or clang++, and ninja"
    return None


@functools.cache
def load_cuda() -> str | None:
    """None if the `cuda` overloads are usable here, else the reason, with the remedy."""
    if EMULATED:
        return _load_emulated()
    reason = load()
    if reason is not None:
        return reason
    if not module().build_info()["cuda"]:
        return (
            f"the C++ extension was built without CUDA; run `{_MEND.format('cuda')}` in a"
            " checkout, where nvcc and a GPU's torch are, or set PPO_FAST_CUDA_EMULATE=1 before"
            " Python starts to run the kernels on the CPU, slowly"
        )
    if not torch.cuda.is_available():
        return "there is no GPU; set PPO_FAST_CUDA_EMULATE=1 before Python starts to emulate one"
    return None


@functools.cache
def wrong_gpu(device: int | None = None) -> str | None:
    """Reason why the `cuda` overloads do not run on this GPU, with the remedy; None if they do.

    Not part of `load_cuda`: asking a GPU initialises CUDA, which importing must not.
    """
    major, minor = torch.cuda.get_device_capability(device)
    names = module().build_info()["cuda"]["architectures"]
    if any(10 * major + minor in _cflags.ARCHITECTURES[name] for name in names):
        return None
    ours = ", ".join(f"sm_{name}" for name in names)
    return (
        f"this build is for {ours}, the GPU is sm_{major}{minor};"
        f" run `{_MEND.format('cuda')}` on it, if it is of sm_8x, sm_90 or sm_10x"
    )


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


def _load_emulated() -> str | None:
    """Compile csrc/cuda for the CPU, once per state of the sources, and load it."""
    folder = _cache_folder()
    library = folder / "ppo_fast_emulated.so"
    try:
        _compile_emulated(folder)
        torch.ops.load_library(library)
    except (ImportError, OSError, RuntimeError) as error:
        return f"the emulated CUDA kernels did not compile ({error}); that needs g++ and ninja"
    return None


def _cache_folder() -> Path:
    """Folder of the emulated build of these sources, these flags and this torch."""
    digest = hashlib.sha256(f"{torch.__version__} {_cflags.EMULATE_FLAGS}".encode())
    for path in sorted(_CSRC.rglob("*.*")):
        digest.update(path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")
    return Path(root) / f"ppo_fast_emulated_{digest.hexdigest()[:16]}"


def _compile_emulated(folder: Path) -> None:
    """Unless another process has; a lock of the system's ends with the process that holds it."""
    if (folder / "complete").exists():
        return
    import fcntl

    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "complete").exists():
            return
        (folder / "lock").unlink(missing_ok=True)  # torch's own, of a build that was killed
        cpp_extension.load(
            name="ppo_fast_emulated",
            sources=_cflags.emulated_sources(_CSRC),
            extra_cflags=list(_cflags.EMULATE_FLAGS),
            build_directory=str(folder),
            with_cuda=False,
            is_python_module=False,
        )
        (folder / "complete").touch()
