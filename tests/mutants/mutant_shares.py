"""Seeded mistakes of a head's scale and padding, and of a vocabulary's shares over ranks."""

from __future__ import annotations

from mutant import Mutant

SHARES = (
    Mutant(
        "a cap's slope without the scale",
        "ppo_fast/ops/head.py",
        "return slope if scale == 1.0 else slope.mul_(scale)",
        "return slope",
        "head_form",
        "within_budget and cpu",
    ),
    Mutant(
        "a scale that multiplies the temperature",
        "ppo_fast/ops/head_inputs.py",
        "None if tensor is None else tensor / scale, 1.0",
        "None if tensor is None else tensor * scale, 1.0",
        "head_form",
        "the_formula and cpu",
    ),
    Mutant(
        "padding whose gradient is not cleared",
        "ppo_fast/ops/head.py",
        "self.dw[size:].zero_()",
        "self.dw[:0].zero_()",
        "head_form",
        "changes_no_bit and cpu",
    ),
    Mutant(
        "kept ids of the padding reach its gradient",
        "ppo_fast/ops/sparse_head.py",
        "sizes = call.options.size, padded",
        "sizes = padded, padded",
        "head_form",
        "kept_ids and cpu",
    ),
    Mutant(
        "chunks of the share's own height",
        "ppo_fast/ops/head.py",
        "return self.size if self.shard is None else self.shard.largest",
        "return max(1, self.size)",
        "head_parallel",
        "four-tall",
    ),
    Mutant(
        "a share that begins where equal ones would",
        "ppo_fast/ops/shards.py",
        "self.first, self.vocab = sum(sizes[:rank]), sum(sizes)",
        "self.first, self.vocab = rank * sizes[rank], sum(sizes)",
        "head_parallel",
        "unequal-tall",
    ),
    Mutant(
        "padding counts on the rank that holds it",
        "ppo_fast/ops/shards.py",
        "sizes.append(min(n, left))",
        "sizes.append(n)",
        "head_parallel",
        "padded-tall",
    ),
    Mutant(
        "each rank keeps a slice of its own gradient",
        "ppo_fast/ops/distributed_weight.py",
        "from torch.distributed.tensor import DTensor, Partial",
        "from torch.distributed.tensor import DTensor, Replicate as Partial",
        "head_parallel",
        "fsdp2",
    ),
    Mutant(
        "a partition of ZeRO-3 passes",
        "ppo_fast/ops/distributed_weight.py",
        "if shape is not None and x.shape != shape:",
        "if shape is not None and x.shape == shape:",
        "distributed_weight",
        "partition",
    ),
)
