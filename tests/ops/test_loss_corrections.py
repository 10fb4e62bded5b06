"""Corrections inside the losses: weights, rejections, what counts, and when they are formed."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from head_helpers import products, short_chunks
from token_batches import LAYOUTS, Batch, batch
from torch import Tensor

import ppo_fast
from ppo_fast import Correction

CLOSE = {"rtol": 1e-12, "atol": 1e-13}
REDUCTIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def holds(key: str, bound: Any, own: Tensor) -> Tensor:
    """A rejection's bound on a sequence's x: True where it holds, for each token or all alike."""
    if key == "token-ratio":
        return (own.exp() >= bound[0]) & (own.exp() <= bound[1])
    if key == "token-k3":
        return own.exp() - 1 - own <= bound
    if key == "seq-mean-k1":
        return (-own.mean()).abs() <= math.log(bound)
    assert key == "seq-max-k2"
    return (own**2 / 2).max() <= bound


def weight_of(c: Correction, x: Tensor, at: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights and kept tokens of flat x, one sequence after another."""
    weights, kept = torch.ones_like(x), torch.ones_like(x, dtype=torch.bool)
    low, high = c.bounds()
    rejects = dict(c.reject)
    for seq in at:
        if not seq.numel():
            continue
        own = x[seq]
        level = {"token": own, "sequence": own.sum(), "geometric": own.mean()}.get(c.level or "")
        if level is not None:
            ratio = level.clamp(-20, 20).exp()
            if c.form == "truncate":
                ratio = ratio.clamp(low, high)
            else:
                ratio = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
            weights[seq] = ratio.expand(own.shape)
        for key, bound in rejects.items():
            kept[seq] &= holds(key, bound, own)
    return weights, kept


def expected(b: Batch, c: Correction, reduction: str, options: dict[str, Any]) -> Any:
    """Loss and gradient of clip + 0.1 k3 − 0.02 entropy, from the definition in words."""
    keep = b.mask.reshape(-1)
    new, old, rollout, ref, adv, ent = (
        torch.where(keep, x.reshape(-1), 0.0)
        for x in (b.logprobs, b.old, b.rollout, b.ref, b.advantages, b.entropy)
    )
    new.requires_grad_()
    bypass = options.get("old") is None
    base = new.detach() if bypass or c.ratio == "current" else old
    weights, kept = weight_of(c, base - rollout, b.per_sequence())
    rho = (new - (new.detach() if bypass else old)).exp()
    policy = torch.maximum(-adv * rho, -adv * rho.clamp(0.8, 1.2)) * weights
    x = new - ref
    others = 0.1 * ((-x).exp() - 1 + x) - 0.02 * ent
    policy = torch.where(kept, policy, 0.0)
    if c.drops == "all":
        others = torch.where(kept, others, 0.0)
    counted = keep & kept if c.count == "kept" else keep
    width = b.mask.shape[-1]
    total: Any = 0.0
    tokens = [int(counted[at].sum()) for at in b.per_sequence()]
    for at, n in zip(b.per_sequence(), tokens, strict=True):
        if at.numel():
            share = 1 / max(n, 1) if reduction == "seq-mean-token-mean" else 1.0
            gone = n == 0 and reduction == "seq-mean-token-mean"
            total = total + (0.0 if gone else share * (policy + others)[at].sum())
    live = sum(n > 0 for n in tokens)
    d = {
        "token-mean": sum(tokens),
        "token-sum": 1,
        "seq-mean-token-sum-norm": live * width,
    }.get(reduction, live)
    d = options.get("denom") or d
    loss = total / d if d else 0.0 * new.sum()
    (grad,) = torch.autograd.grad(loss, new)
    return loss.detach(), torch.where(keep, grad, 0.0).view(b.mask.shape), weights, kept


FORMS: dict[str, dict[str, Any]] = {
    "token": {"level": "token", "high": 1.2},
    "icepop": {"level": "token", "form": "mask", "low": 0.8, "high": 1.25},
    "sequence": {"level": "sequence", "high": 2.0},
    "geometric": {"level": "geometric", "form": "mask", "low": 0.95, "high": 1.05},
    "rejects": {"level": None, "reject": {"token-ratio": (0.7, 1.4)}},
    "token-k3": {"level": "token", "high": 1.3, "reject": {"token-k3": 0.05}},
    "geo-rs": {"level": None, "reject": {"seq-mean-k1": 1.05}},
    "outlier": {"level": "sequence", "high": 2.0, "reject": {"seq-max-k2": 0.2}},
}


