"""`ppo_fast.compat`: drop-in functions, against the fp64 reference and the originals."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from installed import assert_near_whitened, functions, source
from torch import Tensor

import ppo_fast
from ppo_fast import Support, compat, testing
from ppo_fast.testing import Call, same_bits
from ppo_fast.testing.conditions import CONDITIONS
from ppo_fast.testing.loss_conditions import kl_term

FLOATS = (torch.float32, torch.bfloat16)
EPS64 = torch.finfo(torch.float64).eps
# verl's estimators, and what the reference calls them.
VERL_KL = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
KNOWN = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def call_of(backend: str, device: str, dtype: torch.dtype = torch.float32) -> Call:
    return testing.logprobs_call((3, 5), 37, dtype=dtype, device=device, temperature=0.7)


def alone(call: Call, output: str) -> Call:
    """The same call with a gradient to one output only."""
    other = {"logprobs": "entropy", "entropy": "logprobs"}[output]
    zero = torch.zeros_like(call.cotangents[other])
    return call._replace(cotangents={**call.cotangents, other: zero})


def gradient(leaf: Tensor, cotangents: dict[str, Tensor], **outputs: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(
        [*outputs.values()], leaf, [cotangents[name] for name in outputs]
    )
    return grad


def kl_gap(device: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities, ordinary gaps, gaps at which k3 is bounded, and an exp that overflows."""
    g = torch.Generator().manual_seed(3)
    logprob = -torch.rand(41, generator=g, dtype=torch.float64)
    gap = torch.cat(
        [torch.linspace(-2.0, 2.0, 33), torch.tensor([-900.0, -25, -12, -9, 9, 12, 25, 900])]
    )
    return logprob.to(device), (logprob - gap.double()).to(device)


def bound_of(name: str) -> float | None:
    """verl bounds k3 alone."""
    return 10.0 if name in ("k3", "low_var_kl") else None


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_selective_log_softmax_and_entropy(backend: str, device: str, dtype: torch.dtype) -> None:
    call = call_of(backend, device, dtype)
    leaf = call.tensors["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        logprobs, entropy = compat.selective_log_softmax_and_entropy(
            leaf, call.tensors["tokens"], temperature=0.7, row_mask=call.tensors["mask"]
        )
        grad = gradient(leaf, call.cotangents, logprobs=logprobs, entropy=entropy)
    testing.assert_agrees(
        call, backend, {"logprobs": logprobs, "entropy": entropy, "grad_logits": grad}
    )


