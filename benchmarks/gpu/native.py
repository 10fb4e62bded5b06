"""Launches of csrc/cuda for an op's call on an H200: which kernels, of how many blocks.

The choice of a kernel is that of the ops' .cu files, said again here for what the goals call;
sizes come from the headers themselves, through `plans.cpp`.
"""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from torch.utils import cpp_extension

from benchmarks.gpu.trace import MULTIPROCESSORS, Native
from ppo_fast import _cflags

_HERE = Path(__file__).parent
_CSRC = _HERE.parents[1] / "csrc"
_SHARED = 227 * 1024  # of a block at most


class NativeLaunch(NamedTuple):
    """A launch: the source's stem, a pattern of the kernel's mangled name, and its geometry."""

    stem: str
    kernel: str
    pattern: str
    threads: int
    shared: int  # dynamic
    blocks: int | None  # None: as many as are resident
    rows: int = 0  # (row, warp) or (slice, warp) pairs: how often a warp begins one
    writes: bool = True  # the call's results


@functools.cache
def _program() -> Path:
    """plans.cpp, compiled as the emulation is."""
    target = Path(tempfile.mkdtemp()) / "plans"
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    emulation = sorted(str(path) for path in (_CSRC / "emulate").glob("*.cpp"))
    flags = [flag for flag in _cflags.EMULATE_FLAGS if flag not in ("-O1", "-O2")]
    command = ["g++", "-O0", *flags, *includes, str(_HERE / "plans.cpp"), *emulation]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"plans.cpp: {done.stderr[:2000]}")
    return target


@functools.cache
def plans(vocab: int, itemsize: int) -> dict[str, int]:
    """The sizes that the headers declare, for rows of `vocab` logits."""
    said = subprocess.run(
        [str(_program()), str(vocab), str(itemsize)], capture_output=True, text=True, check=True
    ).stdout
    return {name: int(value) for name, value in (line.split() for line in said.splitlines())}


def constant(source: str, name: str) -> int:
    """A number that a .cu file declares; those of headers are in `plans`."""
    found = re.search(rf"constexpr \w+ {name} = (\d+);", (_CSRC / "cuda" / source).read_text())
    if found is None:
        raise ValueError(f"native: {source} has no constant {name!r}")
    return int(found[1])


