"""Named sizes that several ops are measured at; an op's own are in its file."""

from __future__ import annotations

from benchmarks.ops.case import Shape

# Logits of one micro-batch: rows × vocabulary; R1 of the goals is the first.
QWEN_R1 = Shape("qwen-r1", (8192, 151936))
GPT2 = Shape("gpt2", (512, 50257))  # 103 MB of fp32 logits, and rows of odd length

# Logits as hidden states × head, rows × vocabulary × hidden size: R2 of the goals.
QWEN_R2 = Shape("qwen-r2", (8192, 151936, 4096))

# Tokens of RLHF batches: sequences × tokens.
RLHF_8X512 = Shape("rlhf-8x512", (8, 512))
RLHF_LONG = Shape("rlhf-long", (64, 4096))
RLHF_256K = Shape("rlhf-256k", (256, 1024))
RLHF_512X8K = Shape("rlhf-512x8k", (512, 8192))

# Tensors too small to matter: what is measured is the cost of the call.
TINY = Shape("tiny", (2, 8))