@pytest.fixture(params=("reference", "cpu", "triton"))
def kept_on(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A backend that has a support, and its device."""
    from conftest import usable

    backend = usable(request.param)
    on_gpu = backend != "cpu" and torch.cuda.is_available()
    return backend, "cuda" if on_gpu else "cpu"


def test_functions_over_a_support(kept_on: tuple[str, str]) -> None:
    """Value and gradient of those that take one are the op's, which test_support.py holds."""
    backend, device = kept_on
    call = testing.logprobs_call((3, 5), 37, device=device, temperature=1.0, mask=None, kept=6)
    support, tokens = call.options["support"], call.tensors["tokens"]
    assert bool(support.missed(tokens).logical_not().any()) and support.n_whole
    results = []
    for function in _over_support(tokens, support):
        leaf = call.tensors["logits"].clone().requires_grad_()
        with ppo_fast.use_backend(backend):
            logprobs, entropy = function(leaf)
        outputs = {
            k: x for k, x in (("logprobs", logprobs), ("entropy", entropy)) if x is not None
        }
        results.append((logprobs, entropy, gradient(leaf, call.cotangents, **outputs)))
    (_, _, both), (pair_a, pair_b, pair), *single = results
    assert same_bits(pair, both)
    assert same_bits(pair_a, results[0][0]) and same_bits(pair_b, results[0][1])
    testing.assert_agrees(
        call, backend, {"logprobs": pair_a, "entropy": pair_b, "grad_logits": pair}
    )
    for logprobs, _, grad in single:
        assert same_bits(logprobs, pair_a)
        testing.assert_agrees(
            alone(call, "logprobs"),
            backend,
            {"logprobs": logprobs, "entropy": pair_b, "grad_logits": grad},
        )


def _over_support(tokens: Tensor, support: Support) -> list[Callable[[Tensor], tuple[Any, Any]]]:
    """The op and the functions, of logits."""
    return [
        lambda z: ppo_fast.token_logprobs(z, tokens, support=support),
        lambda z: compat.selective_log_softmax_and_entropy(z, tokens, support=support),
        lambda z: (compat.selective_log_softmax(z, tokens, support=support), None),
        lambda z: (compat.logprobs_from_logits(z, tokens, support=support), None),
    ]


def test_entropy_over_the_kept_ids_alone(kept_on: tuple[str, str]) -> None:
    """No token is added: -Σ p ln p of each row's own ids, and of all where nothing is kept."""
    backend, device = kept_on
    ids = torch.tensor([[4, 9, 30], [-1, -1, -1], [7, -1, -1], [0, 1, 36]], device=device)
    x = testing.logprobs_call((4,), 37, device=device).tensors["logits"]
    with ppo_fast.use_backend(backend):
        got = compat.entropy_from_logits(x, support=ppo_fast.Support(ids))
        none = compat.entropy_from_logits(x[:2], support=ppo_fast.Support(ids[1:2].repeat(2, 1)))
    for row, kept, entropy in zip(x.double(), ids, got, strict=True):
        kept = kept[kept >= 0]
        logp = (row[kept] if len(kept) else row).log_softmax(-1)
        want = -(logp.exp() * logp).sum()
        # Some tens of roundings of numbers up to ln 37 and of logits up to 16.
        assert abs(entropy.double() - want) <= 64 * 16 * torch.finfo(torch.float32).eps
    assert float(got[2]) == 0.0 and same_bits(none[1], got[1])


def test_an_index_of_several_ids_is_refused_with_a_support() -> None:
    """Ids that the support does not keep would each have a softmax of their own."""
    z, index = torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"selective_log_softmax: index .*got \(2, 3\) beside"):
        compat.selective_log_softmax(z, index, support=ppo_fast.Support(index))
    with pytest.raises(
        ValueError, match="support must have a row for each of the 2 tokens, got 1"
    ):
        compat.entropy_from_logits(z, support=ppo_fast.Support(index[:1]))


