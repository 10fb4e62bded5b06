"""Bitwise: run to run, and per-row outputs whatever else is in the batch, padded or packed."""

from __future__ import annotations

import pytest
import torch
from conftest import shape_of

from ppo_fast import testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast.testing import Call, run, same_bits

ENDS = ("next_values", "terminated", "truncated")
ROWWISE: dict[str, tuple[str, dict[str, object]]] = {
    "logprobs": ("token_logprobs", {"vocab": 331}),
    "logprobs bf16": ("token_logprobs", {"vocab": 130, "dtype": torch.bfloat16}),
    **{f"ppo {v}": ("ppo_loss", {"variant": v, "reduction": "token-sum"}) for v in VARIANTS},
    "ppo row means": ("ppo_loss", {"reduction": "seq-mean-token-mean", "denom": 2.0}),
    "ppo weights": (
        "ppo_loss",
        {
            "reduction": "token-sum",
            "kl_weight": "ratio",
            "extras": ("ref_logprobs", "is_weights", "sequence_weights"),
        },
    ),
    "value": ("value_loss", {"reduction": "token-sum"}),
    "gae carry": ("gae", {"extras": ("bootstrap", "terminated", "rho", "c", "row_lam")}),
    "gae zero": ("gae", {"masked": "zero", "extras": ENDS}),
    "rlhf": ("rlhf_advantages", {}),
    "rlhf pad": ("rlhf_advantages", {"score_at": "first-pad"}),
}
PER_ROW = pytest.mark.parametrize("op, options", ROWWISE.values(), ids=ROWWISE.keys())
SEQUENCES = ("scores", "bootstrap")


def rowwise(out: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in out.items() if k not in ("loss", "stats", "moments")}


def make(op: str, device: str, shape: tuple[int, ...], **options: object) -> Call:
    if op == "token_logprobs":
        shape = (shape[0], 3)
    return testing.FACTORIES[op](shape, mask="right", device=device, **options)


@pytest.mark.case("D2")
@PER_ROW
def test_batch(kernel: str, device: str, op: str, options: dict[str, object]) -> None:
    """A row alone, in a batch, and in a shuffled larger batch has the same bits."""
    call = make(op, device, (9, 14), **options)
    whole = rowwise(run(call, kernel))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = rowwise(run(testing.with_rows(call, order), kernel))
    twice = rowwise(run(testing.with_rows(call, torch.cat([order, order])), kernel))
    alone = rowwise(run(testing.with_rows(call, torch.tensor([4], device=device)), kernel))
    for name, x in whole.items():
        assert same_bits(shuffled[name], x[order]), name
        assert same_bits(twice[name][9:], x[order]), name
        assert same_bits(alone[name][0], x[4]), name


