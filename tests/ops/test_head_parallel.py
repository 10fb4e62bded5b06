"""A vocabulary split over two and four gloo processes: the results of one, on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ppo_fast
from ppo_fast import _checks, testing
from ppo_fast._boundary.schema import VARIANTS
from ppo_fast.ops import head
from ppo_fast.teacher import KINDS
from ppo_fast.testing import (
    Call,
    linear_at_call,
    linear_call,
    linear_divergence_call,
    linear_ppo_call,
    logprobs_call,
    same_bits,
    token_divergence_call,
)

WORLD, VOCAB, SHARE = 2, 38, 19


class Layout(NamedTuple):
    """Rows of the weight on every rank; those from the vocabulary's end on are padding."""

    rows: tuple[int, ...]
    cases: tuple[str, ...] = ("",)  # parts of the names of those that run
    backend: str = "cpu"

    @property
    def kept(self) -> list[int]:
        """The rows that are no padding."""
        ends = itertools.accumulate(self.rows)
        return [max(0, min(n, VOCAB - (end - n))) for n, end in zip(self.rows, ends, strict=True)]


LAYOUTS = {
    "equal": Layout((SHARE, SHARE)),
    "unequal": Layout((25, 13), ("tall",)),
    "first empty": Layout((0, 38), ("tall", "edges")),
    "last empty": Layout((38, 0), ("tall", "-inf")),
    "padded": Layout((25, 20), ("tall", "out of")),
    "triton": Layout((25, 13), ("tall",), "triton"),
    "triton, last empty": Layout((38, 0), ("tall",), "triton"),
    "four": Layout((13, 7, 0, 18)),
    "four padded": Layout((13, 7, 23, 5), ("tall", "out of", "loss and")),
}
# The first and the last id of every share there.
EDGES = torch.tensor([0, 12, 13, 18, 19, 20, 24, 25, 37])
# The dimension that is the vocabulary.
SHARDED = {
    "weight": 0,
    "bias": 0,
    "extra_b": 0,
    "logits": -1,
    "teacher_weight": 0,
    "teacher_bias": 0,
}
# Logits of a chunk: 16 rows of the vocabulary, 48 of the second share of "four".
CHUNK = 16 * VOCAB
Results = dict[str, torch.Tensor]


def _forbidden(call: Call, classes: slice) -> Call:
    bias = call.tensors["bias"].clone()
    bias[classes] = -float("inf")
    return call.replace(bias=bias)


def _labelled(call: Call, tokens: torch.Tensor) -> Call:
    """The call with these labels first, of whatever rank."""
    every = call.tensors["tokens"].clone()
    every.view(-1)[: tokens.numel()] = tokens
    return call.replace(tokens=every)


def _certain() -> Call:
    """Labels on both ranks whose probability rounds to 1, at a temperature that rounds them."""
    call = logprobs_call((16,), VOCAB, temperature=0.7, mask=None)
    top = 100 * (1 + torch.arange(16) / 7)
    logits = call.tensors["logits"] - 400
    return call.replace(logits=logits.scatter(1, call.tensors["tokens"][:, None], top[:, None]))


