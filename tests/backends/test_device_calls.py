"""Work of an op on a GPU besides its kernels: no wait, few launches, bounded memory.

Seen on fake CUDA tensors, through the Triton backend's boundary: `helpers/fake_cuda.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from fake_cuda import Case, calls_of

B, T, V, H = 4, 9, 37, 24
ROWS, VOCAB, WIDTH = 8192, 151936, 4096  # Qwen3-8B's head, 8 sequences of 1024 tokens

Tensors = dict[str, tuple[tuple[int, ...], str]]


def tensors(*shape: int) -> Tensors:
    """The per-token arguments of a loss."""
    return {
        "tokens": (shape, "int64"),
        "old_logprobs": (shape, "float32"),
        "advantages": (shape, "float32"),
        "mask": (shape, "bool"),
    }


TOKENS = tensors(B, T)
PPO: Tensors = {"logprobs": ((B, T), "float32"), **TOKENS}
del PPO["tokens"]
LOGITS: Tensors = {"logits": ((B, T, V), "bfloat16"), **TOKENS}
HEAD: Tensors = {"hidden": ((B, T, H), "bfloat16"), "weight": ((V, H), "bfloat16")}
LARGE: Tensors = {"hidden": ((ROWS, WIDTH), "bfloat16"), "weight": ((VOCAB, WIDTH), "bfloat16")}
IDS: Tensors = {"ids": ((B, T, 6), "int64"), "mask": ((B, T), "bool")}
LARGE_IDS: Tensors = {"ids": ((ROWS, 128), "int64")}
LARGE_TEACHER: Tensors = {
    "teacher_hidden": ((ROWS, WIDTH), "bfloat16"),
    "teacher_weight": ((VOCAB, WIDTH), "bfloat16"),
}
LARGE_TOKENS: Tensors = {"tokens": ((ROWS,), "int64")}
BOTH = ("hidden", "weight")
MEANS = {"reduction": "seq-mean-token-mean"}
_RULE = {"level": "token", "high": 1.2, "reject": {"seq-max-k2": 9.0}, "count": "kept"}
REJECTING = {"correction": _RULE}
ROLLOUT: Tensors = {"rollout_logprobs": ((B, T), "float32")}
TEACHER: Tensors = {
    "teacher_hidden": ((B, T, 16), "bfloat16"),
    "teacher_weight": ((V, 16), "bfloat16"),
    "mask": ((B, T), "bool"),
}
TAUGHT = {"teacher": {"kind": "reverse", "logit_scale": 2.0}}
PAIR: Tensors = dict.fromkeys(("logits", "teacher_logits"), ((B, T, V), "bfloat16"))
PAIR["mask"] = ((B, T), "bool")
WEIGHTED: Tensors = {"sequence_weights": ((B,), "float32")}

# Calls, and the launches of each in the forward and in the backward.
CASES: dict[str, tuple[Case, int, int]] = {
    "ppo_loss": (Case("ppo_loss", PPO, ("logprobs",)), 1, 1),
    "ppo_loss, sequence means": (Case("ppo_loss", PPO, ("logprobs",), MEANS), 1, 1),
    "token_logprobs": (
        Case("token_logprobs", {k: LOGITS[k] for k in ("logits", "tokens")}, ("logits",)), 1, 1,
    ),
    "logits_ppo_loss": (Case("logits_ppo_loss", LOGITS, ("logits",)), 9, 1),
    "logits_ppo_loss, D": (Case("logits_ppo_loss", LOGITS, ("logits",), {"denom": 3.0}), 9, 1),
    "logits_ppo_loss, sums": (
        Case("logits_ppo_loss", LOGITS, ("logits",), {"reduction": "token-sum"}), 5, 1,
    ),
    "logits_ppo_loss, sequence means": (
        Case("logits_ppo_loss", LOGITS, ("logits",), MEANS), 21, 1,
    ),
    "linear_token_logprobs": (
        Case("linear_token_logprobs", HEAD | {"tokens": TOKENS["tokens"]}, BOTH), 11, 12,
    ),
    "linear_logprobs_at": (Case("linear_logprobs_at", HEAD | IDS, BOTH), 36, 61),
    "linear_ppo_loss": (Case("linear_ppo_loss", HEAD | TOKENS, BOTH), 22, 2),
    "linear_divergence": (Case("linear_divergence", HEAD | TEACHER, BOTH, TAUGHT), 73, 2),
    "linear_token_divergence": (
        Case("linear_token_divergence", HEAD | TEACHER, BOTH, TAUGHT, outputs=4), 28, 18,
    ),
    "linear_ppo_loss, teacher": (
        Case("linear_ppo_loss", HEAD | TOKENS | TEACHER, BOTH, TAUGHT), 62, 2,
    ),
    "linear_ppo_loss, z-loss": (
        Case("linear_ppo_loss", HEAD | TOKENS, BOTH, {"z_loss_coef": 0.1}), 69, 2,
    ),
}  # fmt: skip
WAITING = {
    "statistics": Case(
        "linear_token_stats", HEAD | {"tokens": TOKENS["tokens"]}, BOTH, {}, (), False
    ),
    "divergence": Case("divergence", PAIR, ("logits",), {"kind": "jsd"}, (), False),
    "teacher, gspo": Case(
        "linear_ppo_loss", HEAD | TOKENS | TEACHER, BOTH, TAUGHT | {"variant": "gspo"}, (), False
    ),
    "teacher, support": Case(
        "linear_ppo_loss", HEAD | TOKENS | TEACHER, BOTH, TAUGHT | {"kept": 5}, (), False
    ),
    "sequence weights": Case("linear_ppo_loss", HEAD | TOKENS | WEIGHTED, BOTH, MEANS),
    "correction": Case("linear_ppo_loss", HEAD | TOKENS | ROLLOUT, BOTH, REJECTING),
    "correction, D": Case(
        "logits_ppo_loss", LOGITS | ROLLOUT, ("logits",), REJECTING | {"denom": 3.0}
    ),
    "support": Case("linear_ppo_loss", HEAD | TOKENS, BOTH, {"kept": 5}),
    "support, log-probabilities": Case(
        "linear_token_logprobs", HEAD | {"tokens": TOKENS["tokens"]}, BOTH, {"kept": 5}, outputs=4
    ),
    "support, logits": Case("logits_ppo_loss", LOGITS, ("logits",), {"kept": 5}),
    "D": Case("linear_ppo_loss", HEAD | TOKENS, BOTH, {"denom": 3.0}),
    "hidden states cut": Case("linear_ppo_loss", HEAD | TOKENS, BOTH, {}, ("hidden",)),
    "chosen rows": Case(
        "linear_ppo_loss", HEAD | TOKENS | {"row_index": ((7,), "int64")}, BOTH, {}, ("hidden",)
    ),
}
FULL = {
    "linear_ppo_loss": Case("linear_ppo_loss", LARGE | tensors(ROWS), BOTH),
    "linear_token_logprobs": Case("linear_token_logprobs", LARGE | LARGE_TOKENS, BOTH),
    "linear_logprobs_at": Case("linear_logprobs_at", LARGE | LARGE_IDS, BOTH),
    "linear_divergence": Case(
        "linear_divergence", LARGE | LARGE_TEACHER, BOTH, {"teacher": {"kind": "jsd"}}
    ),
}
# The part of each that forms the gradients.
PARTS = [
    ("linear_ppo_loss", "forward"),
    ("linear_token_logprobs", "backward"),
    ("linear_logprobs_at", "backward"),
]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    every = {name: case for name, (case, *_) in CASES.items()}
    full = {f"{name}, full size": case for name, case in FULL.items()}
    return calls_of(every | WAITING | full)


@pytest.mark.parametrize("name", [*CASES, *WAITING])
def test_nothing_waits(seen: dict[str, Any], name: str) -> None:
    """No value is copied from or to the host, and none decides how much is done."""
    for part, report in seen[name].items():
        assert report["waits"] == [], part


@pytest.mark.parametrize(("name", "forward", "backward"), [(k, *v[1:]) for k, v in CASES.items()])
def test_launches(seen: dict[str, Any], name: str, forward: int, backward: int) -> None:
    """A kernel op counts as one."""
    found = {part: report["launches"] for part, report in seen[name].items()}
    assert {part: len(names) for part, names in found.items()} == {
        "forward": forward,
        "backward": backward,
    }, found


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_the_head_multiplies_whole_waves(seen: dict[str, Any], name: str, part: str) -> None:
    """Logits and hidden gradients by 1024 rows, no row of them padding; dW by 2048, the first
    without a read of what it adds to."""
    report = seen[f"{name}, full size"][part]
    calls = Counter(report["launches"])
    assert calls["aten::mm.dtype_out"] == calls["aten::mm"] == ROWS // 1024
    assert calls["aten::addmm.dtype_out"] == ROWS // 2048
    assert calls["aten::zeros"] + calls["aten::zero_"] == 0


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_the_head_s_memory_is_bounded(seen: dict[str, Any], name: str, part: str) -> None:
    """The wide dW and 1.4 GB more: one block of logits, and the hidden states' gradient."""
    assert seen[f"{name}, full size"][part]["peak"] <= 4 * VOCAB * WIDTH + 1.4e9


def test_a_teacher_takes_one_more_product_and_block(seen: dict[str, Any]) -> None:
    """Its logits by 1024 rows, in a workspace of its own beside the student's."""
    report = seen["linear_divergence, full size"]["forward"]
    calls = Counter(report["launches"])
    assert calls["aten::mm.dtype_out"] == 2 * ROWS // 1024
    assert calls["aten::mm"] == ROWS // 1024
    assert calls["aten::addmm.dtype_out"] == ROWS // 2048
    assert report["peak"] <= 4 * VOCAB * WIDTH + 2 * 1.4e9
