"""Surrogates: each against its formula spelled out in fp64, in the three losses; their bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from head_helpers import products, short_chunks
from token_batches import LAYOUTS, Batch, Formula, batch, flat, given, wanted
from torch import Tensor

import ppo_fast
from ppo_fast import Surrogate, TokenTerms, surrogates
from ppo_fast.testing import same_bits

# fp64 sums of a hundred terms of order 1, and a few exponentials: 1e-16 times some hundred.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def token(formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Formula:
    """The per-token terms of a formula of (logprobs, old, advantages)."""
    return lambda b, new: formula(new, flat(b, b.old), flat(b, b.advantages))


def sapo(new: Tensor, old: Tensor, adv: Tensor) -> Tensor:
    tau = torch.full_like(adv, 1.05)
    tau[adv > 0] = 1.0
    return -adv * 4 / tau / (1 + torch.exp(-tau * (torch.exp(new - old) - 1)))


def dppo_tv(new: Tensor, old: Tensor, adv: Tensor, low: float, high: float) -> Tensor:
    gap = new.detach().exp() - old.exp()
    keep = torch.where(adv > 0, gap <= high, gap >= -low)
    return -adv * (new - old).exp() * keep


def dppo_kl(new: Tensor, old: Tensor, adv: Tensor, bound: float, cap: float) -> Tensor:
    p, q = new.detach().exp(), old.exp()
    kl = q * (q / p).log() + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    keep = (kl <= bound) | torch.where(adv > 0, p <= q, p >= q)
    return -adv * (new - old).exp().detach().clamp(max=cap) * new * keep


def gmpo(b: Batch, new: Tensor) -> Tensor:
    """Zhao et al. 2025, eq. 4, in logarithms, one sequence after another."""
    d, adv, out = new - flat(b, b.old), flat(b, b.advantages), torch.zeros_like(new)
    for at in b.per_sequence():
        if at.numel():
            sign = adv[at].sign()
            held = sign * torch.minimum(sign * d[at], sign * d[at].clamp(-0.4, 0.4))
            out = out.index_put((at,), -adv[at].mean() * held.mean().exp())
    return out


def vespo(b: Batch, new: Tensor) -> Tensor:
    """arXiv 2602.10693: phi(W) = e^lam W^k e^(-lam W), (k, lam) = (2, 3) or (3, 2)."""
    d, adv, out = (new - flat(b, b.old)).detach(), flat(b, b.advantages), torch.zeros_like(new)
    for at in b.per_sequence():
        log_w = float(d[at].sum())
        for i in at.tolist():
            k, lam = (2.0, 3.0) if adv[i] >= 0 else (3.0, 2.0)
            phi = math.exp(lam + k * log_w - lam * math.exp(log_w))
            out = out.index_put((torch.tensor([i]),), -phi * adv[i] * new[i])
    return out


def covariance(b: Batch, new: Tensor) -> Tensor:
    keep, adv, now = b.mask.reshape(-1), flat(b, b.advantages), new.detach()
    return (adv - adv[keep].mean()) * (now - now[keep].mean())


def kl_cov(b: Batch, new: Tensor) -> Tensor:
    d, adv, keep = new - flat(b, b.old), flat(b, b.advantages), b.mask.reshape(-1)
    cov = torch.where(keep, covariance(b, new), -math.inf)
    chosen = cov.topk(max(1, int(0.1 * int(keep.sum())))).indices
    out = -adv * d.exp()
    return out.index_put((chosen,), out[chosen] + 0.1 * d[chosen].abs())


def clip_cov_all(b: Batch, new: Tensor) -> Tensor:
    """Every eligible token is chosen: fraction 1."""
    adv, ratio = flat(b, b.advantages), (new - flat(b, b.old)).exp()
    plain, bounded = -adv * ratio, -adv * ratio.clamp(0.8, 1.2)
    cov = covariance(b, new)
    gone = (bounded <= plain) & (cov > -0.2) & (cov < 0.3)
    return torch.where(gone, 0.0, torch.maximum(plain, bounded))


VARIANTS: dict[str, tuple[Any, dict[str, Any], Formula]] = {
    "sapo": ("sapo", {}, token(sapo)),
    "dppo-tv": (
        "dppo-tv",
        {"clip_low": 0.02, "clip_high": 0.03},
        token(lambda n, o, a: dppo_tv(n, o, a, 0.02, 0.03)),
    ),
    "dppo-kl": (
        surrogates.dppo("kl", 0.004, 0.004, 1.1),
        {},
        token(lambda n, o, a: dppo_kl(n, o, a, 0.004, 1.1)),
    ),
    "importance": ("reinforce", {}, token(lambda n, o, a: -a * (n - o).exp())),
    "reinforce": (
        "reinforce",
        {"ratio_cap": 1.2},
        token(lambda n, o, a: -a * (n - o).exp().detach().clamp(max=1.2) * n),
    ),
    "dro": (surrogates.dro(0.3), {}, token(lambda n, o, a: -(n * a - 0.15 * (n - o) ** 2))),
    "gmpo": (surrogates.gmpo(), {}, gmpo),
    "vespo": (surrogates.vespo(), {}, vespo),
    "kl-cov": (surrogates.kl_cov(0.1, 0.1), {}, kl_cov),
    "clip-cov": (surrogates.clip_cov(1.0, (-0.2, 0.3)), {}, clip_cov_all),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_value_and_gradient_are_the_formula(backend: str, name: str, layout: str) -> None:
    b = batch(layout)
    variant, options, formula = VARIANTS[name]
    want, want_grad = wanted(b, formula)
    new = b.logprobs.clone().requires_grad_()
    out = ppo_fast.ppo_loss(
        new, *given(b), variant=variant, cu_seqlens=b.cu_seqlens, backend=backend, **options
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), want, **CLOSE)
    torch.testing.assert_close(new.grad, want_grad, **CLOSE)


def test_every_named_and_built_surrogate_has_a_formula_here() -> None:
    from ppo_fast.ops.loss_options import NAMES

    assert set(NAMES) - {"clip", "gspo", "cispo", "penalty", "linear"} <= VARIANTS.keys()
    built = {n for n, x in vars(surrogates).items() if callable(x) and n.islower()}
    ours = {n for n in built if getattr(vars(surrogates)[n], "__module__", "").endswith("gates")}
    public = {n for n in ours if not n.startswith("_")}
    assert public == {
        *("sapo", "dppo", "reinforce", "dro", "gmpo", "vespo", "clip_cov", "kl_cov"),
        *("clip", "cispo"),
    }


def test_weights_inside_gmpo_and_vespo() -> None:
    """verl multiplies GMPO by the geometric mean of the weights; TRL adds their logarithms to
    VESPO's log-ratios."""
    b = batch("holes")
    weights = 0.5 + torch.rand(b.mask.shape, generator=torch.Generator().manual_seed(2)).double()
    w = torch.where(b.mask, weights, 1.0).reshape(-1)

    def scaled(b: Batch, new: Tensor) -> Tensor:
        out = gmpo(b, new)
        for at in b.per_sequence():
            if at.numel():
                out = out.index_put((at,), out[at] * w[at].log().mean().exp())
        return out

    def shifted(b: Batch, new: Tensor) -> Tensor:
        return vespo(b._replace(old=b.old - w.log().view(b.mask.shape)), new)

    for surrogate, formula in ((surrogates.gmpo(), scaled), (surrogates.vespo(), shifted)):
        want, want_grad = wanted(b, formula)
        new = b.logprobs.clone().requires_grad_()
        loss, _ = ppo_fast.ppo_loss(
            new, *given(b), variant=surrogate, is_weights=weights, backend="cpu"
        )
        loss.backward()
        torch.testing.assert_close(loss.detach(), want, **CLOSE)
        torch.testing.assert_close(new.grad, want_grad, **CLOSE)