def called(b: Batch, c: Correction, reduction: str, backend: str, **options: Any) -> Any:
    new = b.logprobs.clone().requires_grad_()
    old = options.pop("old", b.old)
    out = ppo_fast.ppo_loss(
        new,
        old,
        b.advantages,
        b.mask,
        rollout_logprobs=b.rollout,
        correction=c,
        ref_logprobs=b.ref,
        kl_coef=0.1,
        entropy=b.entropy,
        entropy_coef=0.02,
        reduction=reduction,
        cu_seqlens=b.cu_seqlens,
        backend=backend,
        **options,
    )
    out.loss.backward()
    return out, new.grad


CELLS = [
    (name, drops, count, ratio)
    for name, drops, count, ratio in itertools.product(
        FORMS, ("policy", "all"), ("all", "kept"), ("old", "current")
    )
    if "reject" in FORMS[name] or (drops, count) == ("policy", "all")
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(cell))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_loss_and_gradient_from_the_definition(
    backend: str, cell: tuple[str, str, str, str], layout: str
) -> None:
    """Every level, form, rejection, drop and count, by the old and the current log-probabilities,
    under each reduction; sequences that are empty or rejected whole are among them."""
    name, drops, count, ratio = cell
    b = batch(layout)
    c = Correction(**FORMS[name], drops=drops, count=count, ratio=ratio)  # type: ignore[arg-type]
    for reduction in REDUCTIONS:
        norm = reduction == "seq-mean-token-sum-norm" and layout == "packed"
        options: dict[str, Any] = {"denom": 7.0} if norm else {}
        want, want_grad, weights, kept = expected(b, c, reduction, {"old": b.old, **options})
        out, grad = called(b, c, reduction, backend, **options)
        torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
        torch.testing.assert_close(grad, want_grad, **CLOSE)
        found, keep = out.stats.compute(), b.mask.reshape(-1)
        mean = float(weights[keep].mean())
        assert math.isclose(found["rollout_weight_mean"], mean, rel_tol=1e-12)
        assert math.isclose(
            found["rollout_rejected_frac"], float((~kept)[keep].double().mean()), abs_tol=1e-12
        )
        # Where nothing is counted the loss is 0, and the statistics keep sums that still merge.
        if not norm and (count == "all" or bool((kept & keep).any())):
            assert math.isclose(found["loss"], float(want), rel_tol=1e-12, abs_tol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", FORMS)
def test_bypass_takes_the_current_logprobs(backend: str, name: str) -> None:
    """Without old log-probabilities the ratio is 1 and x is current − rollout."""
    b = batch("holes")
    c = Correction(**FORMS[name])
    want, want_grad, *_ = expected(b, c, "token-mean", {"old": None})
    out, grad = called(b, c, "token-mean", backend, old=None)
    torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
    torch.testing.assert_close(grad, want_grad, **CLOSE)
    assert out.stats.compute()["ratio_max"] == 1.0


HEADS = [
    ("token", "policy", "all", "old", 3),
    ("token", "policy", "all", "current", 3),
    ("token-k3", "all", "kept", "current", 3),
    ("token-k3", "policy", "kept", "current", 3),
    ("sequence", "policy", "all", "old", 3),
    ("sequence", "policy", "all", "current", 4),
    ("outlier", "all", "kept", "current", 4),
    ("outlier", "all", "all", "old", 3),
]


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("cell", HEADS, ids=lambda cell: "-".join(map(str, cell)))
@pytest.mark.parametrize("op", ["linear", "logits", "linear-rows"])
def test_heads_are_the_composition(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    cell: tuple[str, str, str, str, int],
    reduction: str,
) -> None:
    """The head's loss is `ppo_loss` of its log-probabilities, in fp64, with as many products as
    the table in docs/corrections.md says."""
    short_chunks(monkeypatch)
    name, drops, count, ratio, cost = cell
    if ratio == "current" and count == "kept" and reduction == "seq-mean-token-mean":
        cost = 4
    b = batch("holes")
    c = Correction(**FORMS[name], drops=drops, count=count, ratio=ratio)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(*b.mask.shape, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(19, 8, generator=g, dtype=torch.float64) * 0.3
    tokens = torch.randint(19, b.mask.shape, generator=g)
    scored = ppo_fast.linear_token_logprobs(hidden, weight, tokens, backend="cpu").logprobs
    old, rollout = scored + b.old + 1.5, scored + b.rollout + 1.5
    index = torch.arange(b.mask.numel())[::2] if op == "linear-rows" else None
    rest: dict[str, Any] = {
        "rollout_logprobs": rollout,
        "correction": c,
        "reduction": reduction,
        "entropy_coef": 0.02,
    }
    found = []
    for backend in ("cpu", "reference"):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        rows = products(monkeypatch) if backend == "cpu" else {}
        if op == "logits":
            out: Any = ppo_fast.logits_ppo_loss(
                x @ w.T, tokens, old, b.advantages, b.mask, backend=backend, **rest
            )
        else:
            out = ppo_fast.linear_ppo_loss(
                x, w, tokens, old, b.advantages, b.mask, row_index=index, backend=backend, **rest
            )
        (3.0 * out.loss).backward()
        if op == "linear" and backend == "cpu":
            once = -(-int(b.mask.sum()) // 16) * 16
            assert rows["logits_into"] == once if cost == 3 else rows["logits_into"] > once
        found.append((out.loss.detach(), x.grad, w.grad, out.stats.values))
    for a, z in zip(*found, strict=True):
        torch.testing.assert_close(a, z, rtol=1e-11, atol=1e-12)


def test_an_unscored_token_counts_as_no_difference() -> None:
    """A NaN of the sampler at an unmasked slot: x = 0, counted; as TRL takes it."""
    b = batch("padded")
    c = Correction("token", high=1.2, reject={"seq-max-k2": 9.0})
    known = b.rollout.clone()
    known[0, 2] = b.old[0, 2]
    want, grad = called(b._replace(rollout=known), c, "token-mean", "cpu")
    unknown = b.rollout.clone()
    unknown[0, 2] = float("nan")
    out, found = called(b._replace(rollout=unknown), c, "token-mean", "cpu")
    assert float(out.loss) == float(want.loss) and torch.equal(found, grad)
    assert (out.stats.compute()["rollout_missing"], want.stats.compute()["rollout_missing"]) == (
        1.0,
        0.0,
    )


def test_is_weights_and_correction_multiply() -> None:
    b = batch("padded")
    c = Correction("token", high=1.2)
    own = ppo_fast.rollout_weights(b.old, b.rollout, b.mask, correction=c, backend="cpu").weights
    other = torch.full((5, 1), 0.5, dtype=torch.float64)
    both, grad = called(b, c, "token-mean", "cpu", is_weights=other)
    new = b.logprobs.clone().requires_grad_()
    loss, _ = ppo_fast.ppo_loss(
        new,
        b.old,
        b.advantages,
        b.mask,
        is_weights=0.5 * own,
        ref_logprobs=b.ref,
        kl_coef=0.1,
        entropy=b.entropy,
        entropy_coef=0.02,
        backend="cpu",
    )
    loss.backward()
    torch.testing.assert_close(both.loss.detach(), loss.detach(), **CLOSE)
    torch.testing.assert_close(grad, new.grad, **CLOSE)


def test_micro_batches_add_up_with_a_given_denom() -> None:
    """count="all" and a global denominator: the parts' losses and statistics are the whole's."""
    b = batch("holes")
    c = Correction("token", high=1.2, reject={"token-k3": 0.05}, drops="all")
    denom = float(b.mask.sum())
    whole, grad = called(b, c, "token-mean", "cpu", denom=denom)
    parts = []
    for at in (slice(0, 2), slice(2, 5)):
        part = Batch(*(x[at] if isinstance(x, Tensor) else x for x in b))
        parts.append(called(part, c, "token-mean", "cpu", denom=denom))
    torch.testing.assert_close(sum(float(p.loss) for p, _ in parts), float(whole.loss))
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad, **CLOSE)
    merged = (parts[0][0].stats + parts[1][0].stats).compute()
    for name, value in whole.stats.compute().items():
        assert math.isclose(merged[name], value, rel_tol=1e-12) or value != value, name


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"correction": Correction("token", high=2.0)}, ValueError, "rollout_logprobs must be given"),
    ({"correction": "token"}, TypeError, "correction must be a ppo_fast.Correction, got str"),
    ({"variant": "sappo"}, ValueError, "variant must be one of clip, gspo, .*, got 'sappo'"),
    ({"variant": 3}, ValueError, "variant must be one of .*, got 3"),
    ({"ratio_level": "turn"}, ValueError, "ratio_level must be one of token, .*, got 'turn'"),
    (
        {"variant": "penalty", "ratio_level": "sequence"},
        ValueError,
        "ratio_level must be token with variant 'penalty', got 'sequence'",
    ),
    (
        {"variant": "gspo", "ratio_level": "sequence"},
        ValueError,
        "ratio_level must be token or sequence-token with variant 'gspo', got 'sequence'",
    ),
    ({"ratio_cap": 2.0}, ValueError, "ratio_cap must be None with variant 'clip', got 2.0"),
    (
        {"variant": "reinforce", "ratio_cap": 0.0},
        ValueError,
        "ratio_cap must be above 0, got 0.0",
    ),
    ({"variant": "sapo", "dual_clip": 3.0}, ValueError, "dual_clip must be None with variant"),
    (
        {"variant": ppo_fast.surrogates.sapo(), "ratio_cap": 2.0},
        ValueError,
        "ratio_cap must be None with variant Surrogate 'sapo', got 2.0",
    ),
    (
        {"variant": ppo_fast.Surrogate(lambda t: 1.0)},
        TypeError,
        "Surrogate '<lambda>': terms must be a tensor, got float",
    ),
    (
        {"variant": ppo_fast.Surrogate(lambda t: t.ratio[:1])},
        ValueError,
        r"Surrogate '<lambda>': terms must have shape \(R,\) = \(64,\), got \(1,\)",
    ),
    (
        {"variant": ppo_fast.Surrogate(lambda t: t.ratio.double())},
        TypeError,
        "Surrogate '<lambda>': terms must be torch.float32, got torch.float64",
    ),
    (
        {"variant": ppo_fast.Surrogate(lambda t: (t.ratio, t.ratio))},
        TypeError,
        "Surrogate '<lambda>': dropped must be torch.bool, got torch.float32",
    ),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("options", "kind", "text"), ERRORS, ids=lambda x: str(x)[:40])
