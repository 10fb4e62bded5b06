"""fp16 with a loss scale: gradients meet the scale before they are rounded."""

from __future__ import annotations

import pytest
import torch
from conftest import usable
from head_helpers import shape_for
from torch import Tensor

import ppo_fast
from ppo_fast import testing
from ppo_fast.ops import gemm
from ppo_fast.testing import Call, linear_ppo_call, logits_ppo_call

SCALE = 2.0**30  # over a divisor as large: every unscaled gradient is 0 in fp16
CALLS = {"logits": logits_ppo_call, "linear": linear_ppo_call}


@pytest.mark.case("X21")
@pytest.mark.parametrize("variant", ["clip", "gspo"])
@pytest.mark.parametrize("op", CALLS)
def test_within_budget(backend: str, device: str, op: str, variant: str) -> None:
    call: Call = CALLS[op](
        shape_for(backend, device),
        dtype=torch.float16,
        denom=SCALE,
        variant=variant,
        device=device,
    )
    scaled = {"loss": torch.tensor(SCALE, device=device)}
    testing.assert_agrees(call._replace(cotangents=scaled), backend)


@pytest.mark.case("X21")
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_products_of_16_bits_take_scaled_gradients(
    monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """On a GPU the logits' gradient is rounded to fp16 for its products: after the scale."""
    lost: list[float] = []  # share of the elements that fp16 has none of without the scale

    def narrow(dz: Tensor) -> Tensor:
        lost.append(float(((dz / SCALE).half() == 0).double().mean()))
        return dz.half().to(dz.dtype)

    hidden_gradient, add_weight_gradient = gemm.hidden_gradient, gemm.add_weight_gradient
    monkeypatch.setattr(gemm, "hidden_gradient", lambda dz, w: hidden_gradient(narrow(dz), w))
    monkeypatch.setattr(
        gemm,
        "add_weight_gradient",
        lambda total, dz, x, beta: add_weight_gradient(total, narrow(dz), x, beta),
    )
    backend, device = usable("cuda"), "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape_for(backend, device)
    options = {"dtype": torch.float16, "denom": SCALE, "device": device}
    call = linear_ppo_call(shape, variant=variant, **options)
    scaled = call._replace(cotangents={"loss": torch.tensor(SCALE, device=device)})
    testing.assert_agrees(scaled, backend)
    assert lost and min(lost) > 0.9


TOKENS, HIDDEN, VOCABULARY = 24, 16, 211


def plain_loss(z: Tensor, tokens: Tensor, advantages: Tensor, denom: float) -> Tensor:
    logprobs = z.to(torch.promote_types(z.dtype, torch.float32)).log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0]
    return -((own - own.detach()).exp() * advantages).sum() / denom


@pytest.mark.case("X21")
@pytest.mark.parametrize("op", ["logits_ppo_loss", "linear_ppo_loss"])
def test_autocast_and_grad_scaler(op: str) -> None:
    """The unscaled gradient is about as far from fp64 as that of plain PyTorch under the same."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    tokens, advantages = torch.randint(VOCABULARY, (TOKENS,)), torch.randn(TOKENS)
    denom = 2.0**26  # of all tokens that an optimiser step accumulates

    def gradients(fused: bool) -> list[Tensor]:
        x, w = (torch.nn.Parameter(t.clone()) for t in (hidden, weight))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        optimizer = torch.optim.SGD([x, w])
        with torch.autocast("cpu", dtype=torch.float16):
            if not fused:
                loss = plain_loss(torch.nn.functional.linear(x, w), tokens, advantages, denom)
            elif op == "linear_ppo_loss":
                loss = ppo_fast.linear_ppo_loss(x, w, tokens, None, advantages, denom=denom).loss
            else:
                z = torch.nn.functional.linear(x, w)
                loss = ppo_fast.logits_ppo_loss(z, tokens, None, advantages, denom=denom).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [p.grad.double() for p in (x, w)]

    halves = [t.half().double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(
        plain_loss(halves[0] @ halves[1].T, tokens, advantages.double(), denom), halves
    )
    for got, plain, want in zip(gradients(True), gradients(False), exact, strict=True):
        assert (got - want).norm() <= 2 * (plain - want).norm()
        assert (got == 0).sum() <= (plain == 0).sum()
