"""Ahead-of-time table of kernels/gae_scan.py."""

from aot_axes import Aot

from ppo_fast.kernels import config
from ppo_fast.kernels.gae_scan import offsets_kernel

AOT = (
    Aot(
        offsets_kernel,
        {
            "cu_ptr": ("*i32:16", "*i64:16"),
            "fails_ptr": "*i32:16",
            "n_seqs": "i64",
            "length": "i64",
            "BLOCK": config.TOKENS.block,
            "num_warps": config.TOKENS.warps,
        },
    ),
)