def test_errors_name_the_argument_and_the_value(
    backend: str, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    x = torch.zeros(2, 3)
    if backend == "reference":
        text = text.replace(r"\(64,\)", r"\(6,\)")
    with pytest.raises(kind, match=text):
        ppo_fast.ppo_loss(x, x, x, backend=backend, **options)


def test_flat_tokens_need_their_sequences() -> None:
    x = torch.zeros(6)
    whole = Correction("sequence", high=2.0)
    for options in (
        {"rollout_logprobs": x, "correction": whole},
        {"ratio_level": "sequence"},
        {"variant": ppo_fast.surrogates.gmpo()},
    ):
        with pytest.raises(ValueError, match="cu_seqlens must be given for flat inputs"):
            ppo_fast.ppo_loss(x, x, x, **options)


def test_a_surrogate_is_a_function() -> None:
    with pytest.raises(TypeError, match="Surrogate: fn must be callable, got str"):
        ppo_fast.Surrogate("sapo")  # type: ignore[arg-type]
    for call, text in (
        (lambda: ppo_fast.surrogates.dppo("js", 0.1, 0.1), "kind must be tv or kl, got 'js'"),
        (lambda: ppo_fast.surrogates.sapo(0.0), "tau_pos must be a number above 0, got 0.0"),
        (lambda: ppo_fast.surrogates.dro("x"), "beta must be a number at least 0, got 'x'"),
        (lambda: ppo_fast.surrogates.vespo(k=2.0), "k must be two numbers, got 2.0"),
        (lambda: ppo_fast.surrogates.clip_cov(-1.0), "fraction must be a number at least 0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