def test_entropy_without_a_gradient(backend: str, device: str) -> None:
    x = call_of(backend, device).tensors
    leaf = x["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        pair = compat.selective_log_softmax_and_entropy(leaf, x["tokens"], False)
    assert [y.requires_grad for y in pair] == [True, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_selective_log_softmax(backend: str, device: str, dtype: torch.dtype) -> None:
    call = alone(call_of(backend, device, dtype), "logprobs")
    x, leaf = call.tensors, call.tensors["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        out = compat.selective_log_softmax(leaf, x["tokens"], 0.7, x["mask"])
        grad = gradient(leaf, call.cotangents, logprobs=out)
    actual = {**testing.run(call, backend), "logprobs": out, "grad_logits": grad}
    testing.assert_agrees(call, backend, actual)


def test_several_tokens_of_a_row(backend: str, device: str) -> None:
    """`(..., K)` is K calls of `(...)`, to the bit; their gradients add up."""
    x = call_of(backend, device).tensors
    g = torch.Generator().manual_seed(1)
    index = torch.randint(37, (3, 5, 4), generator=g).to(device)
    weight = torch.randn(index.shape, generator=g).to(device)
    leaf = x["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        together = compat.selective_log_softmax(leaf, index, 0.7, x["mask"])
        grad = gradient(leaf, {"out": weight}, out=together)
        grads = []
        for k in range(4):
            one = compat.selective_log_softmax(leaf, index[..., k], 0.7, x["mask"])
            assert testing.same_bits(one, together[..., k])
            grads.append(gradient(leaf, {"out": weight[..., k]}, out=one).double())
    terms = torch.stack(grads)
    testing.assert_within_budget(grad, terms.sum(0), condition=terms.abs().sum(0), ops=4)


def test_entropy_from_logits(backend: str, device: str) -> None:
    call = alone(call_of(backend, device).replace(mask=None), "entropy").option(temperature=1.0)
    leaf = call.tensors["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        out = compat.entropy_from_logits(leaf, chunk_size=2)
        grad = gradient(leaf, call.cotangents, entropy=out)
    actual = {**testing.run(call, backend), "entropy": out, "grad_logits": grad}
    testing.assert_agrees(call, backend, actual)


def test_logprobs_from_logits(backend: str, device: str) -> None:
    call = alone(call_of(backend, device).replace(mask=None), "logprobs").option(temperature=1.0)
    leaf = call.tensors["logits"].detach().requires_grad_()
    with ppo_fast.use_backend(backend):
        out = compat.logprobs_from_logits(leaf, call.tensors["tokens"])
        grad = gradient(leaf, call.cotangents, logprobs=out)
    actual = {**testing.run(call, backend), "logprobs": out, "grad_logits": grad}
    testing.assert_agrees(call, backend, actual)


def test_an_inplace_backward_writes_over_the_logits(kernel: str, device: str) -> None:
    x = call_of(kernel, device).tensors
    leaf = x["logits"].detach().requires_grad_()
    logits = leaf * 1.0
    with ppo_fast.use_backend(kernel):
        compat.logprobs_from_logits(logits, x["tokens"], inplace_backward=True).sum().backward()
    assert testing.same_bits(logits.detach(), leaf.grad)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_whiten(backend: str, device: str, shift_mean: bool) -> None:
    call = testing.whiten_call(device=device, shift_mean=shift_mean)
    with ppo_fast.use_backend(backend):
        out = compat.masked_whiten(*call.tensors.values(), shift_mean)
    testing.assert_agrees(call, backend, {"out": out})


def test_kl_penalty_spelled_out(device: str, backend: str) -> None:
    """Values in fp64 by the formulas; k2's gradient is d, and with a + everybody's is."""
    logprob, ref = kl_gap(device)
    d = logprob - ref
    k3 = (torch.expm1(-d) + d).clamp(max=10)
    want = {"k1": d, "k2": d * d / 2, "k3": k3, "abs": d.abs()}
    for name in VERL_KL:
        known, clamp = KNOWN.get(name, name), bound_of(name)
        condition, _ = kl_term(d, known, clamp)
        for full in (name, name + "+"):
            out, grad = kl_and_gradient(compat.kl_penalty, logprob, ref, full)
            testing.assert_within_budget(out, want[known], condition=condition, ops=8, name=full)
            if full != name:
                testing.assert_within_budget(grad, d, condition=d.abs(), ops=2, name=full)
            assert bool(grad.isfinite().all())


def trl(version: str) -> types.SimpleNamespace:
    tree = source(f"trl=={version}", "trainer/utils.py")
    names = ("selective_log_softmax", "entropy_from_logits")
    return functions(tree, *names, F=F, is_triton_available=lambda: False)


def assert_same_function(call: Call, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Both in fp64, each within the op's budget of the truth."""
    exact = testing.run(call, "reference")
    budgets = CONDITIONS[call.op](call, exact, EPS64)
    for name, want in theirs.items():
        ops, condition, _ = budgets[name]
        testing.assert_within_budget(ours[name], want, condition=condition, ops=2 * ops, name=name)


def test_beside_trl() -> None:
    """TRL's own functions, K tokens a row, a mask and a temperature."""
    call = testing.logprobs_call((3, 5, 2), 37, dtype=torch.float64, temperature=0.7, mask=None)
    logits, index = call.tensors["logits"][:, :, 0], call.tensors["tokens"]
    call = call.replace(logits=logits[:, :, None].expand(3, 5, 2, 37))
    theirs = trl("1.16.0")
    for mask in (None, torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.5):
        rows = None if mask is None else mask[..., None].expand(index.shape)
        assert_same_function(
            call if rows is None else call.replace(mask=rows),
            {"logprobs": theirs.selective_log_softmax(logits, index, 0.7, rows)},
            {"logprobs": compat.selective_log_softmax(logits, index, 0.7, mask)},
        )
    heated = logits / 0.7
    entropy = theirs.entropy_from_logits(heated, chunk_size=4)[..., None].expand(3, 5, 2)
    ours = compat.entropy_from_logits(heated, chunk_size=4)[..., None].expand(3, 5, 2)
    assert_same_function(call, {"entropy": entropy}, {"entropy": ours})


def test_beside_verl() -> None:
    """verl's own log-probabilities, entropy, whitening and KL estimates with their gradients."""
    tree = source("verl==0.9.1", "utils/torch_functional.py")
    names = ("logprobs_from_logits_v2", "entropy_from_logits", "masked_whiten")
    means = ("masked_sum", "masked_mean", "masked_var")
    theirs = functions(tree, *names, *means, F=F)
    call = testing.logprobs_call((3, 5), 37, dtype=torch.float64, temperature=1.0, mask=None)
    logits, tokens = call.tensors["logits"], call.tensors["tokens"]
    assert_same_function(
        call,
        {
            "logprobs": theirs.logprobs_from_logits_v2(logits, tokens),
            "entropy": theirs.entropy_from_logits(logits),
        },
        {
            "logprobs": compat.logprobs_from_logits(logits, tokens),
            "entropy": compat.entropy_from_logits(logits),
        },
    )
    white = testing.whiten_call(dtype=torch.float64)
    x, mask = white.tensors.values()
    raw, size = x[mask], float(x.abs().max())
    for shift in (True, False):
        # A boolean mask would give its correction of the variance in fp32.
        want = theirs.masked_whiten(x, mask.double(), shift)[mask]
        ours = compat.masked_whiten(x, mask, shift)[mask]
        # verl adds 1e-8 to the count under every mean.
        assert_near_whitened(ours, want, raw, size, 1, slack=1e-8 / len(raw))
    core = functions(
        source("verl==0.9.1", "trainer/ppo/core_algos.py"), "kl_penalty", "kl_penalty_forward"
    )
    logprob, ref = kl_gap("cpu")
    for name in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"):
        for full in (name, name + "+"):
            pair = [kl_and_gradient(f.kl_penalty, logprob, ref, full) for f in (core, compat)]
            assert_same_kl(
                pair, logprob - ref, full, 10.0 if name in ("k3", "low_var_kl") else None
            )


def test_beside_openrlhf() -> None:
    """OpenRLHF's estimates: every one bounded, with and without the unbiased gradient."""
    tree = source("openrlhf==0.11.2", "models/utils.py")
    theirs = functions(tree, "compute_approx_kl", KL_IS_WEIGHT_CLIP=10.0)
    # Its log-probabilities are rounded to fp32 first.
    logprob, ref = (x.float() for x in kl_gap("cpu"))
    old = logprob + torch.linspace(-4, 4, logprob.numel())
    for name in ("k1", "k2", "k3"):
        for unbiased, behind in ((False, None), (True, None), (True, old)):
            pair = [
                kl_and_gradient(f.compute_approx_kl, logprob, ref, behind, name, unbiased)
                for f in (theirs, compat)
            ]
            size = 1.0 if behind is None else 10.0
            assert_same_kl(pair, logprob - ref, name + "+" * unbiased, 10.0, size)


def kl_and_gradient(function: object, logprob: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    leaf = logprob.clone().requires_grad_()
    out = function(leaf, *args)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    return out.detach(), grad


def assert_same_kl(
    pair: list[tuple[Tensor, Tensor]], d: Tensor, name: str, clamp: float | None, size: float = 1.0
) -> None:
    base = name.removesuffix("+")
    known = KNOWN.get(base, base) + "+" * name.endswith("+")
    value, slope = kl_term(d.double(), known, clamp)
    (a, da), (b, db) = pair
    testing.assert_within_budget(b, a, condition=value, ops=16, name=name)
    testing.assert_within_budget(db, da, condition=size * slope, ops=16, name=f"{name} gradient")


def test_bad_input_names_the_argument_and_the_value() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"kl_penalty must be kl, .* got 'full'"):
        compat.kl_penalty(x, x, "full")
    with pytest.raises(ValueError, match=r"kl_estimator must be k1, k2 or k3, got 'abs'"):
        compat.compute_approx_kl(x, x, kl_estimator="abs")
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0"):
        compat.selective_log_softmax(torch.zeros(3, 4), x.long(), temperature=0.0)
    with pytest.raises(TypeError, match=r"tokens must be int32 or int64, got torch.float32"):
        compat.logprobs_from_logits(torch.zeros(3, 4), x)
    assert math.isnan(float(compat.kl_penalty(x[:1] * math.nan, x[:1], "k3")))
