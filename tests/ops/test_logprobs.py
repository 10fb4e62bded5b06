"""token_logprobs: accuracy, extreme logits, labels, temperatures, gradients."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast
from ppo_fast import testing

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
VOCABULARIES = (1, 2, 7, 31, 32, 33, 255, 1000, 4099)
INF = math.inf


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_within_budget(backend: str, device: str, dtype: torch.dtype, vocab: int) -> None:
    testing.assert_agrees(
        testing.logprobs_call((2, 3), vocab, dtype=dtype, device=device, seed=vocab), backend
    )


@pytest.mark.case("N10")
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_published_accuracy(backend: str, device: str, scale: float) -> None:
    """Within 1e-5 from fp32 logits and 2e-5 from bf16 ones, relative to max(1, |logprob|)."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-5)):
        call = testing.logprobs_call(
            (8,), 1021, dtype=dtype, device=device, scale=scale, temperature=1.0, mask=None
        )
        got = testing.run(call, backend)["logprobs"]
        want = testing.run(testing.promoted(call), "reference")["logprobs"]
        assert bool(((got - want).abs() <= bound * want.abs().clamp(min=1)).all())
        assert bool((got <= 0).all())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("size", [1e5, 5e8, 1e10, 1e20, 1e38])
def test_huge_logits(backend: str, device: str, size: float, temperature: float) -> None:
    """Equal ones are a uniform distribution; of others only the differences matter."""
    call = testing.logprobs_call(
        (3,), 5000, device=device, scale=3.0, temperature=temperature, mask=None
    )
    logits, tokens = call.tensors["logits"], torch.tensor([4000, 4999, 3007], device=device)
    equal = torch.full_like(logits, size)
    equal[1] = -size
    got = testing.run(call.replace(logits=equal, tokens=tokens), backend)
    log_v = math.log(5000)
    for x in (got["logprobs"], -got["entropy"]):
        assert bool(((x + log_v).abs() <= 8 * 2**-24 * log_v).all())
    part, none = logits.clone(), logits.clone()
    part[:, :3000], none[:, :3000] = -size, -math.inf
    part, none = (
        testing.run(call.replace(logits=x, tokens=tokens), backend) for x in (part, none)
    )
    assert all(testing.same_bits(part[k], none[k]) for k in ("logprobs", "entropy"))


@pytest.mark.parametrize("size", [1.0, 1000.0, 1e8])
def test_certain_rows(backend: str, device: str, size: float) -> None:
    """No log-probability is above 0 and no entropy below, however the maximum is rounded."""
    call = testing.logprobs_call((16,), 40, device=device, temperature=0.7, mask=None)
    logits, tokens = call.tensors["logits"], call.tensors["tokens"]
    top = size * (1 + torch.arange(16, device=device) / 7)
    logits = (logits - 400.0 - size).scatter(1, tokens[:, None], top[:, None])
    got = testing.run(call.replace(logits=logits), backend)
    # What the maximum's rounding leaves, half an ulp of it, goes through an exponential and a
    # logarithm, and beside them through a product and a quotient.
    bound = 2**-22 * (1 + 2**-24 * top / 0.7)
    for least in (-got["logprobs"], got["entropy"]):
        assert bool(((least >= 0) & (least <= bound)).all())


def test_fp64_is_the_reference(device: str, kernel: str) -> None:
    call = testing.logprobs_call(dtype=torch.float64, device=device, vocab=301)
    if kernel != "cpu":
        with pytest.raises(TypeError, match="float64"):
            testing.run(call, kernel)
        return
    testing.assert_agrees(call, kernel)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 2, 2)], ids=str)
def test_any_leading_shape(backend: str, device: str, shape: tuple[int, ...]) -> None:
    testing.assert_agrees(testing.logprobs_call(shape, 19, device=device, mask=None), backend)


def test_rows_that_overlap(backend: str, device: str) -> None:
    call = testing.logprobs_call((2, 1), 3, device=device, mask=None)
    logits = torch.linspace(-2, 2, 8, device=device).as_strided((2, 1, 3), (1, 1, 1))
    testing.assert_agrees(call._replace(tensors=call.tensors | {"logits": logits}), backend)


@pytest.mark.case("X8")
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(backend: str, device: str, shape: tuple[int, ...]) -> None:
    out = testing.run(testing.logprobs_call(shape, 5, device=device, mask=None), backend)
    assert out["logprobs"].shape == out["entropy"].shape == shape
    assert out["grad_logits"].shape == (*shape, 5)


@pytest.mark.case("N11")
def test_shift_invariance(backend: str, device: str) -> None:
    """x and x + 1000 differ by the rounding of the input, and stay finite and negative."""
    call = testing.logprobs_call((6,), 101, device=device, mask=None, temperature=1.0)
    moved = call.replace(logits=call.tensors["logits"] + 1000.0)
    a, b = (testing.run(c, backend)["logprobs"] for c in (call, moved))
    assert bool((b <= 0).all()) and bool(((a - b).abs() <= 2e-4).all())


