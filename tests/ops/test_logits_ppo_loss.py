"""logits_ppo_loss: every variant and reduction, the gradient over the logits, extreme logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from head_helpers import shape_for

import ppo_fast
from ppo_fast import Stats, testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast.testing import Call, logits_ppo_call, run, same_bits

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
BARE: dict[str, Any] = {"extras": (), "kl_coef": 0.0, "temperature": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "bare": {**BARE, "mask": None},
    "dual clip": {"dual_clip": 3.0},
    "gspo dual clip": {"variant": "gspo", "dual_clip": 3.0},
    "k3+": {"kl_estimator": "k3+", "kl_ratio_clip": 1.05},
    "k2": {"kl_estimator": "k2", "kl_clamp": 0.05},
    "asymmetric clamp": {"log_ratio_clamp": (-1.0, 0.5)},
    "denom": {"denom": 17.0, "reduction": "seq-mean-token-sum"},
    "odd vocabulary": {"vocab": 1009, "temperature": 0.7},
    "one class": {"vocab": 1},
    "nothing kept": {"mask": "empty"},
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_within_budget(dtype: torch.dtype, variant: str, reduction: str) -> None:
    """In fp64 also where a variant stops gradients by definition, which gradcheck cannot see."""
    options = {"variant": variant, "reduction": reduction, "dtype": dtype}
    testing.assert_agrees(logits_ppo_call((5, 12), mask="row", **options), "cpu")
    testing.assert_agrees(logits_ppo_call((3, 7), mask=None, **options, **BARE), "cpu")


@pytest.mark.parametrize("reduction, variant", [*zip(REDUCTIONS, VARIANTS, strict=True)])
def test_every_backend_within_budget(
    backend: str, device: str, variant: str, reduction: str
) -> None:
    call = logits_ppo_call(
        shape_for(backend, device), variant=variant, reduction=reduction, device=device
    )
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_half_precisions(backend: str, device: str, dtype: torch.dtype) -> None:
    call = logits_ppo_call((2, 2), dtype=dtype, device=device)
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert out["loss"].dtype == torch.float32 and out["grad_logits"].dtype == dtype


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict[str, Any]) -> None:
    for seed in range(2):
        testing.assert_agrees(logits_ppo_call((5, 12), seed=seed, **options), "cpu")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_packed(variant: str, reduction: str) -> None:
    options = {"denom": 11.0} if reduction.endswith("norm") else {}
    call = logits_ppo_call((45,), packed=True, variant=variant, reduction=reduction, **options)
    testing.assert_agrees(call, "cpu")


def test_ignored_tokens_are_masked(backend: str, device: str) -> None:
    call = logits_ppo_call((2, 4), device=device)
    tokens, mask = call.tensors["tokens"].clone(), call.tensors["mask"].clone()
    tokens[1, 1], mask[1, 1] = -100, False
    out = run(call.replace(tokens=tokens), backend)
    want = run(call.replace(mask=mask), backend)
    assert all(same_bits(out[k], want[k]) for k in want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_both_ops_in_one(kernel: str, device: str, variant: str) -> None:
    """Log-probabilities, entropies, loss and statistics are `token_logprobs`' and `ppo_loss`'."""
    call = logits_ppo_call((2, 2), device=device, variant=variant)._replace(cotangents={})
    t = call.tensors
    names = ("logits", "tokens", "mask", "temperature")
    scored = ppo_fast.token_logprobs(**{k: t[k] for k in names}, backend=kernel)
    rest = {k: v for k, v in t.items() if k not in names}
    loss = ppo_fast.ppo_loss(
        scored.logprobs,
        mask=t["mask"],
        entropy=scored.entropy,
        **rest,
        **call.options,
        backend=kernel,
    )
    out = run(call, kernel)
    assert same_bits(out["logprobs"], scored.logprobs) and same_bits(out["loss"], loss.loss)
    assert same_bits(out["entropy"], scored.entropy)
    assert same_bits(out["stats"], loss.stats.values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_or_no_grad(kernel: str, device: str, variant: str) -> None:
    call = logits_ppo_call((2, 2), device=device, variant=variant)
    a, b = run(call, kernel), run(call._replace(cotangents={}), kernel)
    assert all(same_bits(a[k], b[k]) for k in b)


def test_the_first_ratio_is_exactly_one(kernel: str, device: str) -> None:
    call = logits_ppo_call((2, 4), device=device)
    names = ("logits", "tokens", "temperature", "mask")
    old = ppo_fast.token_logprobs(**{k: call.tensors[k] for k in names}, backend=kernel).logprobs
    for rows in ([0, 1], [1]):
        part = testing.with_rows(call.replace(old_logprobs=old), torch.tensor(rows))
        stats = Stats(run(part, kernel)["stats"]).compute()
        assert stats["ratio_min"] == stats["ratio_max"] == 1.0 and stats["kl_k3"] == 0.0


@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_micro_batches_with_one_denom_are_the_batch(variant: str) -> None:
    call = logits_ppo_call((6, 12), denom=7.5, mask="row", variant=variant)
    groups = [torch.tensor(rows) for rows in ([0, 1], [2, 3, 4], [5])]
    parts = [run(testing.with_rows(call, rows), "cpu") for rows in groups]
    together = {
        k: torch.cat([p[k] for p in parts]) for k in ("logprobs", "entropy", "grad_logits")
    }
    together["loss"] = sum(p["loss"] for p in parts)
    together["stats"] = sum(
        (Stats(p["stats"]) for p in parts[1:]), Stats(parts[0]["stats"])
    ).values
    testing.assert_agrees(call, "cpu", together)


@pytest.mark.parametrize("variant", ["clip", "gspo"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inplace(kernel: str, device: str, dtype: torch.dtype, variant: str) -> None:
    """The gradient lies over the logits; a second backward through them raises.

    gspo and fp16 form it in the backward, and leave the logits alone until then.
    """
    call = logits_ppo_call((2, 3), device=device, dtype=dtype, variant=variant)
    want = run(call, kernel)
    base = call.tensors["logits"].clone().requires_grad_()
    logits = base * 1.0
    before, args = logits._version, call.replace(logits=logits).tensors
    out = ppo_fast.logits_ppo_loss(**args, **call.options, inplace=True, backend=kernel)
    late = variant == "gspo" or dtype == torch.float16
    assert logits._version == before if late else logits._version > before
    assert all(same_bits(x.detach(), want[k]) for k, x in testing.output(out).items())
    out.loss.backward(call.cotangents["loss"], retain_graph=True)
    assert same_bits(base.grad, want["grad_logits"])
    assert same_bits(logits.detach(), want["grad_logits"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inplace_without_a_gradient_writes_nothing(kernel: str, device: str) -> None:
    call = logits_ppo_call((2, 3), device=device)._replace(cotangents={})
    logits = call.tensors["logits"]
    want, version = logits.clone(), logits._version
    run(call.option(inplace=True), kernel)
    assert same_bits(logits, want) and logits._version == version


def test_other_users_of_logits_written_over_notice(device: str, kernel: str) -> None:
    """An op that saved the logits for its own backward raises instead of reading the gradient."""
    call = logits_ppo_call((2, 3), device=device)
    logits = call.tensors["logits"].clone().requires_grad_() * 1.0
    square = (logits * logits).sum()
    args = call.replace(logits=logits).tensors
    out = ppo_fast.logits_ppo_loss(**args, **call.options, inplace=True, backend=kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + out.loss).backward()


def test_retained_graphs_give_the_same_gradients(kernel: str, device: str) -> None:
    call = logits_ppo_call((2, 3), device=device)
    leaf = call.tensors["logits"].clone().requires_grad_()
    args = call.replace(logits=leaf).tensors
    loss = ppo_fast.logits_ppo_loss(**args, **call.options, backend=kernel).loss
    for _ in range(2):
        loss.backward(retain_graph=True)
    (single,) = torch.autograd.grad(loss, leaf)
    assert same_bits(leaf.grad, 2 * single) and bool(single.any())


def test_double_backward_raises(kernel: str, device: str) -> None:
    call = logits_ppo_call((2, 2), device=device, mask=None)
    leaf = call.tensors["logits"].clone().requires_grad_()
    args = call.replace(logits=leaf).tensors
    out = ppo_fast.logits_ppo_loss(**args, **call.options, backend=kernel)
    (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def _quiet(device: str, logits: torch.Tensor, tokens: list[int], **options: Any) -> Call:
    """A sequence of given logits at ratio 1, entropy bonus included."""
    call = logits_ppo_call(
        (1, len(tokens)),
        logits.shape[-1],
        device=device,
        mask=None,
        extras=("entropy",),
        kl_coef=0.0,
        temperature=1.0,
    )
    given = {"logits": logits.to(device)[None], "tokens": torch.tensor([tokens], device=device)}
    return call.replace(old_logprobs=None, **given).option(old_logprobs=None, **options)


@pytest.mark.parametrize("offset", [-200.0, 1e4])
def test_offsets(backend: str, device: str, offset: float) -> None:
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(1)) + offset
    call = _quiet(device, logits, [1, 17, 36])
    testing.assert_agrees(call, backend)
    assert all(bool(x.isfinite().all()) for x in run(call, backend).values())


def test_a_label_of_probability_one(backend: str, device: str) -> None:
    logits = torch.zeros(3, 37)
    logits[0, 5], logits[1, 5], logits[2, 9] = 12.0, 60.0, 200.0
    call = _quiet(device, logits, [5, 5, 3])
    testing.assert_agrees(call, backend)
    out = run(call, backend)
    assert all(bool(x.isfinite().all()) for x in out.values())
    assert bool((out["logprobs"] <= 0).all())


def test_forbidden_classes(backend: str, device: str) -> None:
    """A class at −inf is no class; a label there passes no gradient to its row."""
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    logits[:, ::3] = -INF
    fine = _quiet(device, logits, [1, 2, 4])
    testing.assert_agrees(fine, backend)
    call = _quiet(device, logits, [1, 3, 4], entropy_coef=0.0)
    out = run(
        call.replace(old_logprobs=torch.full((1, 3), -3.0, device=device))._replace(
            options={k: v for k, v in call.options.items() if k != "old_logprobs"}
        ),
        backend,
    )
    assert float(out["logprobs"][0, 1]) == -INF and bool(out["loss"].isfinite())
    assert not bool(out["grad_logits"][0, 1].any())
    assert bool(out["grad_logits"].isfinite().all()) and bool(out["grad_logits"].any())


@pytest.mark.parametrize("token", [-1, 37])
def test_tokens_out_of_range_are_nan_rows(backend: str, device: str, token: int) -> None:
    call = logits_ppo_call((2, 3), device=device, mask=None)
    tokens = call.tensors["tokens"].clone()
    tokens[1, 1] = token
    out, clean = run(call.replace(tokens=tokens), backend), run(call, backend)
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    for name in ("logprobs", "entropy", "grad_logits"):
        assert bool(out[name][1, 1].isnan().all()), name
        assert same_bits(out[name][others], clean[name][others]), name
    assert bool(out["loss"].isnan())


def test_rows_without_a_slope_are_exact_zeros(kernel: str, device: str) -> None:
    call = logits_ppo_call((2, 4), device=device, mask=None, **BARE)
    adv = torch.where(
        torch.arange(8, device=device).view(2, 4) % 2 == 0, call.tensors["advantages"], 0.0
    )
    grad = run(call.replace(advantages=adv), kernel)["grad_logits"]
    assert not bool(grad[adv == 0].any()) and bool(grad.any())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(kernel: str, device: str, layout: str) -> None:
    view, dense = testing.with_layout(logits_ppo_call((2, 2), device=device), layout)
    a, b = run(view, kernel), run(dense, kernel)
    assert all(same_bits(a[k], b[k]) for k in b)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1)], ids=str)
def test_small_shapes(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(logits_ppo_call(shape, device=device, mask="all"), backend)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept(reduction: str, variant: str) -> None:
    """D = 0: loss 0 and a zero gradient, whatever stands in the rows; with `denom` too."""
    for options in ({}, {"denom": 5.0}):
        call = logits_ppo_call(
            (2, 3), mask="empty", reduction=reduction, variant=variant, **options
        )
        out = run(testing.with_garbage(call, math.nan), "cpu")
        assert float(out["loss"]) == 0.0 and not bool(out["grad_logits"].any())