def cases() -> dict[str, Call]:
    """The calls that run on one process and on two; fp32, in one chunk."""
    whole = {"vocab": VOCAB, "mask": None, "ignored": False}
    logprobs = linear_call((3, 5), **whole)
    edges = EDGES
    capped = {"softcap": 4.0, "extras": ("bias", "row_index"), "logit_scale": 0.7}
    out = {
        "plain": linear_call((3, 5), VOCAB, extras=(), temperature=0.7),
        "every option": linear_call((3, 5), VOCAB, **capped),
        "labels at the edges": _labelled(logprobs, edges),
        "labels at -inf": _forbidden(_labelled(logprobs, edges), slice(SHARE, None, 2)),
        "first share at -inf": _forbidden(_labelled(logprobs, edges), slice(0, SHARE)),
        "last share at -inf": _forbidden(_labelled(logprobs, edges), slice(SHARE, None)),
        "out of the vocabulary": _labelled(logprobs, torch.tensor([VOCAB, -1, 2**40]))._replace(
            cotangents={}
        ),
        "nothing kept": linear_ppo_call((3, 5), VOCAB, mask="empty"),
        "logits": logprobs_call((3, 5), VOCAB),
        "certain labels": _certain(),
        "logits at the edges": _labelled(logprobs_call((3, 5), VOCAB, mask=None), edges),
        "loss without gradient": linear_ppo_call((3, 5), VOCAB)._replace(cotangents={}),
        "loss of rows": linear_ppo_call(
            (3, 5), VOCAB, softcap=4.0, head_extras=("row_index",), reduction="seq-mean-token-mean"
        ),
    }
    for sparse in (True, False):
        name = f"support {'sparse' if sparse else 'dense'}"
        out[name] = linear_call((3, 5), VOCAB, kept=12, sparse=sparse, **capped)
        few = linear_call((3, 5), kept=2, sparse=sparse, **whole)
        out[f"{name}, labels at the edges"] = _labelled(few, edges)
        out[f"{name}, labels at -inf"] = _forbidden(_labelled(few, edges), slice(SHARE, None, 2))
        out[f"{name}, loss"] = linear_ppo_call((3, 5), VOCAB, kept=12, sparse=sparse)
    out["support, logits"] = logprobs_call((3, 5), VOCAB, kept=12)
    out |= at_ids() | taught() | tall() | adapted()
    return out | {f"loss {v}": linear_ppo_call((3, 5), VOCAB, variant=v) for v in VARIANTS}


def at_ids() -> dict[str, Call]:
    """Several ids a row: on both ranks, on one, twice, absent, forbidden, of nobody."""
    call = linear_at_call((3, 5), VOCAB, mask=None)
    ids = call.tensors["ids"].clone()
    ids.view(-1, 5)[:3] = torch.tensor(
        [[0, SHARE - 1, SHARE, VOCAB - 1, SHARE], [1, 2, 3, 3, -1], [30, 31, -1, -1, 31]]
    )
    call, wrong = call.replace(ids=ids), ids.clone()
    wrong[0, 0, 1], wrong[1, 2, 3] = VOCAB, 2**40
    capped = {"softcap": 4.0, "extras": ("bias", "row_index"), "mask": "row"}
    return {
        "ids": call,
        "ids, every option": linear_at_call((3, 5), VOCAB, **capped),
        "ids at -inf": _forbidden(call, slice(SHARE, None, 2)),
        "ids, first share at -inf": _forbidden(call, slice(0, SHARE)),
        "ids, last share at -inf": _forbidden(call, slice(SHARE, None)),
        "ids out of the vocabulary": call.replace(ids=wrong)._replace(cotangents={}),
        "no ids": linear_at_call((3, 5), VOCAB, k=0),
    }


def taught() -> dict[str, Call]:
    """Beside a teacher: every kind, both soft caps, labels that one rank alone holds."""
    out = {
        f"{kind} of tokens": token_divergence_call((3, 5), VOCAB, kind=kind, softcap=4.0)
        for kind in KINDS
    }
    teacher = {"softcap": 3.0, "logit_scale": 1.5, "temperature": "token"}
    out["divergence, rows"] = linear_divergence_call(
        (3, 5), VOCAB, kind="jsd", extras=("bias", "row_index"), teacher=teacher
    )
    for kind in KINDS:
        taught = {"kind": kind, "coef": 0.5}
        loss = linear_ppo_call((3, 5), VOCAB, teacher=taught, z_loss_coef=0.25, ignored=False)
        out[f"loss and {kind}"] = _labelled(loss, EDGES)
        coupled = linear_ppo_call((3, 5), VOCAB, teacher=taught, variant="gspo")
        out[f"gspo and {kind}"] = coupled
    barred = _forbidden(out["loss and forward"], slice(SHARE, None, 2))
    bias = barred.tensors["teacher_bias"].clone()
    bias[SHARE::2] = -float("inf")
    out["loss and forward, both at -inf"] = barred.replace(teacher_bias=bias)
    out["z-loss"] = linear_ppo_call((3, 5), VOCAB, z_loss_coef=0.25, entropy_coef=0.0)
    for sparse in (True, False):
        out[f"z-loss over a support, sparse {sparse}"] = linear_ppo_call(
            (3, 5), VOCAB, z_loss_coef=0.25, kept=12, sparse=sparse
        )
        for kind in ("jsd", "mixed"):
            taught = {"kind": kind, "coef": 0.5}
            out[f"{kind} over a support, sparse {sparse}"] = linear_ppo_call(
                (3, 5), VOCAB, teacher=taught, kept=12, sparse=sparse
            )
    return out


