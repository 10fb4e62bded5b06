"""Accuracy at the lengths, vocabularies and counts that trainers use, at published thresholds.

Each op's own file tests every branch on small inputs; here are the sizes, on the backends that
compute at speed where the tests run.
"""

from __future__ import annotations

import math

import pytest
import spelled_out
import torch
from conftest import ON_GPU, usable

import ppo_fast
from ppo_fast import testing

HALVES = (torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 7, 31, 32, 33, 32000, 50257, 128256, 151936, 262143, 262145)


@pytest.fixture(params=("cpu", *(pytest.param(x, marks=pytest.mark.gpu) for x in ON_GPU)))
def fast(request: pytest.FixtureRequest) -> str:
    """A backend that is neither interpreted nor emulated."""
    if request.param in ON_GPU and not torch.cuda.is_available():
        pytest.skip("there is no GPU, and an emulated one takes minutes at this size")
    return usable(request.param)


@pytest.fixture
def place(fast: str) -> str:
    return "cuda" if fast in ON_GPU else "cpu"


def recursion(call: testing.Call, dtype: torch.dtype) -> torch.Tensor:
    """The sequential loop in `dtype`, all rows at once, without masks or ends."""
    r, v = (call.tensors[k].cpu().to(dtype) for k in ("rewards", "values"))
    gamma = torch.tensor(call.options["gamma"], dtype=dtype)
    decay = torch.tensor(call.options["gamma"] * call.options["lam"], dtype=dtype)
    after = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
    delta = (r + gamma * after - v).unbind(1)
    out = [torch.zeros_like(delta[0])]
    for d in reversed(delta):
        out.append(torch.addcmul(d, decay, out[-1]))
    return torch.stack(out[:0:-1], 1)


@pytest.mark.case("L4", "N2")
@pytest.mark.long
@pytest.mark.parametrize("shape", [(16, 16384), (2, 131072), (1, 2**20)], ids=str)
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.96), (0.999, 0.99), (1.0, 1.0)])
def test_a_long_recurrence(
    fast: str, place: str, shape: tuple[int, int], gamma: float, lam: float
) -> None:
    """At most 5e-6 of the largest advantage, and twice the sequential loop's error."""
    call = testing.gae_call(shape, mask=None, extras=(), gamma=gamma, lam=lam, device=place)
    call = call.replace(rewards=call.tensors["rewards"] / 16)
    exact = recursion(call, torch.float64)
    top = float(exact.abs().max())
    sequential = float((recursion(call, torch.float32) - exact).abs().max())
    gap = float((testing.run(call, fast)["advantages"].cpu() - exact).abs().max())
    assert gap <= 5e-6 * top
    assert gap <= 2 * sequential + 4 * torch.finfo(torch.float32).eps * top


@pytest.mark.case("N4")
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_half_a_million_integers_are_exact(fast: str, place: str, gamma: float) -> None:
    """|x| ≤ 8 over 2^19 steps stays below 2^24, so fp32 holds every sum in any order."""
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randint(-8, 9, (2, 1, 2**19), generator=rng).float()
    options = {"gamma": gamma, "lam": 1.0, "backend": fast}
    out = ppo_fast.gae(rewards.to(place), values.to(place), **options)
    tail = rewards.double().flip(-1).cumsum(-1).flip(-1) if gamma else rewards.double()
    assert torch.equal(out.advantages.cpu().double(), tail - values)
    assert torch.equal(out.returns.cpu().double(), tail)


