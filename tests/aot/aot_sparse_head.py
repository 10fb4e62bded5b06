"""Ahead-of-time table of kernels/sparse_head.py."""

from typing import Any

from aot_axes import Aot, given, pointers, row_strides

from ppo_fast.kernels import config
from ppo_fast.kernels.sparse_head import (
    STRIDES,
    SUM_LANES,
    pair_logits_kernel,
    pair_parts_kernel,
    pair_sums_kernel,
)

VECTORS = ("*bf16:16", "*fp16:16", "*fp32:16", "*bf16", "*fp32")
# The hidden states' gradient by ids; the weight's by rows of either type.
HIDDEN = {"index_ptr": "*i32", "mask_ptr": "*u8", "sums_ptr": None}
WEIGHT = {"index_ptr": "*i32", "mask_ptr": None, "sums_ptr": "*fp32:16"}
LONG = WEIGHT | {"index_ptr": "*i64"}
SIZES = {**dict.fromkeys(("n_pairs", "n_rows", "n_source"), "i64"), "width": "i32", "steps": "i32"}
TILES = tuple(
    {**tile.constants(), "SEGMENT": config.PAIR_SEGMENT}
    for tile in (config.PAIR_SUMS, config.NARROW_PAIR_SUMS)
)
SUMS = (
    given("*fp32", "grads")
    | given("*i64", "offsets")
    | pointers("*fp32", "parts")
    | dict.fromkeys(STRIDES, "i64")
    | row_strides("mask")
    | SIZES
    | {"tile": TILES, "ALIGN": (8, 4, 2, 1)}
)


def valid(case: dict[str, Any]) -> bool:
    """True if the launchers make this case: see `softmax.alignment`."""
    pointer = case.get("x_ptr", case.get("weight_ptr"))
    widest = (4 if "32" in pointer else 8) if pointer.endswith(":16") else 1
    return case["ALIGN"] <= widest


AOT = (
    Aot(
        pair_logits_kernel,
        {
            "vectors": tuple({"hidden_ptr": p, "weight_ptr": p} for p in VECTORS),
            **dict.fromkeys(("hidden_stride", "weight_stride"), "i64"),
            **row_strides("mask"),
            **SIZES,
            **given("*i32", "ids"),
            **given("*i64", "offsets"),
            **given("*u8", "mask"),
            **pointers("*fp32", "out"),
            "ALIGN": (8, 4, 2, 1),
            **config.PAIR_PRODUCTS.constants(),
        },
        valid,
    ),
    Aot(pair_parts_kernel, SUMS | {"x_ptr": VECTORS, "gradient": (HIDDEN, WEIGHT, LONG)}, valid),
    Aot(
        pair_sums_kernel,
        SUMS
        | {"vectors": tuple({"x_ptr": p, "out_ptr": p.split(":")[0] + ":16"} for p in VECTORS)}
        | {"gradient": (HIDDEN, WEIGHT, LONG), "SUM_LANES": SUM_LANES},
        valid,
    ),
)