@pytest.mark.case("N12")
def test_entropy_of_known_distributions(backend: str, device: str) -> None:
    """ln V for uniform rows, 0 for one-hot ones; a uniform row's entropy has no slope."""
    vocab = 333
    logits = torch.zeros(2, vocab, device=device)
    logits[1, 5] = 200.0
    tokens = torch.tensor([0, 5], device=device)
    leaf = logits.requires_grad_()
    out = ppo_fast.token_logprobs(leaf, tokens, backend=backend)
    assert math.isclose(float(out.entropy[0]), math.log(vocab), rel_tol=1e-6)
    assert abs(float(out.entropy[1])) <= 1e-6 and abs(float(out.logprobs[1])) <= 1e-6
    (grad,) = torch.autograd.grad(out.entropy.sum(), leaf)
    assert float(grad.abs().max()) <= 1e-6


@pytest.mark.case("X4")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_infinity_is_a_forbidden_token(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    """The row equals the row without those tokens; no gradient flows to them."""
    call = testing.logprobs_call((2, 3), 40, dtype=dtype, device=device, mask=None)
    banned = torch.zeros(40, dtype=torch.bool, device=device)
    banned[::3] = True
    tokens = call.tensors["tokens"] // 3 * 3 + 1
    logits = call.tensors["logits"].masked_fill(banned, -INF)
    spoiled = call.replace(logits=logits, tokens=tokens)
    testing.assert_agrees(spoiled, backend)
    out = testing.run(spoiled, backend)
    assert bool(out["logprobs"].isfinite().all()) and bool(out["entropy"].isfinite().all())
    assert bool((out["grad_logits"][..., banned] == 0).all())


@pytest.mark.case("X5")
def test_label_at_minus_infinity(backend: str, device: str) -> None:
    """The log-probability is −inf and passes no gradient; the entropy's gradient is unchanged."""
    call = testing.logprobs_call((2,), 9, device=device, mask=None)
    logits = call.tensors["logits"].clone()
    logits[0, 4] = -INF
    call = call.replace(logits=logits, tokens=torch.tensor([4, 4], device=device))
    out = testing.run(call, backend)
    assert float(out["logprobs"][0]) == -INF and bool(out["logprobs"][1].isfinite())
    only = call._replace(
        cotangents={**call.cotangents, "entropy": torch.zeros_like(call.cotangents["entropy"])}
    )
    assert bool((testing.run(only, backend)["grad_logits"][0] == 0).all())
    testing.assert_agrees(call, backend)


@pytest.mark.case("X5", "X6")
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_a_bad_row_is_nan_and_alone(backend: str, device: str, poison: str) -> None:
    """The row that holds the bad logit is NaN, every other row keeps its bits."""
    call = testing.logprobs_call((4,), 70, device=device, mask=None)
    logits = call.tensors["logits"].clone()
    if poison == "all -inf":
        logits[2] = -INF
    else:
        logits[2, 65] = float(poison)
    clean, out = (testing.run(c, backend) for c in (call, call.replace(logits=logits)))
    for name, x in out.items():
        assert bool(x[2].isnan().all()), name
        assert testing.same_bits(x[[0, 1, 3]], clean[name][[0, 1, 3]]), name


@pytest.mark.case("X7")
@pytest.mark.parametrize("token", [-1, 11, -101, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_tokens_out_of_range_are_nan_rows(
    backend: str, device: str, dtype: torch.dtype, token: int
) -> None:
    """Nothing out of bounds is read, and the other rows do not change."""
    call = testing.logprobs_call((2, 3), 11, device=device, mask=None)
    tokens = call.tensors["tokens"].to(dtype)
    bad = tokens.clone()
    bad[1, 1] = token
    clean = testing.run(call.replace(tokens=tokens), backend)
    out = testing.run(call.replace(tokens=bad), backend)
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    for name, x in out.items():
        assert bool(x[1, 1].isnan().all()), name
        assert testing.same_bits(x[others], clean[name][others]), name


@pytest.mark.case("X7")
def test_tokens_beyond_int32(backend: str, device: str) -> None:
    call = testing.logprobs_call((3,), 11, device=device, mask=None)
    for token in (2**31, 2**40, -(2**40)):
        tokens = call.tensors["tokens"].clone()
        tokens[0] = token
        out = testing.run(call.replace(tokens=tokens), backend)
        assert bool(out["logprobs"][0].isnan()) and bool(out["logprobs"][1:].isfinite().all())


@pytest.mark.case("X7")
@pytest.mark.parametrize("ignore", [-100, 3, 2**40])
def test_ignored_tokens(backend: str, device: str, ignore: int) -> None:
    """Zeros, an exactly zero gradient, and the logits there are never read."""
    call = testing.logprobs_call((3, 4), 11, device=device, mask=None, ignore_index=ignore)
    tokens = torch.where(call.tensors["tokens"] == ignore, 4, call.tensors["tokens"])
    tokens[0, 1] = tokens[2, 3] = ignore
    logits = call.tensors["logits"].clone()
    logits[0, 1], logits[2, 3] = float("nan"), INF
    call = call.replace(tokens=tokens, logits=logits)
    testing.assert_agrees(call, backend)
    out = testing.run(call, backend)
    assert all(bool((x[0, 1] == 0).all() and (x[2, 3] == 0).all()) for x in out.values())


@pytest.mark.parametrize("shape", [(1,), (3, 1), (4,), (3, 4)], ids=str)
def test_temperature_broadcasts(backend: str, device: str, shape: tuple[int, ...]) -> None:
    call = testing.logprobs_call((3, 4), 23, device=device, temperature=1.0)
    temperature = torch.rand(shape, device=device) + 0.5
    options = {k: v for k, v in call.options.items() if k != "temperature"}
    spread = call._replace(options=options)
    a = testing.run(spread.replace(temperature=temperature), backend)
    b = testing.run(spread.replace(temperature=temperature.expand(3, 4).contiguous()), backend)
    assert all(testing.same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_a_number_and_a_tensor_of_it_agree(backend: str, device: str, temperature: float) -> None:
    """A temperature that fp32 does not hold exactly: both round it once, before dividing."""
    call = testing.logprobs_call((3, 4), 23, device=device, temperature=temperature)
    testing.assert_agrees(call, "reference")
    filled = call._replace(options={}).replace(
        temperature=torch.full((3, 4), temperature, device=device)
    )
    a, b = testing.run(call, backend), testing.run(filled, backend)
    for name, x in a.items():
        assert torch.allclose(x, b[name], rtol=2e-6, atol=2e-6), name


@pytest.mark.parametrize("only", ["logprobs", "entropy"])
def test_one_gradient_alone(backend: str, device: str, only: str) -> None:
    """The other output's gradient is absent, which is the same as zero."""
    call = testing.logprobs_call((3, 4), 50, device=device)
    lone = call._replace(cotangents={only: call.cotangents[only]})
    zeroed = {k: v if k == only else torch.zeros_like(v) for k, v in call.cotangents.items()}
    a = testing.run(lone, backend)["grad_logits"]
    b = testing.run(call._replace(cotangents=zeroed), backend)["grad_logits"]
    assert testing.same_bits(a, b) and bool(a.any())


def test_zero_cotangent_rows_get_exact_zeros(backend: str, device: str) -> None:
    call = testing.logprobs_call((4,), 50, device=device, mask=None)
    grads = {
        k: v * torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
        for k, v in call.cotangents.items()
    }
    grad = testing.run(call._replace(cotangents=grads), backend)["grad_logits"]
    assert bool((grad[[1, 3]] == 0).all()) and bool(grad[0].any())


def test_inplace_backward(kernel: str, device: str) -> None:
    """The gradient lies over the logits; a second backward through them raises."""
    call = testing.logprobs_call((3, 4), 33, device=device)
    want = testing.run(call, kernel)["grad_logits"]
    base = call.tensors["logits"].clone().requires_grad_()
    logits = base * 1.0
    out = ppo_fast.token_logprobs(
        logits,
        **{k: v for k, v in call.tensors.items() if k != "logits"},
        inplace_backward=True,
        backend=kernel,
    )
    before = logits._version
    total = sum((x * call.cotangents[k]).sum() for k, x in out._asdict().items())
    total.backward(retain_graph=True)
    assert testing.same_bits(base.grad, want) and testing.same_bits(logits.detach(), want)
    assert logits._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_nothing_is_saved_without_grad(kernel: str, device: str) -> None:
    call = testing.logprobs_call((2, 3), 33, device=device)
    leaf = call.tensors["logits"].clone().requires_grad_()
    args = {k: v for k, v in call.tensors.items() if k != "logits"}
    with torch.no_grad():
        out = ppo_fast.token_logprobs(leaf, **args, backend=kernel)
    assert out.logprobs.grad_fn is None
    with_grad = ppo_fast.token_logprobs(leaf, **args, backend=kernel)
    assert testing.same_bits(out.logprobs, with_grad.logprobs.detach())


@pytest.mark.case("I8")
def test_autocast_changes_nothing(backend: str, device: str) -> None:
    """Results under autocast are fp32, with the same bits."""
    call = testing.logprobs_call((2, 3), 33, device=device, dtype=torch.bfloat16)
    plain = testing.run(call, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = testing.run(call, backend)
    assert cast["logprobs"].dtype == torch.float32
    assert all(testing.same_bits(plain[k], cast[k]) for k in plain)