def test_clip_cov_drops_a_seeded_few() -> None:
    b = batch("holes", t=200)
    n = int(b.mask.sum())
    dropped = {}
    for seed in (0, 1):
        variant = surrogates.clip_cov(0.05, (-9.0, 9.0), seed=torch.tensor(seed))
        new = b.logprobs.clone().requires_grad_()
        loss, stats = ppo_fast.ppo_loss(new, *given(b), variant=variant, backend="cpu")
        loss.backward()
        plain = b.logprobs.clone().requires_grad_()
        ppo_fast.ppo_loss(plain, *given(b), backend="cpu").loss.backward()
        dropped[seed] = (new.grad == 0) & (plain.grad != 0)
        assert int(dropped[seed].sum()) == int(0.05 * n) == round(stats.compute()["clip_frac"] * n)
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 2**62, 2**63 - 1, -5])
def test_seeds_of_clip_cov(seed: int) -> None:
    """A number chooses what a tensor of it does; their product by the hash's constant wraps."""
    b = batch("holes", t=200)
    found = []
    for given_seed in (seed, torch.tensor(seed)):
        variant = surrogates.clip_cov(0.05, (-9.0, 9.0), seed=given_seed)
        found.append(ppo_fast.ppo_loss(b.logprobs, *given(b), variant=variant, backend="cpu"))
    assert same_bits(found[0].loss, found[1].loss)


