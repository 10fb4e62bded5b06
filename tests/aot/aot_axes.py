"""Vocabulary of the ahead-of-time tables: what a launcher can ask of an entry kernel.

`aot_<stem>.py` gives `AOT`, a tuple of `Aot(kernel, axes, valid)`, one per entry kernel of
`kernels/<stem>.py` (entry kernels end in `_kernel`; other jit functions are helpers). `axes` maps
each parameter to the alternatives that the launcher can produce, a tuple or a single bare value:

- a `tl.constexpr` parameter: its values (Python int, bool, float or str);
- any other one: a Triton type, "*bf16", "i32", "fp32"; ":16" appended where the launch has it
  divisible by 16 (pointers from the allocator, integers Triton specialises); None where the
  launcher passes None;
- "num_warps", "num_stages" and "maxnreg" where they are not the defaults (4, 3 and none); LAUNCH
  is implied;
- a made-up name whose alternatives are dicts: parameters that only vary together.

`valid(case)` drops combinations that no launch makes. Keep the axes few: every value and every
pair of values is compiled in `make test`, the whole product in `make test-long`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ppo_fast.kernels import config
from ppo_fast.kernels.common import MERGE_BLOCK
from ppo_fast.kernels.loss_tiles import TWO_RESIDENT
from ppo_fast.kernels.scan import tile_constants
from ppo_fast.kernels.softmax import STRIDES


class Aot(NamedTuple):
    """The specialisations of one kernel that its launcher can ask for."""

    kernel: Any
    axes: dict[str, Any]
    valid: Callable[[dict[str, Any]], bool] = lambda case: True


def pointers(kind: str, *names: str) -> dict[str, str]:
    """Types of tensors from the allocator, on 16 bytes."""
    return {f"{name}_ptr": f"{kind}:16" for name in names}


def given(kind: str, *names: str) -> dict[str, str]:
    """Types of tensors that do not specialise the kernel on their address."""
    return {f"{name}_ptr": kind for name in names}


def absent(*names: str) -> dict[str, None]:
    """Types of tensors that are None."""
    return dict.fromkeys(f"{name}_ptr" for name in names)


def row_strides(*names: str) -> dict[str, str]:
    """Types of the stride of tensors with an element a row."""
    return {f"{name}_stride": "i64" for name in names}


# The advantages: gae and rlhf_advantages.
def step_strides(*names: str) -> dict[str, str]:
    """Types of a tensor's strides between sequences and between steps."""
    return {f"{name}_{dim}": "i64" for name in names for dim in ("seq", "step")}


def layout_axes(offsets: str | None, wide: bool) -> dict[str, Any]:
    """A tile's constants, and the types of packed sequences' offsets."""
    fails = None if offsets is None else "*i32:16"
    return {"cu_ptr": offsets, "fails_ptr": fails} | tile_constants(wide)


def lambda_axes() -> tuple[dict[str, Any], ...]:
    """A number, a tensor per sequence or one per step for each of the two λ; the same, or two."""
    kinds = (None, False, True)  # per step, where a tensor
    return tuple(
        {
            "lam_ptr": None if one is None else "*fp32",
            "lam_ret_ptr": None if two is None else "*fp32",
            "LAM_STEPS": bool(one),
            "LAM_RET_STEPS": bool(two),
            "OWN_LAMBDA": apart,
        }
        for one in kinds
        for two in kinds
        for apart in (False, True)
        if apart or one is two
    )


ADVANTAGE_AXES = (
    pointers("*fp64", "parts", "moments")
    | pointers("*fp32", "adv", "ret")
    | {
        "counter_ptr": "*i32",
        "boot_seq": "i64",
        "n_seqs": "i64",
        "length": "i64",
        "UNIT": (True, False),
        "gamma": "fp32",
        "decay": "fp32",
        "MERGE": MERGE_BLOCK,
    }
)


# The losses of log-probabilities and values: ppo_loss and value_loss.
def token_strides(*names: str) -> dict[str, str]:
    """Types of a tensor's strides between rows and between columns."""
    return {f"{name}_{dim}": "i64" for name in names for dim in ("row", "col")}


LOSS_AXES = (
    pointers("*fp32", "loss", "scale")
    | pointers("*fp64", "stats", "parts")
    | pointers("*i32", "counts")
    | {"counter_ptr": "*i32", "reduction": "i32", "denom": "fp32"}
    | {f"n_{name}": "i64" for name in ("rows", "cols", "seqs")}
    | {f"n_{name}": "i32" for name in ("tiles", "counts", "pieces")}
    | {
        "tile": tuple(
            {"ROWS": t.rows, "COLS": t.cols, "num_warps": t.warps} | TWO_RESIDENT
            for t in map(config.token_tile, (16, 128, 512, 1024))
        )
    }
)


# Rows of logits: logprobs, logprobs_grad and logits_ppo_loss.
ROW_AXES = {
    "logits_ptr": ("*bf16:16", "*fp16:16", "*fp32:16", "*bf16"),
    "tokens_ptr": ("*i64:16", "*i32:16"),
    "mask_ptr": (None, "*u8:16"),
    "temperature_ptr": (None, "*fp32:16"),
    **dict.fromkeys([*STRIDES[:8], "ignore_index"], "i64"),
    **dict.fromkeys(["inner", "V", "n_rows", "n_segments"], "i32"),
    "inv_temperature": "fp32",
}


# Logits and gradient: of one type, or fp32 and half as wide in its place.
GRADIENT_POINTERS = (
    *({"logits_ptr": kind, "out_ptr": kind} for kind in ROW_AXES["logits_ptr"]),
    {"logits_ptr": "*fp32:16", "out_ptr": "*bf16:16"},
)


def tiling_axis(*tilings: config.RowTiling) -> tuple[dict[str, int], ...]:
    """The constants that a row tiling sets."""
    return tuple(tiling.constants() for tiling in tilings)


def valid_alignment(case: dict[str, Any]) -> bool:
    """True if the launchers make this case: see `softmax.alignment`; one column is narrow."""
    pointer = case["logits_ptr"]
    widest = (4 if "32" in pointer else 8) if pointer.endswith(":16") else 1
    narrow = config.NARROW.warps == case["num_warps"]
    return case["ALIGN"] <= widest and (case["V"] != 1 or narrow)
