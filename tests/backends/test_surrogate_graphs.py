"""Surrogates and corrections under torch.compile, and without a look at the device's values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from token_batches import batch
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_fast
from ppo_fast import Correction, Surrogate, surrogates
from ppo_fast.testing import same_bits

pytestmark = pytest.mark.own_memory


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CASES: dict[str, dict[str, Any]] = {
    "sapo": {"variant": "sapo"},
    "dppo": {"variant": surrogates.dppo("kl", 0.01, 0.01)},
    "own": {"variant": Surrogate(lambda t: -t.advantages * torch.tanh(t.ratio))},
    "sequence": {"ratio_level": "sequence"},
    "gmpo": {"variant": surrogates.gmpo()},
    "vespo": {"variant": surrogates.vespo()},
    "clip-cov": {"variant": surrogates.clip_cov(0.1, seed=torch.tensor(3))},
    "kl-cov": {"variant": surrogates.kl_cov(0.1)},
    "kl-weight": {"ratio_level": "sequence", "kl_weight": "ratio"},
    "truncated": {"correction": Correction("token", high=2.0)},
    "rejected": {
        "correction": Correction(
            "sequence", high=2.0, reject={"seq-mean-k1": 1.1}, drops="all", count="kept"
        ),
        "reduction": "seq-mean-token-mean",
    },
    "bypass": {
        "correction": Correction("token", high=2.0, ratio="current", reject={"token-k1": 1.5})
    },
}


def step(case: dict[str, Any], backend: str) -> Callable[[torch.Tensor], ppo_fast.Loss]:
    b = batch("holes", torch.float32)

    def loss(new: torch.Tensor) -> ppo_fast.Loss:
        return ppo_fast.ppo_loss(
            new,
            b.old,
            b.advantages,
            b.mask,
            ref_logprobs=b.ref,
            kl_coef=0.1,
            rollout_logprobs=b.rollout,
            backend=backend,
            **case,
        )

    return loss


@pytest.mark.parametrize("name", CASES)
def test_fullgraph(name: str) -> None:
    """One graph, forward and backward, with eager's bits."""
    function, found = step(CASES[name], "cpu"), []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        new = batch("holes", torch.float32).logprobs.requires_grad_()
        out = f(new)
        out.loss.backward()
        found.append((out.loss.detach(), out.stats.values, new.grad))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_a_logits_loss_compiles() -> None:
    b = batch("holes", torch.float32)
    logits = torch.randn(*b.mask.shape, 17, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(b.mask.numel()).view(b.mask.shape) % 17

    def loss(logits: torch.Tensor) -> ppo_fast.HeadLoss:
        return ppo_fast.logits_ppo_loss(
            logits, tokens, b.old, b.advantages, b.mask, variant="sapo", backend="cpu"
        )

    found = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        out = f(leaf)
        out.loss.backward()
        found.append((out.loss.detach(), leaf.grad))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


class NoHostReads(TorchDispatchMode):
    """Raises at an operation that waits for a value: on a GPU it would end a capture."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.READS), name
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_host_reads() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()
    with NoHostReads(), pytest.raises(AssertionError, match="nonzero"):
        torch.ones(2).nonzero()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_forward_reads_nothing_on_the_host(backend: str, name: str) -> None:
    """The operations around the kernels wait for no value: a CUDA graph can hold the call."""
    from conftest import usable

    function = step(CASES[name], usable(backend))
    new = batch("holes", torch.float32).logprobs.requires_grad_()
    want = function(new).loss
    with NoHostReads():
        out = function(new)
    assert same_bits(out.loss.detach(), want.detach())
