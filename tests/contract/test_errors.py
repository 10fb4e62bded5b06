# ruff: noqa: E501  (one bad input a line)
"""Bad input: one row each of op, what is changed, the exception and what its text says."""

from __future__ import annotations

import pytest
import torch
from conftest import ON_GPU, usable
from error_rows import EVERY, ONES, SHAPE, TYPE, Row, assert_refused, both, cast, cut, moved

import ppo_fast
from ppo_fast import Moments, _backend, _checks, testing

LOGITS, PPO, VALUE, GAE, RLHF, WHITEN = testing.FACTORIES

ROWS = [
    # token_logprobs
    Row(LOGITS, "logits", [1.0], TYPE, "logits must be a tensor, got list"),
    Row(LOGITS, cast("logits", torch.int64), None, TYPE, "logits must be float32, .*got torch.int64"),
    Row(LOGITS, "logits", torch.tensor(1.0), SHAPE, r"logits must have shape \(..., V\).*got \(\)"),
    Row(LOGITS, "logits", torch.zeros(4, 9, 0), SHAPE, r"V >= 1, got \(4, 9, 0\)"),
    Row(LOGITS, "logits", torch.zeros(4, 37, 9).mT, SHAPE, r"contiguous last dim.*\(333, 1, 9\)"),
    Row(LOGITS, "logits", torch.zeros(4, 9, 1).expand(4, 9, 5), SHAPE, r"contiguous last dim.*0\)"),
    Row(LOGITS, cut("tokens"), None, SHAPE, r"tokens must have shape \(B, T\) = \(4, 9\), got \(4, 8\)"),
    Row(LOGITS, cast("tokens", torch.int16), None, TYPE, "tokens must be int32 or int64, got torch.int16"),
    Row(LOGITS, cast("tokens", torch.float32), None, TYPE, "tokens must be int32 or int64, got torch.float32"),
    Row(LOGITS, moved("tokens"), None, SHAPE, "tokens must be on cpu, got meta"),
    Row(LOGITS, cut("mask"), None, SHAPE, r"mask must have shape .* got \(4, 8\)"),
    Row(LOGITS, cast("mask", torch.complex64), None, TYPE, "mask must be real, got torch.complex64"),
    Row(LOGITS, moved("mask"), None, SHAPE, "mask must be on cpu, got meta"),
    Row(LOGITS, "temperature", 0.0, SHAPE, "temperature must be positive and finite, got 0.0"),
    Row(LOGITS, "temperature", -1.0, SHAPE, "temperature must be in .*, got -1.0"),
    Row(LOGITS, "temperature", float("nan"), SHAPE, "temperature must be in .*, got nan"),
    Row(LOGITS, "temperature", float("inf"), SHAPE, "temperature must be positive and finite, got inf"),
    Row(LOGITS, "temperature", "hot", TYPE, "temperature must be a number, got str"),
    Row(LOGITS, "temperature", torch.ones(5), SHAPE, r"broadcast to \(B, T\) = \(4, 9\), got \(5,\)"),
    Row(LOGITS, "temperature", torch.ones(4, 9, device="meta"), SHAPE, "temperature must be on cpu, got meta"),
    Row(LOGITS, "temperature", torch.ones(4, 9, dtype=torch.int64), TYPE, "temperature must be float32"),
    Row(LOGITS, "ignore_index", 1.5, TYPE, "ignore_index must be an int, got float"),
    # ppo_loss: tensors
    Row(PPO, "logprobs", ONES[0, 0], SHAPE, r"logprobs must have shape \(B, T\) or \(N,\), got \(\)"),
    Row(PPO, "logprobs", torch.ones(1, 4, 9), SHAPE, r"logprobs must have shape .*got \(1, 4, 9\)"),
    Row(PPO, cast("logprobs", torch.int32), None, TYPE, "logprobs must be float32.*torch.int32"),
    Row(PPO, cut("old_logprobs"), None, SHAPE, r"old_logprobs must have shape \(B, T\) = \(4, 9\), got \(4, 8\)"),
    Row(PPO, "advantages", torch.ones(4), SHAPE, r"advantages must have shape .*= \(4, 9\), got \(4,\)"),
    Row(PPO, "advantages", torch.ones(1, 9), SHAPE, r"advantages must have shape .*got \(1, 9\)"),
    Row(PPO, "advantages", 1.0, TYPE, "advantages must be a tensor, got float"),
    Row(PPO, moved("advantages"), None, SHAPE, "advantages must be on cpu, got meta"),
    Row(PPO, cut("mask"), None, SHAPE, r"mask must have shape .*got \(4, 8\)"),
    Row(PPO, cut("is_weights"), None, SHAPE, r"is_weights must have shape .*got \(4, 8\)"),
    Row(PPO, "is_weights", torch.ones(4), SHAPE, r"is_weights must have shape .*= \(4, 9\), got \(4,\)"),
    Row(PPO, "is_weights", torch.ones(40, 1), SHAPE, r"is_weights must have shape .*= \(40,\), got \(40, 1\)", True),
    Row(PPO, "sequence_weights", torch.ones(9), SHAPE, r"sequence_weights must have shape \(B,\) = \(4,\), got \(9,\)"),
    Row(PPO, "sequence_weights", ONES, SHAPE, r"sequence_weights must have shape \(B,\) = \(4,\), got \(4, 9\)"),
    Row(PPO, "sequence_weights", torch.ones(3), SHAPE, r"sequence_weights must have shape \(S,\) = \(4,\), got \(3,\)", True),
    Row(PPO, "sequence_weights", torch.ones(4, dtype=torch.int64), TYPE, "sequence_weights must be float32, .*got torch.int64"),
    Row(PPO, "sequence_weights", torch.ones(4, dtype=torch.float64), TYPE, "sequence_weights must not mix float64"),
    Row(PPO, "sequence_weights", torch.ones(4, device="meta"), SHAPE, "sequence_weights must be on cpu, got meta"),
    Row(PPO, "sequence_weights", 0.5, TYPE, "sequence_weights must be a tensor, got float"),
    Row(PPO, both(cu_seqlens=None, sequence_weights=torch.ones(4)), None, SHAPE, "cu_seqlens must be given for flat inputs with sequence_weights", True),
    Row(PPO, cut("entropy"), None, SHAPE, r"entropy must have shape .*got \(4, 8\)"),
    Row(PPO, cut("ref_logprobs"), None, SHAPE, r"ref_logprobs must have shape .*got \(4, 8\)"),
    Row(PPO, cast("old_logprobs", torch.float64), None, TYPE, "old_logprobs must not mix float64.*beside torch.float32"),
    Row(PPO, cast("logprobs", torch.float64), None, TYPE, "must not mix float64.*beside torch.float64"),
    Row(PPO, "advantage_moments", torch.ones(3), TYPE, "advantage_moments must be Moments, got Tensor"),
    Row(PPO, "advantage_moments", Moments(torch.ones(3, device="meta")), SHAPE, "advantage_moments must be on cpu, got meta"),
    Row(PPO, "cu_seqlens", torch.tensor([0, 4]), SHAPE, r"logprobs must have shape \(N,\) with cu_seqlens, got \(4, 9\)"),
    Row(PPO, "cu_seqlens", torch.tensor([0.0, 40.0]), TYPE, "cu_seqlens must be int32 or int64, got torch.float32", True),
    Row(PPO, "cu_seqlens", torch.zeros(2, 2, dtype=torch.int64), SHAPE, r"cu_seqlens must have shape \(S \+ 1,\), got \(2, 2\)", True),
    Row(PPO, "cu_seqlens", torch.zeros(0, dtype=torch.int64), SHAPE, r"cu_seqlens must have shape \(S \+ 1,\), got \(0,\)", True),
    Row(PPO, "cu_seqlens", torch.zeros(3, dtype=torch.int64, device="meta"), SHAPE, "cu_seqlens must be on cpu, got meta", True),
    Row(PPO, "advantages", torch.ones(40, 1), SHAPE, r"advantages must have shape \(N,\) = \(40,\), got \(40, 1\)", True),
    # ppo_loss: options
    Row(PPO, "variant", "ppo", SHAPE, "variant must be one of clip, gspo, .*got 'ppo'"),
    Row(PPO, "reduction", "mean", SHAPE, "reduction must be one of token-mean.*got 'mean'"),
    Row(PPO, "kl_estimator", "k4", SHAPE, r"kl_estimator must be one of k1, .*got 'k4'"),
    Row(PPO, "kl_estimator", "k3++", SHAPE, r"kl_estimator must be one of k1, .*got 'k3\+\+'"),
    Row(PPO, "kl_estimator", None, SHAPE, "kl_estimator must be one of k1, .*got None"),
    Row(PPO, "clip_low", 1.5, SHAPE, r"clip_low must be in \[0, 1\], got 1.5"),
    Row(PPO, "clip_low", -0.1, SHAPE, r"clip_low must be in \[0, 1\], got -0.1"),
    Row(PPO, "clip_high", -0.1, SHAPE, r"clip_high must be in \[0, inf\], got -0.1"),
    Row(PPO, "clip_high", "0.2", TYPE, "clip_high must be a number, got str"),
    Row(PPO, "clip_high", True, TYPE, "clip_high must be a number, got bool"),
    Row(PPO, "dual_clip", 1.0, SHAPE, "dual_clip must be above 1, got 1.0"),
    Row(PPO, both(dual_clip=3.0, variant="cispo"), None, SHAPE, "dual_clip must be None with variant 'cispo'"),
    Row(PPO, "log_ratio_clamp", -1.0, SHAPE, "log_ratio_clamp must be in .*got -1.0"),
    Row(PPO, "log_ratio_clamp", (1.0, 2.0), SHAPE, "log_ratio_clamp must be in .*got 1.0"),
    Row(PPO, "log_ratio_clamp", (-1.0, 0.0, 1.0), SHAPE, r"log_ratio_clamp must be \(low, high\), got"),
    Row(PPO, "kl_clamp", -1.0, SHAPE, "kl_clamp must be in .*got -1.0"),
    Row(PPO, "kl_ratio_clip", 2.0, SHAPE, r"kl_ratio_clip must be None without a '\+' estimator, got 2.0"),
    Row(PPO, both(kl_ratio_clip=-2.0, kl_estimator="k3+"), None, SHAPE, "kl_ratio_clip must be in .*got -2.0"),
    Row(PPO, "kl_weight", "none", SHAPE, "kl_weight must be one of ratio, score, got 'none'"),
    Row(PPO, both(kl_weight="ratio", kl_estimator="k3+"), None, SHAPE, r"kl_weight must be None with kl_estimator 'k3\+', got 'ratio'"),
    Row(PPO, both(kl_weight="score", kl_estimator="k2+", kl_ratio_clip=2.0), None, SHAPE, "kl_weight must be None with .*got 'score'"),
    Row(PPO, both(kl_weight="score", ref_logprobs=None, variant="penalty"), None, SHAPE, "kl_weight must be None with variant 'penalty', got 'score'"),
    Row(PPO, both(kl_weight="ratio", variant="linear"), None, SHAPE, "kl_weight must be None with variant 'linear', got 'ratio'"),
    Row(PPO, "variant", "given", SHAPE, "variant must be one of clip, gspo, .*got 'given'"),
    Row(PPO, "denom", 0.0, SHAPE, "denom must be positive and finite, got 0.0"),
    Row(PPO, "denom", -2.0, SHAPE, "denom must be .*got -2.0"),
    Row(PPO, "denom", 1e-46, SHAPE, "denom must be positive and finite in float32, got 1e-46"),
    Row(PPO, "denom", torch.ones(1), SHAPE, r"denom must be a number or a 0-d tensor, got \(1,\)"),
    Row(PPO, "kl_coef", torch.ones(2), SHAPE, r"kl_coef must be a number or a 0-d tensor, got \(2,\)"),
    Row(PPO, "kl_coef", float("nan"), SHAPE, "kl_coef must be in .*got nan"),
    Row(PPO, "entropy_coef", "x", TYPE, "entropy_coef must be a number, got str"),
    Row(PPO, both(entropy=None, entropy_coef=0.1), None, SHAPE, "entropy must be given with entropy_coef, got None"),
    Row(PPO, both(ref_logprobs=None, kl_coef=0.1), None, SHAPE, "ref_logprobs must be given with kl_coef, got None"),
    Row(PPO, "variant", "penalty", SHAPE, "ref_logprobs must be None with variant 'penalty'"),
    Row(PPO, both(variant="linear", kl_coef=1.0), None, SHAPE, "kl_coef must be below 1 with variant 'linear', got 1.0"),
    Row(PPO, both(cu_seqlens=None, variant="gspo"), None, SHAPE, "cu_seqlens must be given for flat inputs with variant 'gspo'", True),
    Row(PPO, both(cu_seqlens=None, reduction="seq-mean-token-sum"), None, SHAPE, "cu_seqlens must be given for flat inputs with reduction", True),
    Row(PPO, "reduction", "seq-mean-token-sum-norm", SHAPE, "denom must be given with reduction .*when packed", True),
    # value_loss
    Row(VALUE, cut("returns"), None, SHAPE, r"returns must have shape \(B, T\) = \(4, 9\), got \(4, 8\)"),
    Row(VALUE, cast("old_values", torch.float64), None, TYPE, "old_values must not mix float64"),
    Row(VALUE, moved("returns"), None, SHAPE, "returns must be on cpu, got meta"),
    Row(VALUE, "returns", None, TYPE, "returns must be a tensor, got NoneType"),
    Row(VALUE, "old_values", None, SHAPE, "old_values must be None if and only if clip is, got None"),
    Row(VALUE, "clip", None, SHAPE, "old_values must be None if and only if clip is, got a tensor"),
    Row(VALUE, "clip", -0.5, SHAPE, "clip must be in .*got -0.5"),
    Row(VALUE, "form", "min", SHAPE, "form must be one of max, clipped, got 'min'"),
    Row(VALUE, "form", "unclipped", SHAPE, "form must be one of max, clipped, got 'unclipped'"),
    Row(VALUE, "scale", -1.0, SHAPE, "scale must be in .*got -1.0"),
    Row(VALUE, "denom", 0, SHAPE, "denom must be positive and finite, got 0"),
    Row(VALUE, "denom", 1e39, SHAPE, r"denom must be positive and finite in float32, got 1e\+39"),
    # gae
    Row(GAE, cut("values"), None, SHAPE, r"^gae: values must have shape \(B, T\) = \(4, 9\), got \(4, 8\)$"),
    Row(GAE, "rewards", torch.ones(9), SHAPE, r"cu_seqlens must be given for flat rewards \(9,\)"),
    Row(GAE, cast("rewards", torch.int64), None, TYPE, "rewards must be float32.*torch.int64"),
    Row(GAE, cut("terminated"), None, SHAPE, r"terminated must have shape .*got \(4, 8\)"),
    Row(GAE, moved("bootstrap"), None, SHAPE, "bootstrap must be on cpu, got meta"),
    Row(GAE, "bootstrap", torch.ones(5), SHAPE, r"bootstrap must have shape .*= \(4,\), got \(5,\)"),
    Row(GAE, cast("bootstrap", torch.float64), None, TYPE, "bootstrap must not mix float64"),
    Row(GAE, "next_values", ONES, SHAPE, "bootstrap must be None with next_values, got a tensor"),
    Row(GAE, "truncated", ONES, SHAPE, "next_values must be given with truncated, got None"),
    Row(GAE, "lam", 1.5, SHAPE, r"lam must be in \[0, 1\], got 1.5"),
    Row(GAE, "lam_returns", -0.5, SHAPE, r"lam_returns must be in \[0, 1\], got -0.5"),
    Row(GAE, "gamma", 1.01, SHAPE, r"gamma must be in \[0, 1\], got 1.01"),
    Row(GAE, "lam", torch.ones(9), SHAPE, r"lam must have shape .*\(4,\), got \(9,\)"),
    Row(GAE, "lam", torch.ones(4, dtype=torch.int64), TYPE, "lam must be float32.*torch.int64"),
    Row(GAE, "masked", "skip", SHAPE, "masked must be one of carry, zero, got 'skip'"),
    Row(GAE, "rho", ONES[:, 1:], SHAPE, r"rho must have shape .*got \(4, 8\)"),
    Row(GAE, "time_major", True, SHAPE, "time_major must be False with cu_seqlens, got True", True),
    # rlhf_advantages
    Row(RLHF, "scores", ONES, SHAPE, r"scores must have shape .*\(4,\), got \(4, 9\)"),
    Row(RLHF, "score_at", "per-token", SHAPE, r"scores must have shape \(B, T\) = \(4, 9\), got \(4,\)"),
    Row(RLHF, "score_at", "end", SHAPE, "score_at must be one of last-token.*got 'end'"),
    Row(RLHF, "mask", None, TYPE, "mask must be a tensor, got NoneType"),
    Row(RLHF, cast("scores", torch.int64), None, TYPE, "scores must be float32.*torch.int64"),
    Row(RLHF, cut("values"), None, SHAPE, r"values must have shape .*got \(4, 8\)"),
    Row(RLHF, cut("ref_logprobs"), None, SHAPE, r"ref_logprobs must have shape .*got \(4, 8\)"),
    Row(RLHF, "logprobs", ONES[0], SHAPE, r"cu_seqlens must be given for flat logprobs \(9,\)"),
    Row(RLHF, "reward_clip", 1.0, SHAPE, r"reward_clip must be \(lo, hi\), got 1.0"),
    Row(RLHF, "reward_clip", (1.0, -1.0), SHAPE, "reward_clip must be in .*got -1.0"),
    Row(RLHF, "kl_clamp", -1.0, SHAPE, "kl_clamp must be in .*got -1.0"),
    Row(RLHF, "kl_coef", "x", TYPE, "kl_coef must be a number, got str"),
    # whiten
    Row(WHITEN, "x", torch.ones(2, 2, 2), SHAPE, r"x must have shape .*got \(2, 2, 2\)"),
    Row(WHITEN, cut("mask"), None, SHAPE, r"mask must have shape .*got \(4, 8\)"),
    Row(WHITEN, "moments", torch.ones(3), TYPE, "moments must be Moments, got Tensor"),
    Row(WHITEN, "eps", -1.0, SHAPE, "eps must be in .*got -1.0"),
    Row(WHITEN, "eps_at", "mean", SHAPE, "eps_at must be one of var, std, got 'mean'"),
    # every op
    *(Row(op, "backend", "fast", SHAPE, "backend must be one of reference, .*got 'fast'") for op in EVERY),
]  # fmt: skip