@pytest.mark.case("N3")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_inputs_cost_nothing_more(
    fast: str, place: str, dtype: torch.dtype
) -> None:
    """The recursion over rounded inputs is fp32: far inside 2^-8 of each advantage."""
    call = testing.gae_call((16, 1024), mask=None, extras=(), lam=0.95, dtype=dtype, device=place)
    exact = recursion(testing.promoted(call), torch.float64)
    got = testing.run(call, fast)["advantages"].cpu().double()
    assert bool(((got - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all())


@pytest.mark.case("N7")
def test_vtrace_stops_at_a_truncation_to_the_digit(backend: str, device: str) -> None:
    """Two trajectories of two steps, r = 1, V = 0.5, V' = 2 at the cut, γ = 0.5, ρ = c = ½.

    δ = ρ(r + γV' − V): ½(1 + 1 − ½) = 0.75 at the cut, ½(1 + ¼ − ½) = 0.375 before it, and
    vs − V = 0.375 + ½·½·0.75 = 0.5625. The policy's advantage ρ(r + γ vs' − V) takes vs' = 2 at
    the cut and 0.5 + 0.75 before it. The second trajectory is the first again.
    """
    half = torch.full((1, 4), 0.5, device=device)
    after = torch.tensor([[0.5, 2.0, 0.5, 2.0]], device=device)
    cut = torch.tensor([[0, 1, 0, 1]], dtype=torch.bool, device=device)
    out = ppo_fast.gae(
        torch.ones_like(half),
        half,
        gamma=0.5,
        lam=1.0,
        next_values=after,
        truncated=cut,
        rho=half,
        c=half,
        backend=backend,
    )
    assert out.advantages.tolist() == [[0.5625, 0.75] * 2]
    assert out.returns.tolist() == [[1.0625, 1.25] * 2]
    following = torch.where(cut, after, out.returns.roll(-1, 1))
    policy = half * (1.0 + 0.5 * following - half)
    assert policy.tolist() == [[0.5625, 0.75] * 2]


@pytest.mark.case("N8")
def test_flags_of_the_next_step_are_this_step_s(backend: str, device: str) -> None:
    """An episode's end written at its last step equals one at the next first step, shifted."""
    call = testing.gae_call((3, 12), mask=None, device=device)
    ends = call.tensors["terminated"]
    starts = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1)
    shifted = call.replace(terminated=starts[:, 1:])
    a, b = testing.run(call, backend), testing.run(shifted, backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)
    misused = testing.run(call.replace(terminated=starts[:, :-1]), backend)
    assert not testing.same_bits(a["advantages"], misused["advantages"])


def scores_of(
    vocab: int, rows: int, scale: float, dtype: torch.dtype, backend: str, device: str
) -> tuple[torch.Tensor, ...]:
    """(got, exact log-probability, got, exact entropy) of random rows."""
    call = testing.logprobs_call(
        (rows,),
        vocab,
        dtype=dtype,
        device=device,
        scale=scale,
        temperature=1.0,
        mask=None,
        seed=vocab,
    )._replace(cotangents={})
    got = testing.run(call, backend)
    log_p = call.tensors["logits"].double().log_softmax(-1)
    label = call.tensors["tokens"].long()[:, None]
    exact = log_p.gather(-1, label)[:, 0]
    return got["logprobs"], exact, got["entropy"], -(log_p.exp() * log_p).sum(-1)


def assert_scores(*of: object, bound: float) -> None:
    logprobs, exact, entropy, spread = scores_of(*of)  # type: ignore[arg-type]
    assert bool(((logprobs - exact).abs() <= bound * exact.abs().clamp(min=1)).all())
    assert bool((logprobs <= 0).all())
    assert bool(((entropy - spread).abs() <= 1e-5 * spread.clamp(min=1)).all())


@pytest.mark.case("N10", "N12")
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_vocabularies(fast: str, place: str, vocab: int, scale: float) -> None:
    """Within 1e-5 from fp32 logits and 2e-5 from bf16 ones, relative to max(1, |logprob|)."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-5)):
        assert_scores(vocab, 8, scale, dtype, fast, place, bound=bound)


@pytest.mark.case("N10")
@pytest.mark.long
@pytest.mark.parametrize("vocab", VOCABULARIES[-6:])
def test_vocabularies_over_512_rows(fast: str, place: str, vocab: int) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-5)):
        assert_scores(vocab, 512, 10.0, dtype, fast, place, bound=bound)


def surrogate(new: torch.Tensor, old: torch.Tensor, adv: torch.Tensor) -> torch.Tensor:
    """Of every token: the clipped objective with ε = 0.2 and a dual clip of 3, negated."""
    terms = []
    for n, o, a in zip(new.tolist(), old.tolist(), adv.tolist(), strict=True):
        term = spelled_out.policy_term("clip", n, math.exp(n - o), a, 0.2, 0.2)
        terms.append(min(term, -3.0 * a) if a < 0 else term)
    return torch.tensor(terms, dtype=torch.float64)


@pytest.mark.case("N13")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_losses_to_one_in_a_million(kernel: str, device: str, sign: float) -> None:
    """Ratios from 0.1 to 10, the loss of tokens one by one and of all of them.

    The ratio e^d of an fp32 d is off by |d| ulp of it before anything is computed; inputs are
    multiples of 2^-10, whose differences are exact.
    """
    steps = torch.arange(-2304, 2305, 288) / 1024
    new = -torch.ones_like(steps) * 3
    old, adv = new - steps, torch.full_like(steps, 1.5 * sign)
    exact = surrogate(new, old, adv)
    args = [x.to(device) for x in (new, old, adv)]
    options = {"dual_clip": 3.0, "reduction": "token-sum", "backend": kernel}
    whole = float(ppo_fast.ppo_loss(*args, **options).loss)
    assert whole == pytest.approx(float(exact.sum()), rel=1e-6)
    for i, want in enumerate(exact.tolist()):
        alone = ppo_fast.ppo_loss(*(x[i : i + 1] for x in args), **options).loss
        assert float(alone) == pytest.approx(want, rel=1e-6), float(steps[i])


@pytest.mark.case("N17")
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_from_minus_to_plus_thirty(kernel: str, device: str, estimator: str) -> None:
    """Within 1e-6 at every distance, near 0 too, and k3 never negative."""
    far = torch.arange(-30, 31, dtype=torch.float32)
    near = torch.tensor([2.0**-k for k in range(2, 24)])
    x = torch.cat([far, near, -near])
    zero = torch.zeros(1, x.numel(), device=device)
    out = ppo_fast.rlhf_advantages(
        zero[:, 0],
        x[None].to(device),
        zero,
        zero,
        torch.ones_like(zero),
        kl_coef=0.0,
        kl_estimator=estimator,
        kl_clamp=None,
        backend=kernel,
    )
    wide = x.double()
    exact = {
        "k1": wide,
        "k2": wide * wide / 2,
        "k3": torch.expm1(-wide) + wide,
        "abs": wide.abs(),
    }[estimator]
    # In fp64 the sum above still cancels near 0; its series does not.
    small = wide.abs() < 1e-3
    if estimator == "k3":
        exact = torch.where(small, wide**2 / 2 - wide**3 / 6 + wide**4 / 24, exact)
    got = out.kl[0].cpu().double()
    assert bool(((got - exact).abs() <= 1e-6 * exact.abs()).all())
    assert estimator != "k3" or bool((got >= 0).all())


@pytest.mark.case("N16")
@pytest.mark.parametrize("count", [2, 3, 1000, 10**6, pytest.param(10**7, marks=pytest.mark.long)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("eps_at", ["var", "std"])
def test_whitening_any_number(
    fast: str, place: str, count: int, unbiased: bool, eps_at: str
) -> None:
    """Around 10,000 with spread 1: mean and deviation within 1e-5, each value of fp64's."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) + 1e4
    options = {"unbiased": unbiased, "eps_at": eps_at}
    out = ppo_fast.whiten(x.to(place), **options, backend=fast).cpu().double()
    assert abs(float(out.mean())) <= 1e-5
    assert abs(float(out.std(correction=int(unbiased))) - 1) <= 1e-5
    wide = x.double()
    exact = (wide - wide.mean()) / wide.std(correction=int(unbiased))
    assert float((out - exact).abs().max()) <= 1e-5


@pytest.mark.case("N14")
@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_half_precision_gradients(kernel: str, device: str, op: str) -> None:
    """Against fp64, at most twice the error of the same formula in plain bf16, + 1e-5."""
    call = testing.FACTORIES[op]((6, 40), dtype=torch.bfloat16, device=device)
    call = call if op == "value_loss" else call.option(advantage_moments=None)
    exact, got = testing.run(testing.promoted(call), "reference"), testing.run(call, kernel)
    plain = plain_gradient(call)
    for name, want in exact.items():
        if name.startswith("grad_") and name in plain:
            eager = float((plain[name].double() - want).abs().max())
            assert float((got[name].double() - want).abs().max()) <= 2 * eager + 1e-5, name


def plain_gradient(call: testing.Call) -> dict[str, torch.Tensor]:
    """The usual lines of a trainer, all in the inputs' own precision, through autograd."""
    t, o = call.tensors, call.options
    keep, scale = t["mask"], float(call.cotangents["loss"])
    if call.op == "value_loss":
        leaf = t["values"].clone().requires_grad_()
        near = t["old_values"] + (leaf - t["old_values"]).clamp(-o["clip"], o["clip"])
        worse = torch.maximum((leaf - t["returns"]) ** 2, (near - t["returns"]) ** 2)
        total = scale * 0.5 * worse[keep].mean()
        return {"grad_values": torch.autograd.grad(total, leaf)[0]}
    leaf = t["logprobs"].clone().requires_grad_()
    ratio = (leaf - t["old_logprobs"]).clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - o["clip_low"], 1 + o["clip_high"])
    worse = torch.maximum(-t["advantages"] * ratio, -t["advantages"] * bounded)
    x = leaf - t["ref_logprobs"]
    kl = (torch.expm1(-x) + x).clamp(-10, 10)
    total = scale * (t["is_weights"] * worse + o["kl_coef"] * kl)[keep].mean()
    return {"grad_logprobs": torch.autograd.grad(total, leaf)[0]}
