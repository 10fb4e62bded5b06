"""Threads, other processes, checkpointed activations, copies and exports: the same bits."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import usable
from torch.utils.checkpoint import checkpoint

import ppo_fast
from ppo_fast import testing
from ppo_fast.testing import Call, run, same_bits

ROOT = Path(__file__).parents[2]
OPS = {**testing.FACTORIES, **testing.HEADS}
DIFFERENTIABLE = [op for op in OPS if op in testing.calls.DIFFERENTIABLE]


def digest(backend: str) -> str:
    """Of every output and gradient of every op on one set of numbers."""
    out = hashlib.sha256()
    for factory in OPS.values():
        for name, x in sorted(run(factory((2, 5)), backend).items()):
            out.update(name.encode() + x.contiguous().numpy().tobytes())
    return out.hexdigest()


@pytest.mark.case("D6")
@pytest.mark.parametrize("backend_name", ["cpu", "cuda"])
def test_another_process_computes_the_same_bits(backend_name: str, tmp_path: Path) -> None:
    """Two new processes at once, with no code compiled before."""
    backend = usable(backend_name)
    if backend == "cuda" and torch.cuda.is_available():
        pytest.skip("the digest is of CPU tensors; the emulated GPU stands for the kernels' maths")
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/helpers', 'tests/contract'];"
        f"import conftest, test_trust_hosts; print(test_trust_hosts.digest({backend!r}))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0].strip() for process in running]
    assert said == [digest(backend)] * 2


@pytest.mark.case("I5")
@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_meet(op: str) -> None:
    """Eight threads with tensors of their own, a hundred calls each."""
    backend = usable("cpu")
    calls = [OPS[op]((3, 5), seed=seed) for seed in range(8)]
    wanted = [run(call, backend) for call in calls]

    def often(i: int) -> list[str]:
        wrong = []
        for _ in range(100):
            got = run(calls[i], backend)
            wrong += [name for name, x in wanted[i].items() if not same_bits(got[name], x)]
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(often, range(8))) == [[]] * 8


def total_of(call: Call, leaf: torch.Tensor, name: str, backend: str) -> torch.Tensor:
    """The output that the backward starts from, as a function of one leaf."""
    given = call.replace(**{name: leaf})
    out = testing.output(
        getattr(ppo_fast, call.op)(**given.tensors, **given.options, backend=backend)
    )
    return sum((out[k] * v).sum() for k, v in call.cotangents.items())


@pytest.mark.case("I10")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_checkpointed_activations(kernel: str, device: str, op: str, reentrant: bool) -> None:
    """A forward repeated in the backward gives the gradient of a forward done once."""
    if op in testing.HEADS and kernel == "triton" and device == "cpu":
        pytest.skip("a head takes minutes interpreted; its kernels are those of the other ops")
    call = OPS[op]((2, 3), device=device)
    name = testing.calls.DIFFERENTIABLE[op][0][0]
    grads = []
    for again in (False, True):
        leaf = call.tensors[name].clone().requires_grad_()
        run_it: Any = lambda x: total_of(call, x * 1, name, kernel)  # noqa: E731
        total = checkpoint(run_it, leaf, use_reentrant=reentrant) if again else run_it(leaf)
        grads.append(torch.autograd.grad(total, leaf)[0] if not again else backward(total, leaf))
    assert same_bits(*grads) and bool(grads[0].any())


def backward(total: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """The leaf's gradient; reentrant checkpoints refuse autograd.grad."""
    total.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.case("I11")
@pytest.mark.parametrize("op", OPS)
def test_results_survive_pickle_and_copies(op: str) -> None:
    """Every result tuple keeps its type and its bits."""
    call = OPS[op]((2, 3))
    result = getattr(ppo_fast, op)(**call.tensors, **call.options, backend=usable("cpu"))
    want = testing.output(result)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert type(other) is type(result)
        got = testing.output(other)
        assert all(same_bits(got[k], x) for k, x in want.items())


class Op(torch.nn.Module):
    """One call, of the tensors that are given by position."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.op, self.names, self.options = call.op, list(call.tensors), call.options

    def forward(self, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        given = dict(zip(self.names, tensors, strict=True))
        result = getattr(ppo_fast, self.op)(**given, **self.options, backend="cpu")
        return testing.output(result)


@pytest.mark.case("I11")
@pytest.mark.own_memory
@pytest.mark.parametrize("op", testing.FACTORIES)
def test_export(op: str) -> None:
    """An exported graph holds the op and gives its bits."""
    usable("cpu")
    call = testing.FACTORIES[op]((2, 5))._replace(cotangents={})
    args = tuple(call.tensors.values())
    program = torch.export.export(Op(call), args)
    got, want = program.module()(*args), run(call, "cpu")
    assert all(same_bits(got[k], x) for k, x in want.items())
    assert any("ppo_fast" in str(node.target) for node in program.graph.nodes)


class Scores(torch.utils.data.Dataset[torch.Tensor]):
    """Log-probabilities computed by the workers of a loader."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return run(testing.logprobs_call((2, 3), seed=i)._replace(cotangents={}), "cpu")[
            "logprobs"
        ]


@pytest.mark.case("I11")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader(start: str) -> None:
    """Workers forked after the ops have run here, and spawned ones."""
    usable("cpu")
    scores = Scores()
    here = torch.stack([scores[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(
        scores, batch_size=4, num_workers=2, multiprocessing_context=start
    )
    assert torch.equal(next(iter(loader)), here)


@pytest.mark.case("I11")
def test_importing_asks_no_gpu() -> None:
    """A process that initialises CUDA at import cannot be forked."""
    code = "import torch, ppo_fast; ppo_fast.backends(); print(torch.cuda.is_initialized())"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "False"