@pytest.mark.case("X13")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}: {row.text[:50]}")
def test_bad_input(row: Row) -> None:
    assert_refused(row)


@pytest.mark.case("X7")
@pytest.mark.parametrize("token", [-1, 37, 2**40])
def test_debug_finds_tokens_out_of_range(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    """PPO_FAST_DEBUG=1 raises IndexError for a live row; masked and ignored ones may hold anything."""
    monkeypatch.setattr(_checks, "DEBUG", True)
    call = testing.logprobs_call((2, 3), device=device, mask="all")
    tokens, mask = call.tensors["tokens"].clone(), call.tensors["mask"].clone()
    tokens[1, 2] = token
    with pytest.raises(IndexError, match=f"tokens.*{token}"):
        testing.run(call.replace(tokens=tokens), backend)
    mask[1, 2] = False
    hidden = testing.run(call.replace(tokens=tokens, mask=mask), backend)
    ignored = testing.run(call.replace(tokens=tokens).option(ignore_index=token), backend)
    assert bool(hidden["logprobs"].isfinite().all() and ignored["logprobs"].isfinite().all())


@pytest.mark.parametrize("offsets", [[1, 4, 40], [0, 20, 10, 40], [0, 10, 39]])
def test_debug_looks_into_cu_seqlens(monkeypatch: pytest.MonkeyPatch, offsets: list[int]) -> None:
    monkeypatch.setattr(_checks, "DEBUG", True)
    call = testing.gae_call((40,), packed=True).replace(cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to N = 40, got \["):
        testing.run(call, "reference")


@pytest.mark.case("X13")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss", "gae", "rlhf_advantages"])
def test_mixed_half_types_are_accepted(backend: str, device: str, op: str) -> None:
    """fp32, bf16 and fp16 in one call; outputs are fp32, gradients of their input's type."""
    call = testing.FACTORIES[op]((3, 7), device=device)
    floats = [k for k, v in call.tensors.items() if v.is_floating_point()]
    types = (torch.float32, torch.bfloat16, torch.float16)
    mixed = call.replace(**{k: call.tensors[k].to(types[i % 3]) for i, k in enumerate(floats)})
    out = testing.run(mixed, backend)
    widened = testing.run(testing.promoted(mixed, torch.float32), backend)
    for name, x in widened.items():
        leaf = name.removeprefix("grad_")
        want = x if leaf == name else x.to(mixed.tensors[leaf].dtype)
        if leaf == name or device == "cuda" or backend != "triton":
            assert testing.same_bits(out[name], want), name


@pytest.mark.case("X13")
@pytest.mark.parametrize("backend_name", ON_GPU)
@pytest.mark.parametrize("op", EVERY)
def test_no_float64_on_a_gpu(op: str, backend_name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = EVERY[op](dtype=torch.float64, device=device)
    with pytest.raises(TypeError, match=f"{backend_name!r} has no float64"):
        testing.run(call, usable(backend_name))


@pytest.mark.parametrize("op", EVERY)
def test_every_op_says_why_a_backend_is_not_usable(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_backend._REASONS, "cuda", "it is not built; run make")
    with pytest.raises(ppo_fast.BackendUnavailableError, match="'cuda' is not usable: it is not"):
        testing.run(EVERY[op](), "cuda")