def _up(count: int, of: int) -> int:
    return -(-count // of)


def launches(call: Native) -> list[NativeLaunch]:
    """The launches of a call, in order."""
    main = max(call.shapes, key=lambda shape: (len(shape), shape))
    if call.op.startswith("logprobs_"):
        return _logprobs(call.op, *main[-2:], call.itemsize)
    if call.op.startswith("logits_ppo_loss"):
        return _logits_ppo_loss(call.op, *main[-2:], call.itemsize)
    if call.op == "ppo_loss":
        return _ppo_loss(main)
    if call.op in ("scaled", "scaled_"):
        return _scaled(main, call.itemsize)
    if call.op == "gae":
        return _gae(*main, call.time_major)
    raise NotImplementedError(f"native: the launches of {call.op} are not described")


def _logprobs(op: str, rows: int, vocab: int, itemsize: int) -> list[NativeLaunch]:
    """logprobs.cu: spread()."""
    p = plans(vocab, itemsize)
    warps, ring = p["ring_warps"], p["ring_bytes"]
    while ring > _SHARED:
        warps, ring = warps // 2, ring // 2
    blocks = (
        None if rows * p["slices"] > 8 * warps * MULTIPROCESSORS else rows * p["slices"] // warps
    )
    name = "forward" if op == "logprobs_fwd" else "gradient"
    main = NativeLaunch(
        "logprobs",
        f"logprobs_{name}_kernel",
        rf"logprobs_{name}_kernelI\w*{'f' if itemsize == 4 else 'bf16E'}Lb1E",
        warps * 32,
        ring,
        blocks,
        rows * p["slices"],
    )
    if op == "logprobs_fwd":
        return [main]
    terms = rf"logprobs_terms_kernelI\w*{'f' if itemsize == 4 else 'bf16'}E"
    return [
        NativeLaunch("logprobs", "logprobs_terms_kernel", terms, 128, 0, _up(rows, 128)),
        main,
    ]


def _logits_ppo_loss(op: str, rows: int, vocab: int, itemsize: int) -> list[NativeLaunch]:
    """logits_ppo_loss.cu: launch_cluster()."""
    p = plans(vocab, itemsize)
    if "cluster" not in p:
        raise NotImplementedError(f"native: {vocab} logits of {itemsize} bytes fit no cluster")
    types = (
        r"fN\w*4bf16E"
        if op.endswith("_bf16_")
        else ("ff" if itemsize == 4 else r"N\w*4bf16ES\d?_")
    )
    return [
        NativeLaunch(
            "logits_ppo_loss",
            "logits_ppo_cluster",
            rf"logits_ppo_clusterI{types}E",
            p["cluster_threads"],
            p["cluster_bytes"],
            min(rows * p["cluster"], MULTIPROCESSORS // p["cluster"] * p["cluster"]),
            rows * p["cluster"] * p["cluster_threads"] // 32,
        )
    ]


def _ppo_loss(shape: tuple[int, ...]) -> list[NativeLaunch]:
    """ppo_loss.cu: the usual options, and LossCall's blocks."""
    p = plans(151936, 2)
    blocks = min(_up(math.prod(shape), p["loss_tile"]), p["loss_blocks"])
    return [
        NativeLaunch(
            "ppo_loss",
            "ppo_loss_kernel",
            r"ppo_loss_kernelILNS_7VariantE0ELb1E",
            p["loss_threads"],
            p["loss_bytes"],
            blocks,
        )
    ]


def _scaled(shape: tuple[int, ...], itemsize: int) -> list[NativeLaunch]:
    """scale.cu: gradients in one piece."""
    p = plans(151936, itemsize)
    tiles = _up(math.prod(shape) * itemsize, p["scale_tile_bytes"])
    pattern = rf"scale_kernelI{'f' if itemsize == 4 else 'N.*bf16'}E"
    blocks = min(tiles, p["scale_blocks"])
    return [NativeLaunch("scale", "scale_kernel", pattern, p["scale_threads"], 0, blocks)]


def _gae(first: int, second: int, time_major: bool) -> list[NativeLaunch]:
    """plan.h: regime_of()'s rules without packing, and the blocks of each; dense fp32 steps."""
    p = plans(151936, 4)
    count, steps = (second, first) if time_major else (first, second)
    if time_major and (steps <= p["slab_steps"] * p["slabs"] or count >= 1024):
        lanes = 1
        while lanes < p["slabs"] and lanes * p["slab_steps"] < steps:
            lanes *= 2
        least = constant("advantage/gae.cu", "kLeastSlabThreads")
        rows = max(lanes, least // p["abreast"])
        blocks = _up(count, p["abreast"] * (rows // lanes))
        geometry = (rows * p["abreast"], p["slab_bytes"], blocks)
        pattern = rf"gae_slabs_kernelILb0ELNS0_5DenseE{p['dense_columns']}E"
        return [NativeLaunch("gae", "gae_slabs_kernel", pattern, *geometry)]
    if steps <= p["chunk_steps"]:
        raise NotImplementedError("native: gae of short rows is not described")
    pattern = rf"advantage_blocks_kernelI\w*GaeSourceILb0ELNS0_5DenseE{p['dense_rows']}E"
    whole = count >= MULTIPROCESSORS or steps <= 8 * p["chunk_steps"]
    blocks = count * (1 if whole else _up(steps, p["chunk_steps"]))
    geometry = (p["row_threads"], p["block_bytes"], blocks)
    return [
        NativeLaunch(
            "gae",
            "advantage_blocks_kernel",
            rf"{pattern}EELNS0_4PassE{each}E",
            *geometry,
            writes=each != p["pass_maps"],
        )
        for each in ([p["pass_whole"]] if whole else [p["pass_maps"], p["pass_apply"]])
    ]