def adapted() -> dict[str, Call]:
    """With an adapter on the head, whose b is shared as the weight is and u whole."""
    extras = ("bias", "extra")
    out = {
        "extra": linear_call((3, 5), VOCAB, softcap=4.0, extras=(*extras, "row_index")),
        "extra at ids": linear_at_call((3, 5), VOCAB, extras=extras),
        "extra and a teacher": linear_divergence_call((3, 5), VOCAB, kind="jsd", extras=extras),
        "loss with extra": linear_ppo_call((3, 5), VOCAB, head_extras=extras),
        "gspo with extra": linear_ppo_call((3, 5), VOCAB, head_extras=extras, variant="gspo"),
    }
    for sparse in (True, False):
        out[f"extra over a support, sparse {sparse}"] = linear_call(
            (3, 5), VOCAB, kept=12, sparse=sparse, extras=extras, scale=1.0
        )
    return out


def tall() -> dict[str, Call]:
    """Of several chunks of the largest share: of its own, a rank would take fewer."""
    taught, adapter = {"kind": "jsd", "coef": 0.5}, ("bias", "extra")
    out = {
        "logprobs": linear_call((7, 10), VOCAB),
        "ids": linear_at_call((7, 10), VOCAB),
        "loss": linear_ppo_call((7, 10), VOCAB, softcap=4.0, logit_scale=0.7, z_loss_coef=0.25),
        "taught": linear_ppo_call((7, 10), VOCAB, teacher=taught, variant="gspo"),
        "divergence": linear_divergence_call((7, 10), VOCAB, kind="forward"),
        "sparse": linear_ppo_call((7, 10), VOCAB, kept=5, sparse=True),
        "dense": linear_ppo_call((7, 10), VOCAB, kept=5, sparse=False, teacher=taught),
        "logits": logprobs_call((7, 10), VOCAB),
        "adapted": linear_ppo_call((7, 10), VOCAB, head_extras=adapter, softcap=4.0),
        "adapted, sparse": linear_call((7, 10), VOCAB, kept=5, sparse=True, extras=adapter),
    }
    return {f"tall {name}": call for name, call in out.items()}


def share(call: Call, layout: Layout, rank: int) -> Call:
    """This rank's rows of weight, b and bias, NaN in the padding, or columns of the logits."""
    first, size = sum(layout.kept[:rank]), layout.kept[rank]
    out = {}
    for name, dim in SHARDED.items():
        if name in call.tensors:
            x = call.tensors[name].narrow(dim, first, size)
            if dim == 0:
                shape = (layout.rows[rank] - size, *x.shape[1:])
                x = torch.cat([x, x.new_full(shape, float("nan"))])
            out[name] = x.clone()
    padded = sum(layout.rows) > VOCAB and "weight" in call.tensors
    call = call.option(vocab_size=VOCAB) if padded else call
    return call.replace(**out).option(process_group=dist.group.WORLD)