def padded(call: Call, more: int) -> Call:
    """`more` masked slots of garbage after every row."""

    def wider(name: str, x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2:
            return x
        fill = float("nan") if x.is_floating_point() else int(name not in ("mask", "tokens"))
        tail = torch.full((x.shape[0], more, *x.shape[2:]), fill, dtype=x.dtype, device=x.device)
        return torch.cat([x, tail], 1)

    return call._replace(
        tensors={k: wider(k, v) for k, v in call.tensors.items()},
        cotangents={k: wider(k, v) for k, v in call.cotangents.items()},
    )


@pytest.mark.case("D3")
@PER_ROW
def test_padding(kernel: str, device: str, op: str, options: dict[str, object]) -> None:
    """More masked slots to the right change no bit."""
    call = make(op, device, (3, 30), **options)
    if options.get("score_at") == "first-pad":  # a full row has no slot to pad into
        call.tensors["mask"][:, -1] = False
    want = rowwise(run(call, kernel))
    for more in (1, 2, 5) if op == "token_logprobs" else (1, 2, 35, 100):
        got = rowwise(run(padded(call, more), kernel))
        for name, x in want.items():
            assert same_bits(got[name][:, : x.shape[1]], x), (more, name)
            assert not bool(got[name][:, x.shape[1] :].any()), (more, name)


def packed(call: Call, order: list[int]) -> tuple[Call, list[torch.Tensor]]:
    """The unmasked front of each row, one after the other, and each row's slots in (B, T)."""
    keep = call.tensors["mask"]
    lengths = keep.sum(-1).tolist()
    tensors = {}
    for name, x in call.tensors.items():
        if name == "mask":
            continue
        if x.dim() < 2:
            tensors[name] = x[order] if x.dim() else x
        else:
            tensors[name] = torch.cat([x[b, : lengths[b]] for b in order])
    ends = torch.tensor([lengths[b] for b in order]).cumsum(0)
    tensors["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(keep.device)
    if call.op == "rlhf_advantages":
        tensors["mask"] = torch.ones(int(ends[-1]), dtype=torch.bool, device=keep.device)
    slots = [torch.arange(lengths[b], device=keep.device) + b * keep.shape[1] for b in order]
    return call._replace(tensors=tensors), slots


@pytest.mark.case("D4")
@pytest.mark.parametrize(
    "op, options",
    [v for k, v in ROWWISE.items() if not k.startswith("logprobs") and k != "rlhf pad"],
    ids=[k for k in ROWWISE if not k.startswith("logprobs") and k != "rlhf pad"],
)
def test_packing(kernel: str, device: str, op: str, options: dict[str, object]) -> None:
    """Padded and packed sequences have the same bits, in any order."""
    call = make(op, device, (5, 33), **options)
    whole = rowwise(run(call, kernel))
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        flat, slots = packed(call, order)
        got = rowwise(run(flat, kernel))
        for name, x in whole.items():
            assert same_bits(got[name], x.flatten()[torch.cat(slots)]), (order, name)


@pytest.mark.case("D5")
def test_time_major(kernel: str, device: str) -> None:
    """At most 2 ulp from batch-major."""
    extras = ("bootstrap", "terminated", "rho", "c")
    call = testing.gae_call((6, 40), extras=extras, device=device)
    turned = call._replace(
        tensors={k: v.T.contiguous() for k, v in call.tensors.items() if k != "bootstrap"}
    ).replace(bootstrap=call.tensors["bootstrap"])
    a, b = run(call, kernel), run(turned.option(time_major=True), kernel)
    for name in ("advantages", "returns"):
        ulp = torch.finfo(torch.float32).eps * a[name].abs().clamp(
            min=torch.finfo(torch.float32).tiny
        )
        assert bool(((a[name] - b[name].T).abs() <= 2 * ulp).all()), name


@pytest.mark.case("D1")
@pytest.mark.parametrize("op", testing.FACTORIES)
def test_run_to_run(kernel: str, device: str, op: str) -> None:
    """The same bits every time, sums over rows too."""
    slow = kernel == "triton" and device == "cpu"
    shape = shape_of(op) if slow else (40, 60)
    call = testing.FACTORIES[op](shape, device=device)
    want = run(call, kernel)
    for _ in range(2 if slow else 20):
        got = run(call, kernel)
        assert all(same_bits(got[k], want[k]) for k in want)


@pytest.mark.parametrize("op", testing.FACTORIES)
def test_threads(op: str) -> None:
    """Any number of threads gives the same bits, sums over rows too."""
    from conftest import usable

    backend = usable("cpu")
    calls = [testing.FACTORIES[op]((37, 301))]
    if op in ("ppo_loss", "value_loss"):
        calls += [testing.FACTORIES[op]((37, 301), reduction=r) for r in REDUCTIONS]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append([run(call, backend) for call in calls])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(same_bits(a[k], b[k]) for k in a)


@pytest.mark.parametrize("op", ["token_logprobs", "ppo_loss", "value_loss"])
def test_grad_or_no_grad(kernel: str, device: str, op: str) -> None:
    """The outputs do not depend on whether a gradient is asked for."""
    call = testing.FACTORIES[op]((5, 9), device=device)
    a, b = run(call, kernel), run(call._replace(cotangents={}), kernel)
    assert all(same_bits(a[k], b[k]) for k in b)


def of_the_head(call: Call, rows: torch.Tensor) -> Call:
    """Some sequences of a head's call; weight and bias stay whole."""
    fixed = {k: call.tensors[k] for k in ("weight", "bias") if k in call.tensors}
    rest = {k: v for k, v in call.tensors.items() if k not in fixed}
    return testing.with_rows(call._replace(tensors=rest), rows).replace(**fixed)


@pytest.mark.case("D2")
@pytest.mark.parametrize("vocab, width", [(37, 24), (331, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", testing.HEADS)
def test_rows_of_the_head(op: str, dtype: torch.dtype, vocab: int, width: int) -> None:
    """A row keeps its bits whatever rows stand beside it, and so in whatever tile it falls."""
    wide = {} if op == "logits_ppo_loss" else {"width": width}
    given = {"reduction": "token-sum"} if op.endswith("loss") else {}
    call = testing.HEADS[op]((9, 7), vocab, mask="right", dtype=dtype, **wide, **given)
    names = ("logprobs", "entropy", "grad_logits", "grad_hidden")
    whole = run(call, "cpu")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.cat([order, order]), order[:4], order[2:3], order[5:7]):
        got = run(of_the_head(call, rows), "cpu")
        for name in names:
            assert name not in whole or same_bits(got[name], whole[name][rows]), (rows, name)


@pytest.mark.parametrize("vocab, width", [(37, 24), (1009, 130)])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_logprobs_at", "linear_ppo_loss"])
def test_few_rows_of_the_head(op: str, vocab: int, width: int) -> None:
    """GEMM libraries change a row's bits where there are 1, 2, 3, 5 or 7: tiles do not."""
    given = {"reduction": "token-sum"} if op.endswith("loss") else {}
    call = testing.HEADS[op]((40, 1), vocab, width, mask=None, **given)
    whole = run(call, "cpu")
    for count in (*range(1, 20), 33):
        rows = torch.arange(5, 5 + count)
        got = run(of_the_head(call, rows), "cpu")
        for name in ("logprobs", "entropy", "grad_hidden"):
            assert same_bits(got[name], whole[name][rows]), (count, name)


@pytest.mark.case("D1")
@pytest.mark.parametrize("op", testing.HEADS)
def test_the_head_run_to_run(kernel: str, device: str, op: str) -> None:
    slow = kernel == "triton" and device == "cpu"
    call = testing.HEADS[op]((2, 3) if slow else (10, 60), device=device)
    want = run(call, kernel)
    for _ in range(1 if slow else 5):
        got = run(call, kernel)
        assert all(same_bits(got[k], want[k]) for k in want)
