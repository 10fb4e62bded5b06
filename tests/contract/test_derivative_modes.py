"""Other ways to differentiate, and tensors made in inference mode: right, or an error by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import ppo_fast
from ppo_fast import Moments, testing
from ppo_fast.testing import Call, promoted, run
from ppo_fast.testing.calls import DIFFERENTIABLE

ADVANTAGES = ("gae", "rlhf_advantages", "whiten")
KERNEL_OPS = (*DIFFERENTIABLE, *ADVANTAGES)


def call_of(op: str, device: str = "cpu") -> Call:
    """A small call of an op, with gradients where it has them."""
    makers = testing.FACTORIES | testing.HEADS | testing.DIVERGENCES
    name = "head_extras" if op == "linear_ppo_loss" else "extras"
    options = {name: ("bias", "extra")} if op.startswith("linear") else {}
    return makers[op]((2, 3), device=device, **options)


def with_tangent(call: Call, name: str, op: Any) -> Any:
    """The op's result with one of its arguments dual, and the direction."""
    x = call.tensors[name].detach()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    with forward_ad.dual_level():
        out = op(call.replace(**{name: forward_ad.make_dual(x, direction)}))
        return forward_ad.unpack_dual(out).tangent, direction


@pytest.mark.case("X22")
@pytest.mark.parametrize(
    "op, name", [(o, n) for o, (names, _) in DIFFERENTIABLE.items() for n in names]
)
@pytest.mark.filterwarnings("ignore:.*slow PyTorch reference:RuntimeWarning")
def test_the_tangent_is_the_gradient_along_the_direction(op: str, name: str) -> None:
    """Unnamed, the backend is the reference; its tangent is fp64 and holds to fp64's rounding."""
    call = promoted(call_of(op))
    outputs = DIFFERENTIABLE[op][1]

    def total(dual: Call) -> Tensor:
        out = testing.output(
            getattr(ppo_fast, op)(**testing.arguments(dual.tensors | dual.options))
        )
        return sum((out[k] * dual.cotangents[k]).sum() for k in outputs)  # type: ignore[return-value]

    tangent, direction = with_tangent(call, name, total)
    slope = run(call, "reference")[f"grad_{name}"] * direction
    eps = torch.finfo(torch.float64).eps
    assert abs(tangent - slope.sum()) <= 1000 * eps * slope.abs().sum()
    assert slope.any()


@pytest.mark.case("X22")
@pytest.mark.parametrize("op, name", [(o, n[0]) for o, (n, _) in DIFFERENTIABLE.items()])
def test_a_kernel_refuses_a_tangent(kernel: str, device: str, op: str, name: str) -> None:
    def ask(dual: Call) -> Any:
        return getattr(ppo_fast, op)(
            **testing.arguments(dual.tensors | dual.options), backend=kernel
        )

    call = call_of(op, device)
    with pytest.raises(NotImplementedError, match=f"{op}: {name} must have no .*'{kernel}'"):
        with_tangent(call, name, ask)
    with ppo_fast.use_backend(kernel), pytest.raises(NotImplementedError, match=kernel):
        with_tangent(
            call,
            name,
            lambda dual: getattr(ppo_fast, op)(**testing.arguments(dual.tensors | dual.options)),
        )


CONSTANTS = {
    "divergence": "teacher_logits",
    "linear_divergence": "teacher_hidden",
    "ppo_loss": "advantages",
    "value_loss": "returns",
    "linear_ppo_loss": "old_logprobs",
    "logits_ppo_loss": "advantages",
    "gae": "values",
    "rlhf_advantages": "scores",
    "whiten": "x",
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op, name", CONSTANTS.items())
def test_what_has_no_derivative_refuses_a_tangent(op: str, name: str, backend: str) -> None:
    def ask(dual: Call) -> Any:
        return getattr(ppo_fast, op)(
            **testing.arguments(dual.tensors | dual.options), backend=backend
        )

    said = name.replace("teacher_hidden", "teacher.hidden")
    with pytest.raises(NotImplementedError, match=f"{op}: {said} must have no forward-mode"):
        with_tangent(call_of(op), name, ask)


def test_group_advantages_refuses_a_tangent() -> None:
    scores, groups = torch.arange(4.0), torch.tensor([0, 0, 1, 1])
    with pytest.raises(NotImplementedError, match="scores must have no forward-mode tangent"):
        torch.func.jvp(lambda x: ppo_fast.group_advantages(x, groups), (scores,), (scores,))


def test_moments_with_a_tangent_are_refused() -> None:
    x, values = torch.randn(2, 3), torch.tensor([6.0, 0.0, 5.0], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="moments must have no forward-mode tangent"):
        torch.func.jvp(
            lambda m: ppo_fast.whiten(x, moments=Moments(m)), (values,), (torch.ones(3).double(),)
        )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacrev])
def test_functional_transforms_raise(transform: Any) -> None:
    old, advantages = torch.randn(2, 3), torch.randn(2, 3)

    def loss(x: Tensor) -> Tensor:
        return ppo_fast.ppo_loss(x, old, advantages, backend="cpu").loss

    with pytest.raises(RuntimeError, match="setup_context"):
        transform(loss)(torch.randn(2, 3))


def test_the_jacobian_in_forward_mode() -> None:
    logits, tokens = torch.randn(2, 5, dtype=torch.float64), torch.tensor([1, 4])

    def logprobs(x: Tensor) -> Tensor:
        return ppo_fast.token_logprobs(x, tokens, backend="reference").logprobs

    want = torch.autograd.functional.jacobian(logprobs, logits)
    got = torch.func.jacfwd(logprobs)(logits)
    # A handful of roundings of numbers up to 1.
    assert (got - want).abs().max() <= 20 * torch.finfo(torch.float64).eps


