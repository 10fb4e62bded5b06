"""Properties that only a GPU can show: captured graphs, parallel streams, bits over many runs, and
more than 2^31 logits. (That results are right is tested with every other backend's.)
"""

from __future__ import annotations

import pytest
import torch
from conftest import ON_GPU, usable

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
OPS = {**testing.FACTORIES, **testing.HEADS}
# The head's GEMM is cuBLAS's, and its chunks are cut on the host.
OURS = [op for op in OPS if not op.startswith("linear")]


@pytest.fixture(params=ON_GPU)
def backend_name(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """The names of the outputs whose bits differ."""
    return [name for name in a if not testing.same_bits(a[name], b[name])]


def other_values(call: Call) -> Call:
    """The same call on other numbers: what flags and indices say stays."""
    return call.replace(
        **{k: v.flip(0) for k, v in call.tensors.items() if v.is_floating_point() and v.dim()}
    )


@pytest.mark.case("D1")
@pytest.mark.parametrize("op", OPS)
def test_250_runs_give_the_same_bits(op: str, backend_name: str) -> None:
    call = OPS[op]((33, 65), device="cuda")
    want = testing.run(call, backend_name)
    for _ in range(250):
        assert not same(want, testing.run(call, backend_name))


@pytest.mark.case("I3")
@pytest.mark.parametrize("op", OURS)
def test_a_captured_graph_replays(op: str, backend_name: str) -> None:
    """Forward and backward in one graph; replayed on other numbers, also after launches outside of
    it, and captured while nothing has run on its stream before."""
    call = OPS[op]((9, 33), device="cuda")
    testing.run(call, backend_name)  # compiles, and makes what lives as long as the process
    graph, held = torch.cuda.CUDAGraph(), {k: v.clone() for k, v in call.tensors.items()}
    with torch.cuda.graph(graph):
        out = testing.run(call._replace(tensors=held), backend_name)
    for made in (call, other_values(call), call):
        want = testing.run(made, backend_name)
        for name, x in made.tensors.items():
            held[name].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert not same(want, out)


@pytest.mark.case("I4")
@pytest.mark.parametrize("op", OURS)
def test_streams_do_not_meet(op: str, backend_name: str) -> None:
    """Two streams at once: each has counters and workspace of its own."""
    calls = [OPS[op]((64, 257), device="cuda", seed=seed) for seed in (1, 2)]
    wanted = [testing.run(call, backend_name) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(testing.run(call, backend_name))
        torch.cuda.synchronize()
        assert not [name for a, b in zip(wanted, found, strict=True) for name in same(a, b)]


@pytest.mark.case("L1")
@pytest.mark.parametrize("op", ["token_logprobs", "logits_ppo_loss"])
def test_more_than_2_31_logits(op: str, backend_name: str) -> None:
    """The first and the last rows are those of a call on them alone, gradients in place too."""
    rows, vocab, ends = 14200, 151936, 3
    assert rows * vocab > 2**31
    small = OPS[op]((2 * ends,), vocab, dtype=torch.bfloat16, device="cuda", mask=None)
    if op == "logits_ppo_loss":
        small = small.option(reduction="token-sum")
    pick = torch.cat([torch.arange(ends), torch.arange(rows - ends, rows)]).cuda()
    wide = {}
    for name, x in small.tensors.items():
        wide[name] = x.new_zeros(rows, *x.shape[1:]) if x.dim() else x
        if x.dim():
            wide[name][pick] = x
    leaf = wide["logits"].requires_grad_()
    inplace = {"inplace": True} if op == "logits_ppo_loss" else {"inplace_backward": True}
    out = getattr(ppo_fast, op)(**wide, **small.options, **inplace, backend=backend_name)
    total = out.loss if op == "logits_ppo_loss" else out.logprobs.sum() + out.entropy.sum()
    grad = torch.autograd.grad(total, leaf)[0][pick]
    alone = small.tensors["logits"].clone().requires_grad_()
    tensors = {**small.tensors, "logits": alone}
    part = getattr(ppo_fast, op)(**tensors, **small.options, backend=backend_name)
    total = part.loss if op == "logits_ppo_loss" else part.logprobs.sum() + part.entropy.sum()
    assert testing.same_bits(out.logprobs[pick], part.logprobs)
    assert testing.same_bits(out.entropy[pick], part.entropy)
    assert testing.same_bits(grad, torch.autograd.grad(total, alone)[0])
