"""torch.compile(fullgraph=True): every op, forward and backward, bitwise as eager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conftest import shape_of, usable

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call, run, same_bits

pytestmark = pytest.mark.own_memory


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_run(call: Call, kernel: str, compiler: str) -> dict[str, torch.Tensor]:
    """As testing.run, the op compiled; the backward runs through the compiled graph."""
    leaves, outputs = testing.calls.DIFFERENTIABLE.get(call.op, ((), ()))
    given = [k for k in leaves if k in call.tensors]
    tensors = {
        k: v.detach().requires_grad_(k in given) if k in given else v
        for k, v in call.tensors.items()
    }

    def f(tensors: dict[str, torch.Tensor]) -> object:
        given = testing.arguments(tensors | call.options)
        return getattr(ppo_fast, call.op)(**given, backend=kernel)

    result = torch.compile(f, fullgraph=True, backend=compiler)(tensors)
    out = testing.output(result)
    if given:
        used = [k for k in outputs if k in call.cotangents]
        grads = torch.autograd.grad(
            [out[k] for k in used], [tensors[k] for k in given], [call.cotangents[k] for k in used]
        )
        out |= {f"grad_{k}": g for k, g in zip(given, grads, strict=True)}
    return {k: v.detach() for k, v in out.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert same_bits(got[name], x), name


@pytest.mark.case("I2")
@pytest.mark.parametrize("op", testing.FACTORIES)
def test_fullgraph(kernel: str, device: str, op: str) -> None:
    """No graph break, a NamedTuple out, the same bits."""
    call = testing.FACTORIES[op](shape_of(op), device=device)
    assert_same(compiled_run(call, kernel, "aot_eager"), run(call, kernel))


@pytest.mark.case("I2")
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_fullgraph_with_a_support(name: str) -> None:
    call = testing.logprobs_call((2, 3), kept=5)
    assert_same(compiled_run(call, usable(name), "aot_eager"), run(call, name))


@pytest.mark.case("I2")
@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_fullgraph_with_a_teacher(name: str) -> None:
    call = testing.divergence_call((2, 3))
    assert_same(compiled_run(call, usable(name), "aot_eager"), run(call, name))


@pytest.mark.case("I2")
@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "gae"])
def test_dynamic_shapes(kernel: str, device: str, op: str) -> None:
    """Several shapes through one compiled function: at most one more graph than the first."""
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    function = torch.compile(getattr(ppo_fast, op), fullgraph=True, backend=counting)
    steps = (2, 3, 4, 8) if op == "token_logprobs" else (9, 11, 16, 32)
    for shape in zip((4, 5, 6, 7), steps, strict=True):
        call = testing.FACTORIES[op](shape, device=device)._replace(cotangents={})
        out = testing.output(function(**call.tensors, **call.options, backend=kernel))
        assert_same(out, run(call, kernel))
    assert len(graphs) <= 2


@pytest.mark.case("I2")
@pytest.mark.gpu
@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss"])
def test_inductor(op: str) -> None:
    backend = usable("triton" if torch.cuda.is_available() else "cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = testing.FACTORIES[op](shape_of(op), device=device)
    assert_same(compiled_run(call, backend, "inductor"), run(call, backend))


def test_a_training_step_compiles(kernel: str, device: str) -> None:
    """Logits to log-probs to both terms of the loss in one graph, statistics in the result."""
    head = testing.logprobs_call((3, 7), 19, device=device)
    loss = testing.ppo_call((3, 7), device=device, kl_coef=0.1)
    others = {k: v for k, v in loss.tensors.items() if k not in ("logprobs", "entropy", "mask")}

    def step(logits: torch.Tensor) -> ppo_fast.Loss:
        rest = {k: v for k, v in head.tensors.items() if k != "logits"}
        out = ppo_fast.token_logprobs(logits, **rest, backend=kernel)
        return ppo_fast.ppo_loss(
            out.logprobs,
            mask=rest["mask"],
            entropy=out.entropy,
            **others,
            **loss.options,
            backend=kernel,
        )

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logits = head.tensors["logits"].clone().requires_grad_()
        out = function(logits)
        out.loss.backward()
        results.append((out.loss.detach(), out.stats.values, logits.grad))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_use_backend_inside_a_graph(kernel: str, device: str) -> None:
    call = testing.gae_call((3, 8), device=device)

    def f(tensors: dict[str, torch.Tensor]) -> ppo_fast.Advantages:
        with ppo_fast.use_backend(kernel):
            return ppo_fast.gae(**tensors, **call.options)

    out = testing.output(torch.compile(f, fullgraph=True, backend="aot_eager")(call.tensors))
    assert_same(out, run(call, kernel))