def inference_copies(call: Call) -> Call:
    """The same call with every tensor that gets no gradient made in inference mode."""
    leaves = DIFFERENTIABLE.get(call.op, ((), ()))[0]
    with torch.inference_mode():
        made = {k: x if k in leaves else x.clone() for k, x in call.tensors.items()}
        options = {k: _copied(x) for k, x in call.options.items()}
    return call._replace(tensors=made, options=options)


def _copied(x: Any) -> Any:
    if isinstance(x, Moments):
        return Moments(x.values.clone())
    return x.clone() if isinstance(x, Tensor) else x


@pytest.mark.case("X23")
@pytest.mark.parametrize("op", KERNEL_OPS)
def test_constants_of_inference_mode(backend: str, device: str, op: str) -> None:
    if backend == "cuda" and op in testing.DIVERGENCES:
        pytest.skip("CUDA C++ has no divergence")
    call = call_of(op, device)
    constants = inference_copies(call)
    assert any(x.is_inference() for x in constants.tensors.values())
    got, want = run(constants, backend), run(call, backend)
    assert got.keys() == want.keys()
    assert all(testing.same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", ["ppo_loss", "logits_ppo_loss", "linear_ppo_loss"])
def test_coefficients_of_inference_mode(backend: str, device: str, op: str) -> None:
    call = call_of(op, device)
    with torch.inference_mode():
        coefficients = {
            name: torch.tensor(value, device=device)
            for name, value in {"kl_coef": 0.1, "entropy_coef": 0.01, "denom": 5.0}.items()
        }
    outside = {name: x.clone() for name, x in coefficients.items()}
    got, want = (run(call.option(**x), backend) for x in (coefficients, outside))
    assert all(testing.same_bits(got[k], want[k]) for k in want)


def test_a_bias_and_weights_of_inference_mode(kernel: str, device: str) -> None:
    """Frozen ones, as a rollout's engine hands them over."""
    call = call_of("linear_token_logprobs", device)
    with torch.inference_mode():
        frozen = {k: call.tensors[k].clone() for k in ("weight", "bias", "extra_b")}
    hidden = call.tensors["hidden"].detach().requires_grad_()
    grads = []
    for given in ({}, frozen):
        args = testing.arguments({**call.tensors, "hidden": hidden, **given, **call.options})
        out = ppo_fast.linear_token_logprobs(**args, backend=kernel)
        grads.append(torch.autograd.grad(out.logprobs.sum(), hidden)[0])
    assert testing.same_bits(*grads)


def changed_meanwhile(call: Call, name: str, kernel: str) -> tuple[Tensor, ...]:
    """The gradients of a call one of whose constants is overwritten before the backward."""
    changed = call.tensors[name].clone()
    args = call.replace(**{name: changed}).tensors
    names, outputs = DIFFERENTIABLE[call.op]
    leaves = [n for n in names if n in args]
    args |= {n: args[n].detach().requires_grad_() for n in leaves}
    out = getattr(ppo_fast, call.op)(**testing.arguments(args | call.options), backend=kernel)
    total = sum((x * call.cotangents[k]).sum() for k, x in zip(outputs, out, strict=True))
    changed.fill_(1)
    return torch.autograd.grad(total, [args[n] for n in leaves])


@pytest.mark.parametrize(
    "op, name",
    [
        ("token_logprobs", "tokens"),
        ("token_logprobs", "temperature"),
        ("linear_token_logprobs", "tokens"),
        ("linear_token_logprobs", "temperature"),
        ("linear_logprobs_at", "ids"),
        ("linear_logprobs_at", "temperature"),
    ],
)
def test_a_constant_that_the_backward_reads_again_is_watched(
    kernel: str, device: str, op: str, name: str
) -> None:
    options = {"ignored": False} if op == "linear_token_logprobs" else {}
    maker = {**testing.FACTORIES, **testing.HEADS}[op]
    call = maker((2, 3), mask=None, device=device, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed_meanwhile(call, name, kernel)


def test_rows_that_were_picked_are_the_heads_own() -> None:
    """Constants of the rows that remain are copies where some rows are left out."""
    call = testing.linear_call((2, 3), mask="row")
    want = run(call, "cpu")
    for name in ("tokens", "temperature"):
        got = changed_meanwhile(call, name, "cpu")
        names = [n for n in DIFFERENTIABLE[call.op][0] if n in call.tensors]
        assert all(
            testing.same_bits(g, want[f"grad_{n}"]) for g, n in zip(got, names, strict=True)
        )


@pytest.mark.parametrize("op", [o for o in DIFFERENTIABLE if o.endswith("loss")])
def test_a_gradient_changed_in_place_is_not_handed_out_again(
    kernel: str, device: str, op: str
) -> None:
    """With an incoming gradient of 1 on a CPU it is the one that was formed in the forward."""
    call = call_of(op, device).option(reduction="token-sum")
    names = [n for n in DIFFERENTIABLE[op][0] if n in call.tensors]
    leaves = {n: call.tensors[n].detach().requires_grad_() for n in names}
    given = testing.arguments(call.tensors | leaves | call.options)
    loss = getattr(ppo_fast, op)(**given, backend=kernel).loss
    first = torch.autograd.grad(loss, [*leaves.values()], retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.zero_()
    try:
        second = torch.autograd.grad(loss, [*leaves.values()])
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(testing.same_bits(a, b) for a, b in zip(second, want, strict=True))
