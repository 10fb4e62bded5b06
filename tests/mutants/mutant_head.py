"""Seeded mistakes of the linear head and of adapters on it: `extra=(u, b)`, peft's in the loop."""

from __future__ import annotations

from mutant import Mutant

HEAD = (
    Mutant(
        "a divisor that forgets rows left out",
        "ppo_fast/ops/linear_ppo_loss.py",
        "policy = policy.counting(self.counted)",
        "policy = policy",
        "linear_ppo_loss",
    ),
    Mutant(
        "gradients of a chunk to the rows of the first",
        "ppo_fast/ops/linear_ppo_loss.py",
        "(z[live], some, live + at.start, chosen",
        "(z[live], some, live, chosen",
        "linear_ppo_loss head_work",
    ),
    Mutant(
        "a row's bits follow the rows beside it",
        "ppo_fast/ops/head.py",
        "put(z, _padded(part[at], tall), product.weight)",
        "put(z[: at.stop - at.start], part[at], product.weight)",
        "head_extra",
        "keeps_its_bits",
    ),
    Mutant(
        "16-bit u and b replace the logits of the head",
        "ppo_fast/ops/gemm.py",
        "z[:, piece].addmm_(x, w.t())",
        "torch.mm(x, w.t(), out=z[:, piece])",
        "head_extra",
        "precisions and float16 and not bfloat16 and logprobs",
    ),
    Mutant(
        "each block's gradient by b replaces the former",
        "ppo_fast/ops/head.py",
        "beta=int(self._written)",
        "beta=int(self._written and x.shape[1] > 3)",
        "head_extra",
        "within_budget and cpu and logprobs",
    ),
    Mutant(
        "a share of u's gradient",
        "ppo_fast/ops/head.py",
        "if self.options.shard is not None:\n                    dist.all_reduce(dx",
        "if self.options.shard is not None and product is self.products[0]:\n"
        "                    dist.all_reduce(dx",
        "head_parallel",
        "processes and extra",
    ),
    Mutant(
        "the sparse head without its adapter",
        "ppo_fast/ops/sparse_head.py",
        "if u is not None and b is not None:\n        z = z",
        "if u is not None and b is None:\n        z = z",
        "head_extra",
        "within_budget and cpu and sparse",
    ),
    Mutant(
        "the sparse gradients by weight and b change places",
        "ppo_fast/ops/sparse_head.py",
        "found = [calls.sparse_weight_grad(*args, x) for x in inputs]",
        "found = [calls.sparse_weight_grad(*args, inputs[0]) for x in inputs]",
        "head_extra",
        "within_budget and cpu and sparse",
    ),
    Mutant(
        "autocast leaves b wide",
        "ppo_fast/ops/head_inputs.py",
        "hidden, weight, u, b = _autocast(hidden, weight, u, b)",
        "hidden, weight, u, _ = _autocast(hidden, weight, u, b)",
        "head_extra",
        "autocast",
    ),
    Mutant(
        "an adapter on the head without its scale",
        "ppo_fast/loop/model/head.py",
        "return (x * self.scale).to(hidden.dtype)",
        "return x.to(hidden.dtype)",
        "loop_adapters",
        "on_the_head_are_in",
    ),
    Mutant(
        "the second adapter on the head is left out",
        "ppo_fast/loop/model/head.py",
        "return (u[0], b[0]) if len(u) == 1 else",
        "return (u[0], b[0]) if len(u) >= 1 else",
        "loop_adapters",
        "on_the_head_are_in",
    ),
    Mutant(
        "merged adapters count twice",
        "ppo_fast/loop/model/head.py",
        "if head.merged or head.disable_adapters:",
        "if head.disable_adapters:",
        "loop_adapters",
        "merged",
    ),
    Mutant(
        "an adapter of another kind is left out in silence",
        "ppo_fast/loop/model/head.py",
        "        _check_adapter(model, head, name)\n",
        "        if name not in getattr(head, 'lora_A', {}):\n            continue\n",
        "loop_adapters",
        "other_kinds",
    ),
    Mutant(
        "bf16 u and b replace the logits where the CPU has dot products",
        "ppo_fast/ops/gemm.py",
        "z, add=True)",
        "z, add=False)",
        "head_extra",
        "precisions and bfloat16 and logprobs",
    ),
    Mutant(
        "bf16 dot products are never used",
        "ppo_fast/_backend.py",
        'bool(_ext.module().build_info()["bf16_dot"])',
        "False",
        "bf16_product",
        "within_budget",
    ),
)

HEAD_CPU = (
    Mutant(
        "an fp32 operand is one bf16 number",
        "csrc/cpu/linear/bf16_product_simd.h",
        "part < (both ? 2 : 1)",
        "part < 1",
        "bf16_product",
        "within_the_bound",
    ),
)