@pytest.mark.parametrize("seed", [0.5, True, None])
def test_seeds_that_are_none(seed: Any) -> None:
    with pytest.raises(TypeError, match=f"clip_cov: seed must be an int.*got {seed}"):
        surrogates.clip_cov(seed=seed)


def tanh_terms(t: TokenTerms) -> Tensor:
    """A user's own elementwise loss, of everything that it may read."""
    assert t.rollout_logprobs is not None and t.ref_logprobs is not None and t.entropy is not None
    own = torch.tanh(t.log_ratio) * t.advantages + t.entropy * t.rollout_logprobs
    return -own - 0.1 * t.logprobs * t.ref_logprobs + t.weights


def mean_terms(t: TokenTerms) -> tuple[Tensor, Tensor]:
    """A user's own coupled loss, which says what it drops."""
    assert t.sequences is not None and t.kl is not None
    mean = t.sequences.spread(t.sequences.mean(t.ratio))
    dropped = t.ratio > 1.3
    return torch.where(dropped, 0.0, -t.advantages * t.ratio * mean + t.kl), dropped


OWN = {
    "elementwise": Surrogate(tanh_terms),
    "couples": Surrogate(mean_terms, couples=True),
    "weighted": Surrogate(lambda t: -t.advantages * t.ratio * t.weights, weighted=True),
}


def cast(narrow: torch.dtype, dtype: torch.dtype, device: str, x: Tensor) -> Tensor:
    """The value that `narrow` holds."""
    return x.to(narrow).to(dtype).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OWN)
def test_kernels_agree_with_the_reference(
    kernel: str, device: str, name: str, layout: str
) -> None:
    """A user's surrogate with every other option, in fp32 and, where a kernel has it, in fp64.

    Each slope is a sum of some ten products of numbers of order 1, some through an exponential
    of |d| < 1.2; 64 roundings of 2**-24, times the largest slope, hold them.
    """
    wide = batch(layout)
    g = torch.Generator().manual_seed(3)
    weights = torch.rand(wide.mask.shape, generator=g, dtype=torch.float64)
    per_sequence = torch.rand(5, generator=g, dtype=torch.float64)
    dtypes = (torch.float32, torch.float64) if kernel == "cpu" else (torch.float32,)
    for dtype in dtypes:
        found = {}
        for backend, kind in (("reference", torch.float64), (kernel, dtype)):
            where = "cpu" if backend == "reference" else device
            to = partial(cast, dtype, kind, where)

            new = to(wide.logprobs).requires_grad_()
            entropy = to(wide.entropy).requires_grad_()
            cu = None if wide.cu_seqlens is None else wide.cu_seqlens.to(new.device)
            loss, stats = ppo_fast.ppo_loss(
                new,
                to(wide.old),
                to(wide.advantages),
                wide.mask.to(new.device),
                variant=OWN[name],
                entropy=entropy,
                entropy_coef=0.02,
                ref_logprobs=to(wide.ref),
                rollout_logprobs=to(wide.rollout),
                kl_coef=0.1,
                kl_weight="ratio",
                is_weights=to(weights),
                sequence_weights=to(per_sequence),
                reduction="seq-mean-token-mean",
                cu_seqlens=cu,
                backend=backend,
            )
            loss.backward()
            found[backend] = (loss.detach(), new.grad, entropy.grad, stats.values)
        eps = torch.finfo(dtype).eps
        for a, b in zip(found["reference"], found[kernel], strict=True):
            scale = float(a[a.isfinite()].abs().max())
            error = (b.cpu().double() - a.double())[a.isfinite()].abs().max()
            assert float(error) <= 32 * eps * max(scale, 1.0) * (1 if a.numel() != 32 else 100)