def refused(call: Call, rows: int = SHARE, **options: Any) -> str:
    """The error's text of a call with shares of so many rows, of one without bias."""
    try:
        testing.run(
            call.replace(weight=call.tensors["weight"][:rows], bias=None)
            .option(process_group=dist.group.WORLD, **options)
            ._replace(cotangents={}),
            "cpu",
        )
    except (ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def errors(rank: int) -> list[str]:
    call = linear_call((3, 5), VOCAB, mask=None, ignored=False)
    sizes = [refused(call, vocab_size=20 + rank), refused(call, vocab_size=39), refused(call, 0)]
    _checks.DEBUG = True
    elsewhere = refused(_labelled(call, torch.tensor([0, VOCAB - 1])))
    outside = refused(_labelled(call, torch.tensor([0, VOCAB])))
    padding = refused(_labelled(call, torch.tensor([0, 37])), vocab_size=37)
    _checks.DEBUG = False
    return [*sizes, elsewhere, outside, padding]


def with_dtensors(call: Call, group: bool) -> Results:
    """Weight and bias as shards on a mesh; their gradients come back as whole tensors."""
    mesh = init_device_mesh("cpu", (WORLD,))
    leaves: dict[str, Any] = {
        k: distribute_tensor(call.tensors[k], mesh, [Shard(0)]).requires_grad_()
        for k in ("weight", "bias")
    }
    hidden = call.tensors["hidden"].clone().requires_grad_()
    options = call.options | ({"process_group": mesh.get_group()} if group else {})
    tensors = call.replace(hidden=hidden).tensors | leaves
    out = getattr(ppo_fast, call.op)(**tensors, **options, backend="cpu")
    out.loss.backward(call.cotangents["loss"])
    assert all(isinstance(leaf.grad, DTensor) for leaf in leaves.values())
    grads = {f"grad_{k}": leaf.grad.full_tensor() for k, leaf in leaves.items()}
    return testing.output(out) | grads | {"grad_hidden": hidden.grad}


def of_fsdp2(rank: int, world: int) -> tuple[Results, Results]:
    """Gradients of a head that FSDP2 has sharded, with tokens of each rank's own, and those of one
    process with all tokens. Of 9 rows the fourth of four ranks has none."""
    call = linear_ppo_call((world, 6), 9, mask=None, ignored=False, temperature=0.8)
    leaves = ("hidden", "weight", "bias")
    whole = testing.run(call.option(denom=6.0 * world), "cpu")
    model = torch.nn.Linear(24, 9)
    model.load_state_dict({k: call.tensors[k] for k in leaves[1:]})
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    own = {k: x[rank : rank + 1] for k, x in call.tensors.items() if k not in leaves[1:]}
    hidden = own["hidden"].clone().requires_grad_()
    tensors = own | {"hidden": hidden, "weight": model.weight, "bias": model.bias}
    # The gradients are averaged: each loss is divided by the tokens of one rank.
    options = call.options | {"denom": 6.0}
    loss = ppo_fast.linear_ppo_loss(**tensors, **options, backend="cpu").loss
    loss.backward(call.cotangents["loss"])
    grads: dict[str, Any] = {f"grad_{k}": getattr(model, k).grad for k in leaves[1:]}
    got = {k: x.full_tensor() for k, x in grads.items()}
    got["grad_hidden"] = hidden.grad / world
    whole["grad_hidden"] = whole["grad_hidden"][rank : rank + 1]
    return got, {k: whole[k] for k in got}


def worker(rank: int, folder: str, world: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # for ranks that wait for each other
    )
    torch.set_num_threads(1)
    head._LOGITS["cpu"] = CHUNK
    results = {
        (at, name): testing.run(share(call, LAYOUTS[at], rank), LAYOUTS[at].backend)
        for at, name, call in runs()
        if len(LAYOUTS[at].rows) == world
    }
    out: list[Any] = [results, of_fsdp2(rank, world)]
    if world == WORLD:
        call = linear_ppo_call((3, 5), VOCAB)
        tensors = {str(group): with_dtensors(call, group) for group in (False, True)}
        out.append({n: {k: v.detach() for k, v in x.items()} for n, x in tensors.items()})
        out.append(errors(rank))
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def runs() -> Iterator[tuple[str, str, Call]]:
    """Layout, case and call of every run."""
    every = cases()
    for at, layout in LAYOUTS.items():
        for name, call in every.items():
            if any(part in name for part in layout.cases):
                yield at, name, call


def findings(folder: Path, world: int) -> list[Any]:
    """Findings of each rank: by layout and case, of FSDP2; of two, of DTensors and errors."""
    mp.start_processes(worker, args=(str(folder), world), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two ranks' findings."""
    return findings(tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Those of four."""
    return findings(tmp_path_factory.mktemp("four"), 4)


def assert_close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """To 1e-6 of the largest number there (at least 1); the same rows NaN or infinite."""
    odd = ~want.isfinite()
    assert torch.equal(odd, ~got.isfinite()), name
    assert bool(((got == want) | (got.isnan() & want.isnan()))[odd].all()), name
    off, top = (x[~odd].abs().max() for x in (got - want, want)) if not odd.all() else (0.0, 0.0)
    assert off <= 1e-6 * max(1.0, float(top)), (name, off, top)


@pytest.mark.case("I9")
@pytest.mark.parametrize(("at", "case"), [run[:2] for run in runs()])
def test_processes_are_one(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, at: str, case: str
) -> None:
    """And within the budget of the fp64 reference; rows of padding have a gradient of 0."""
    layout, call = LAYOUTS[at], cases()[case]
    found = request.getfixturevalue("ranks" if len(layout.rows) == WORLD else "four")
    results = [rank[0][at, case] for rank in found]
    monkeypatch.setitem(head._LOGITS, "cpu", CHUNK)
    together = {}
    for name, x in testing.run(call, layout.backend).items():
        dim, parts = SHARDED.get(name.removeprefix("grad_")), [r[name] for r in results]
        if dim is None:
            assert all(same_bits(parts[0], part) for part in parts[1:]), name
            together[name] = parts[0]
        else:
            sizes = zip(layout.kept, layout.rows, parts, strict=True)
            split = [part.split([n, part.shape[dim] - n], dim) for n, _, part in sizes]
            assert all(bool((padding == 0).all()) for _, padding in split), name
            together[name] = torch.cat([part for part, _ in split], dim)
        if "tall" not in case:  # whose logits are too large for the bound
            assert_close(together[name], x, name)
    testing.assert_agrees(call, layout.backend, together)


@pytest.mark.parametrize("world", ["ranks", "four"])
def test_a_head_of_fsdp2(request: pytest.FixtureRequest, world: str) -> None:
    """Its gradient is the mean of the ranks', in uneven shards and in none."""
    for rank in request.getfixturevalue(world):
        got, want = rank[1]
        for name, x in want.items():
            assert_close(got[name], x, name)


@pytest.mark.parametrize("group", [False, True])
def test_distributed_tensors(ranks: list[Any], group: bool) -> None:
    """With a group the local shard, without one the whole tensor; gradients are sharded again."""
    want = testing.run(linear_ppo_call((3, 5), VOCAB), "cpu")
    for rank in ranks:
        got = rank[2][str(group)]
        assert got.keys() == want.keys()
        for name, x in want.items():
            assert_close(got[name], x, name)


def test_certain_labels(ranks: list[Any]) -> None:
    """No log-probability is above 0 and no entropy below, whatever the maximum's rounding."""
    for results, *_ in ranks:
        out = results["equal", "certain labels"]
        for least in (-out["logprobs"], out["entropy"]):
            assert bool(((least >= 0) & (least <= 2**-22)).all())


def test_bad_input_is_refused_on_every_rank(ranks: list[Any]) -> None:
    """Sizes that cannot be; with PPO_FAST_DEBUG a token of nobody's, but not another rank's."""
    op = "linear_token_logprobs"
    for *_, (differ, more, none, elsewhere, outside, padding) in ranks:
        assert differ == (
            f"ValueError: {op}: vocab_size must be the same on all ranks, got [20, 21]"
        )
        assert more == (
            f"ValueError: {op}: vocab_size must be in [1, 38] with a weight of 38 rows, got 39"
        )
        assert none == f"ValueError: {op}: weight must have a share on some rank, got [0, 0]"
        assert elsewhere == "nothing raised"
        assert outside.startswith(f"IndexError: {op}: tokens must be in [0, 38), got 38")
        assert padding.startswith(f"IndexError: {op}: tokens must be in [0, 37), got 37")
