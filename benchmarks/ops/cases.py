"""What is measured, as data: the cases on a CPU and on a GPU, and what of them fits a machine."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.ops.case import (
    BACKWARD,
    BOTH,
    CALL,
    CALL_GRAD,
    FORWARD,
    SHAPES,
    THP,
    Case,
    fitted,
    memory,
)


def case(
    op: str,
    direction: str,
    shape: str,
    dtype: str = "fp32",
    *,
    device: str = "cpu",
    env: tuple[tuple[str, str], ...] = (),
) -> Case:
    """A case at a named size: what goals are set for, on any machine."""
    return Case(op, direction, SHAPES[shape], dtype, env, device)


LOGPROBS_FORWARD = case("token_logprobs", FORWARD, "gpt2")
LOGPROBS_BOTH = case("token_logprobs", BOTH, "gpt2")
LOGPROBS_BOTH_THP = case("token_logprobs", BOTH, "gpt2", env=THP)
PPO_LOSS_BOTH = case("ppo_loss", BOTH, "rlhf-256k")
VALUE_LOSS_BOTH = case("value_loss", BOTH, "rlhf-256k")
GAE = case("gae", FORWARD, "rlhf-long")
GAE_ENVS = case("gae", FORWARD, "envs-128")
GAE_LONG = case("gae", FORWARD, "long-128k")
GAE_PACKED = case("gae", FORWARD, "packed")
GAES = (GAE, GAE_ENVS, GAE_LONG, GAE_PACKED)
LINEAR_LOSS_BOTH = case("linear_ppo_loss", BOTH, "smollm2-head-2k")

CALLS = tuple(
    case(op, CALL, "tiny")
    for op in ("token_logprobs", "ppo_loss", "value_loss", "gae", "rlhf_advantages", "whiten")
)
CALLS_WITH_GRAD = tuple(
    case(op, CALL_GRAD, "tiny") for op in ("token_logprobs", "ppo_loss", "value_loss")
)

CPU = (
    LOGPROBS_FORWARD,
    LOGPROBS_BOTH,
    LOGPROBS_BOTH_THP,
    *(case("token_logprobs", FORWARD, name) for name in ("smollm2", "llama3", "qwen-r1")),
    case("linear_token_logprobs", FORWARD, "smollm2-head"),
    LINEAR_LOSS_BOTH,
    *(case("linear_ppo_loss", BOTH, f"head-{n}k") for n in (1, 4, 16, 64)),
    case("logits_ppo_loss", BOTH, "gpt2"),
    *(case("ppo_loss", BOTH, name) for name in ("rlhf-8x512", "rlhf-512x8k")),
    PPO_LOSS_BOTH,
    VALUE_LOSS_BOTH,
    *GAES,
    *(case("gae", FORWARD, name) for name in ("rlhf-8x512", "envs-32", "envs-8")),
    case("rlhf_advantages", FORWARD, "rlhf-long"),
    case("whiten", FORWARD, "rlhf-long"),
    *CALLS,
    *CALLS_WITH_GRAD,
)


def _gpu(op: str, direction: str, shape: str, dtype: str = "fp32") -> Case:
    return case(op, direction, shape, dtype, device="cuda")


GPU_LOGPROBS_FORWARD = _gpu("token_logprobs", FORWARD, "qwen-r1", "bf16")
GPU_LOGPROBS_BACKWARD = _gpu("token_logprobs", BACKWARD, "qwen-r1", "bf16")
GPU_LOGPROBS_M64 = _gpu("token_logprobs", FORWARD, "qwen-m64", "bf16")
GPU_LOGPROBS_M512 = _gpu("token_logprobs", FORWARD, "qwen-m512", "bf16")
GPU_PPO_LOSS = _gpu("ppo_loss", BOTH, "rlhf-256k")
GPU_GAE = _gpu("gae", FORWARD, "rlhf-512x8k")
GPU_GAE_LONG = _gpu("gae", FORWARD, "long-16x64k")
GPU_GAE_ENVS_8 = _gpu("gae", FORWARD, "envs-8")
GPU_GAE_ENVS_128 = _gpu("gae", FORWARD, "envs-128")

GPU_LOGITS_LOSS = _gpu("logits_ppo_loss", BOTH, "qwen-r1", "bf16")
GPU_LINEAR_FORWARD = _gpu("linear_token_logprobs", FORWARD, "qwen-r2", "bf16")
GPU_LINEAR_LOSS = _gpu("linear_ppo_loss", BOTH, "qwen-r2", "bf16")

GPU = (
    GPU_LOGPROBS_FORWARD,
    GPU_LOGPROBS_BACKWARD,
    GPU_LOGPROBS_M64,
    GPU_LOGPROBS_M512,
    GPU_LOGITS_LOSS,
    GPU_LINEAR_FORWARD,
    GPU_LINEAR_LOSS,
    GPU_PPO_LOSS,
    GPU_GAE,
    GPU_GAE_LONG,
    GPU_GAE_ENVS_8,
    GPU_GAE_ENVS_128,
    _gpu("token_logprobs", BOTH, "qwen-r1", "bf16"),
    _gpu("value_loss", BOTH, "rlhf-256k"),
    _gpu("ppo_loss", BOTH, "rlhf-1024x16k"),
    _gpu("gae", FORWARD, "packed"),
    _gpu("rlhf_advantages", FORWARD, "rlhf-512x8k"),
    _gpu("whiten", FORWARD, "rlhf-512x8k"),
)


def here(case: Case) -> Case:
    """The case scaled to this machine."""
    return replace(case, shape=fitted(case.shape, case.dtype, memory(case.device)))


CASES = tuple(here(each) for each in CPU + GPU)
OPS = tuple(dict.fromkeys(each.op for each in CASES))