ELEMENTWISE = ["sapo", "dppo-tv", "dppo-kl", "importance", "reinforce", "dro"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_bits_do_not_depend_on_the_batch(name: str) -> None:
    """A row's value and slope alone, in any batch, padded or after a block's end."""
    variant, options, _ = VARIANTS[name]
    g = torch.Generator().manual_seed(0)
    n = 17000  # more than one block
    new, old, adv = (torch.randn(n, generator=g) for _ in range(3))
    old = new + 0.3 * old

    def slopes(at: slice) -> Tensor:
        leaf = new[at].clone().requires_grad_()
        loss = ppo_fast.ppo_loss(
            leaf,
            old[at],
            adv[at],
            variant=variant,
            reduction="token-sum",
            backend="cpu",
            **options,
        ).loss
        loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    whole = slopes(slice(0, n))
    for start, size in [(16380, 8), (100, 1001), *((7 * n, n) for n in range(1, 80))]:
        at = slice(start, start + size)
        assert same_bits(slopes(at), whole[at])


@pytest.mark.parametrize("op", ["linear", "logits"])
@pytest.mark.parametrize("name", [*VARIANTS, "couples"])
def test_heads_are_the_composition(monkeypatch: pytest.MonkeyPatch, name: str, op: str) -> None:
    """A head's loss with a surrogate is `ppo_loss` of its log-probabilities, in fp64; elementwise
    ones take three matrix products, coupled ones four."""
    short_chunks(monkeypatch)
    b = batch("holes")
    variant, options, _ = VARIANTS.get(name, (OWN["couples"], {}, None))
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(*b.mask.shape, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(19, 8, generator=g, dtype=torch.float64) * 0.3
    tokens = torch.randint(19, b.mask.shape, generator=g)
    scored = ppo_fast.linear_token_logprobs(hidden, weight, tokens, backend="cpu").logprobs
    old, ref = scored + b.old + 1.5, scored + b.ref + 1.5
    rest = {"variant": variant, "ref_logprobs": ref, "kl_coef": 0.1, "backend": "cpu", **options}
    found = []
    for fused in (True, False):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        rows = products(monkeypatch) if fused and op == "linear" else {}
        if not fused:
            both = ppo_fast.linear_token_logprobs(x, w, tokens, mask=b.mask, backend="cpu")
            out: Any = ppo_fast.ppo_loss(
                both.logprobs, old, b.advantages, b.mask, entropy=both.entropy, **rest
            )
        elif op == "linear":
            out = ppo_fast.linear_ppo_loss(x, w, tokens, old, b.advantages, b.mask, **rest)
        else:
            out = ppo_fast.logits_ppo_loss(x @ w.T, tokens, old, b.advantages, b.mask, **rest)
        out.loss.backward()
        if rows:
            kept = -(-int(b.mask.sum()) // 16) * 16
            couples = isinstance(variant, Surrogate) and variant.couples
            assert rows["logits_into"] == (2 if couples else 1) * kept
        found.append((out.loss.detach(), x.grad, w.grad, out.stats.values))
    for a, z in zip(*found, strict=True):
        torch.testing.assert_close(a, z, rtol=1e-11, atol=1e-12)


def test_the_terms_of_masked_slots() -> None:
    """0, a ratio of 1, and no slope; whitened advantages; None for what the call has not."""
    b, seen = batch("padded"), []

    def look(t: TokenTerms) -> Tensor:
        seen.append(t)
        return -t.advantages * t.ratio

    adv = torch.where(b.mask, b.advantages, 0.0)
    moments = ppo_fast.gae(adv, torch.zeros_like(adv), mask=b.mask, gamma=0.0, lam=0.0).moments
    new = b.logprobs.clone().requires_grad_()
    ppo_fast.ppo_loss(
        new, *given(b), variant=Surrogate(look), advantage_moments=moments, backend="cpu"
    ).loss.backward()
    (t,) = seen
    dead = ~t.mask
    assert t.mask.shape[0] % 64 == 0 and int(t.mask.sum()) == int(b.mask.sum())
    for x in (t.logprobs, t.log_ratio, t.old_logprobs, t.advantages, t.weights):
        assert not bool(torch.as_tensor(x.detach())[dead].any())
    assert bool((t.ratio.detach()[dead] == 1).all())
    kept = t.advantages[t.mask]
    assert abs(float(kept.mean())) < 1e-12 and abs(float(kept.var()) - 1) < 1e-6
    assert (t.rollout_logprobs, t.ref_logprobs, t.entropy, t.kl, t.sequences) == (None,) * 5
    assert new.grad is not None and not bool(new.grad[~b.mask].any())


def test_clip_fractions() -> None:
    """By what `fn` says it drops, or by slopes of exactly 0; below and above a ratio of 1."""
    b = batch("holes", t=200)
    bounds = {"clip_low": 0.1, "clip_high": 0.3, "backend": "cpu"}
    for kind, slow in ((surrogates.clip(0.1, 0.3), "clip"), (surrogates.cispo(0.1, 0.3), "cispo")):
        ours = ppo_fast.ppo_loss(b.logprobs, *given(b), variant=kind, **bounds).stats
        kernels = ppo_fast.ppo_loss(b.logprobs, *given(b), variant=slow, **bounds).stats
        assert float(kernels.field("clip_low")) != float(kernels.field("clip_high"))
        for name in ("clip_frac", "clip_frac_low", "clip_frac_high", "clip_frac_eps"):
            assert ours.compute()[name] == kernels.compute()[name] > 0, (slow, name)
    silent = Surrogate(lambda t: surrogates.clip(0.2, 0.2).fn(t)[0])
    said = ppo_fast.ppo_loss(b.logprobs, *given(b), variant=surrogates.clip()).stats.compute()
    found = ppo_fast.ppo_loss(b.logprobs, *given(b), variant=silent).stats.compute()
    assert found["clip_frac"] == said["clip_frac"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_token_that_is_dropped_is_counted(backend: str) -> None:
    """Also with an advantage or a weight of 0, as the trainers' clip fractions count them."""
    new = torch.tensor([[0.9, 0.9, 0.9, 0.5]]).log()
    old = torch.tensor([[0.5, 0.99, 0.5, 0.5]]).log()
    adv = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    weights = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    variant = surrogates.dppo("tv", low=0.05, high=0.1)
    for w in (None, weights):
        stats = ppo_fast.ppo_loss(
            new, old, adv, variant=variant, is_weights=w, backend=backend
        ).stats
        assert stats.compute()["clip_frac"] == 0.75
        assert stats.compute()["clip_frac_low"] == 0.25


def test_an_advantage_of_zero_beside_a_ratio_that_overflows() -> None:
    old = torch.tensor([[-200.0, -1.0]])
    new = torch.tensor([[0.0, -1.1]], requires_grad=True)
    adv = torch.tensor([[0.0, 1.0]])
    for variant in ("sapo", "reinforce", surrogates.clip(), surrogates.cispo()):
        loss, _ = ppo_fast.ppo_loss(new, old, adv, variant=variant, log_ratio_clamp=None)
        (grad,) = torch.autograd.grad(loss, new)
        assert bool(loss.isfinite()) and grad[0, 0] == 0 and bool(grad.isfinite().all())


@pytest.mark.parametrize(
    "variant",
    [
        *("clip", "sapo", "dppo-tv", "dppo-kl", "reinforce", "cispo", "gspo"),
        *(surrogates.dro(0.1), surrogates.gmpo(), surrogates.vespo()),
    ],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
@pytest.mark.parametrize("argument", ["logprobs", "old_logprobs"])
def test_a_nan_of_a_token_that_counts_is_seen(argument: str, variant: Any) -> None:
    """It is not taken for a token that a bound drops."""
    x = {
        "logprobs": torch.tensor([[-0.5, -1.0, -2.0]]),
        "old_logprobs": torch.tensor([[-0.6, -1.1, -2.1]]),
    }
    x[argument][0, 0] = math.nan
    loss, _ = ppo_fast.ppo_loss(**x, advantages=torch.ones(1, 3), variant=variant)
    assert bool(loss.isnan())
