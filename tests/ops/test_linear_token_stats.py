"""linear_token_stats: accuracy, ties, infinite logits, rows that are no distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import spelled_out
import torch
from conftest import usable
from head_helpers import Allocations, products, shape_for, short_chunks
from installed import functions, source

import ppo_fast
from ppo_fast import TokenStats, testing
from ppo_fast.testing import Call, run, same_bits, token_stats_call


@pytest.fixture(params=("reference", "cpu", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """CUDA C++ does not have the op."""
    return usable(request.param)


@pytest.fixture(params=("cpu", "triton"))
def kernel(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"extras": (), "mask": None, "temperature": 1.0, "ignored": False},
    "every option": {
        "extras": ("bias", "row_index", "extra"),
        "softcap": 4.0,
        "mask": "row",
        "logit_scale": 0.4,
    },
    "scaled": {"extras": ("extra",), "logit_scale": 1.7, "mask": None},
    "odd vocabulary": {"vocab": 1009, "temperature": 0.7},
    "wide tiles": {"vocab": 9001, "width": 7, "mask": None},
    "several segments": {"vocab": 33001, "width": 3, "ignored": False},
    "one of each": {"vocab": 1, "width": 1},
    "certain": {"scale": 60.0},
    "cold": {"temperature": 0.01},
    "nothing kept": {"mask": "empty"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    short_chunks(monkeypatch, backend)
    call = token_stats_call(shape_for(backend, device), device=device, **options)
    testing.assert_agrees(call, backend)


def test_cuda_is_refused_by_name() -> None:
    usable("cuda")
    with pytest.raises(ValueError, match="must be one of reference, cpu, triton with these stat"):
        run(token_stats_call((2, 3)), "cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_precisions(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    short_chunks(monkeypatch, backend)
    shape = shape_for(backend, device)
    call = token_stats_call(shape, dtype=dtype, device=device, softcap=6.0)
    testing.assert_agrees(call, backend)
    types = {name: x.dtype for name, x in run(call, backend).items()}
    numbers = dict.fromkeys(set(TokenStats._fields) - {"is_top1"}, torch.float32)
    assert types == numbers | {"is_top1": torch.bool}


def test_fp64_is_the_reference(kernel: str, device: str) -> None:
    call = token_stats_call((5, 12), dtype=torch.float64, device=device, softcap=6.0)
    if kernel == "triton":
        with pytest.raises(TypeError, match="float64"):
            run(call, kernel)
        return
    testing.assert_agrees(call, kernel)


def test_the_reference_is_the_scalar_loop() -> None:
    call = token_stats_call((4,), 9, 3, mask=None, temperature=0.8, dtype=torch.float64)
    out, t = run(call, "reference"), call.tensors
    for i, token in enumerate(t["tokens"].tolist()):
        if token < 0:
            assert not any(bool(x[i]) for x in out.values())
            continue
        z = [
            (math.fsum(float(a * b) for a, b in zip(t["hidden"][i], w, strict=True)) + float(c))
            / 0.8
            for w, c in zip(t["weight"], t["bias"], strict=True)
        ]
        logp = spelled_out.log_softmax(z)
        want = {
            "logprobs": logp[token],
            "entropy": -math.fsum(math.exp(x) * x for x in logp),
            "lse": z[0] - logp[0],
            "log_sum_sq_probs": math.log(math.fsum(math.exp(2 * x) for x in logp)),
            "is_top1": z.index(max(z)) == token,
            "mean_logit": math.fsum(z) / len(z),
        }
        # Some hundred fp64 roundings of numbers up to 20.
        assert all(abs(float(out[k][i]) - x) <= 1e-12 for k, x in want.items()), (i, want)


def by_logits(rows: list[list[float]], tokens: list[int], **options: Any) -> Call:
    """The call whose logits are these rows, exactly: hidden states are unit vectors."""
    logits = torch.tensor(rows)
    tensors = {
        "hidden": torch.eye(len(rows)),
        "weight": torch.where(logits.isinf() | logits.isnan(), 0.0, logits).t().contiguous(),
        "tokens": torch.tensor(tokens),
    }
    return Call("linear_token_stats", tensors, options, {})


def banned(call: Call, column: int, value: float) -> Call:
    """The call with a bias of `value` at one column, 0 elsewhere."""
    vocab = call.tensors["weight"].shape[0]
    return call.replace(bias=torch.zeros(vocab).index_fill(0, torch.tensor(column), value))


@pytest.mark.parametrize("vocab", [5, 300, 3001, 33001])
def test_the_lowest_of_equal_ids_is_the_likeliest(backend: str, vocab: int) -> None:
    """Wherever the equal ones are: in one vector, block, step, segment, or in several."""
    places = sorted({p for p in (1, 4, 255, 256, 299, 1025, 3000, 32768, 33000) if p < vocab})
    rows = []
    for i in range(len(places)):
        row = torch.linspace(-2, 0, vocab)
        row[places[i:]] = 3.0
        rows.append(row)
    rows.append(torch.full((vocab,), -1.5))  # all equal
    for first, row in zip([*places, 0], rows, strict=True):
        tokens = [*places, 0]
        call = by_logits([row.tolist()] * len(tokens), tokens)
        assert run(call, backend)["is_top1"].tolist() == [x == first for x in tokens]


def test_temperature_and_cap_break_no_tie_and_make_none(backend: str) -> None:
    """Neighbours in fp32 whose quotients round to one number are still two logits."""
    x = torch.tensor(3.8)
    above = float(torch.nextafter(x, torch.tensor(INF)))
    call = by_logits([[0.0, 3.8, above, 3.8]] * 4, [0, 1, 2, 3], temperature=3.7)
    assert float(x / 3.7) == float(torch.tensor(above) / 3.7)
    assert run(call, backend)["is_top1"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("vocab", [9, 33000])
def test_a_banned_id(backend: str, vocab: int) -> None:
    """At -inf: the mean is -inf, the others are those of a vocabulary without it."""
    call = token_stats_call((2, 3), vocab, 4, mask=None, ignored=False, extras=())
    first = call.replace(tokens=call.tensors["tokens"].clamp(min=1))
    out = run(banned(first, 0, -INF), backend)
    rest = first.replace(weight=first.tensors["weight"][1:], tokens=first.tensors["tokens"] - 1)
    assert bool((out["mean_logit"] == -INF).all())
    testing.assert_agrees(rest, backend, out | {"mean_logit": run(rest, backend)["mean_logit"]})
    token = run(banned(first, 0, -INF).replace(tokens=first.tensors["tokens"] * 0), backend)
    assert bool((token["logprobs"] == -INF).all()) and not bool(token["is_top1"].any())


@pytest.mark.parametrize("vocab", [9, 33000])
def test_the_lowest_number_bans_too(backend: str, vocab: int) -> None:
    """Many logits of the dtype's minimum: their mean is a number, where their sum is none."""
    lowest = torch.finfo(torch.float32).min
    call = by_logits([[0.0] * vocab], [vocab - 1])
    out = run(call.replace(bias=torch.tensor([lowest] * (vocab - 2) + [1.0, 2.0])), backend)
    want = (vocab - 2) / vocab * lowest
    # V roundings of as large a sum.
    assert abs(float(out["mean_logit"]) / want - 1) <= vocab * torch.finfo(torch.float32).eps
    assert bool(out["is_top1"]) and abs(float(out["lse"]) - math.log(math.e + math.e**2)) < 1e-6
    alone = run(call.replace(bias=torch.full((vocab,), lowest)), backend)
    assert not bool(alone["is_top1"]) and abs(float(alone["entropy"]) - math.log(vocab)) < 1e-5


@pytest.mark.parametrize("bias", [math.nan, INF, -INF])
def test_rows_that_are_no_distribution(backend: str, bias: float) -> None:
    """NaN and False, but the mean is what the logits' sum gives."""
    call = by_logits([[1.0, 2.0, 3.0]] * 3, [0, 1, 2])
    given = torch.full((3,), -INF) if bias == -INF else torch.tensor([0.0, bias, 0.0])
    out = run(call.replace(bias=given), backend)
    for name in ("logprobs", "entropy", "lse", "log_sum_sq_probs"):
        assert bool(out[name].isnan().all()), name
    assert not bool(out["is_top1"].any())
    want = torch.full((3,), bias)
    assert same_bits(out["mean_logit"], want)


def test_tokens_outside_the_vocabulary(backend: str, device: str) -> None:
    call = token_stats_call((2, 3), device=device, mask=None, ignored=False)
    tokens = call.tensors["tokens"].clone()
    tokens.view(-1)[:4] = torch.tensor([37, -1, 2**40, -(2**40)])
    out, want = run(call.replace(tokens=tokens), backend), run(call, backend)
    for name, x in out.items():
        first, rest = x.view(-1).split([4, 2])
        assert bool((~first if name == "is_top1" else first.isnan()).all()), name
        assert same_bits(rest, want[name].view(-1)[4:]), name


def test_masked_and_ignored_rows(backend: str, device: str) -> None:
    """0 and False, whatever is there: NaN hidden states, tokens of no vocabulary."""
    call = token_stats_call((4, 5), device=device)
    dead = ~call.tensors["mask"] | (call.tensors["tokens"] == -100)
    assert bool((~call.tensors["mask"]).any()) and bool((call.tensors["tokens"] == -100).any())
    want = run(call, backend)
    masked = ~call.tensors["mask"]
    dirty = call.replace(
        hidden=call.tensors["hidden"].masked_fill(dead[..., None], math.nan),
        tokens=call.tensors["tokens"].masked_fill(masked, 2**40),
    )
    got = run(dirty, backend)
    for name, x in got.items():
        assert same_bits(x, want[name]) and not bool(x[dead].any()), name


def test_log_probabilities_and_entropies_are_those_of_the_other_op(
    kernel: str, device: str
) -> None:
    for vocab in (37, 5000, 33000):
        call = token_stats_call((2, 3), vocab, 4, device=device, softcap=5.0)
        got, want = run(call, kernel), run(call._replace(op="linear_token_logprobs"), kernel)
        assert all(same_bits(got[k], want[k]) for k in ("logprobs", "entropy"))


@pytest.mark.parametrize("vocab, width", [(37, 24), (1009, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_keep_their_bits(dtype: torch.dtype, vocab: int, width: int) -> None:
    """Whatever rows stand beside one, and however few."""
    call = token_stats_call((40, 1), vocab, width, mask="right", dtype=dtype, temperature=0.9)
    whole = run(call, "cpu")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for rows in (order, *(torch.arange(5, 5 + n) for n in (1, 2, 3, 5, 7, 17))):
        some = {k: call.tensors[k][rows] for k in ("hidden", "tokens", "mask")}
        got = run(call.replace(**some), "cpu")
        assert all(same_bits(got[k], whole[k][rows]) for k in whole), rows


def test_every_instruction_set(isa: str) -> None:
    """Vectors, blocks and segments that end anywhere; the other op's bits on each."""
    for vocab in (1, 7, 8, 17, 255, 257, 1009, 32769, 33025):
        call = token_stats_call((1, 4), vocab, 3, temperature=0.9, ignored=False)
        out = run(call, "cpu")
        testing.assert_agrees(call, "cpu", out)
        scored = run(call._replace(op="linear_token_logprobs"), "cpu")
        assert all(same_bits(out[k], scored[k]) for k in ("logprobs", "entropy")), isa


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(kernel: str, device: str, layout: str) -> None:
    view, dense = testing.with_layout(token_stats_call((2, 3), device=device), layout)
    a, b = run(view, kernel), run(dense, kernel)
    assert all(same_bits(a[k], b[k]) for k in b)


def test_padding_is_no_part_of_the_vocabulary(backend: str, device: str) -> None:
    """Rows from `vocab_size` on are not read; a token there is outside."""
    call = token_stats_call((2, 3), device=device, extras=("bias", "extra"), mask=None)
    padded = {k: call.tensors[k] for k in ("weight", "bias", "extra_b")}
    for name, x in padded.items():
        padded[name] = torch.cat([x, torch.full_like(x[:5], math.nan)])
    wide = call.replace(**padded).option(vocab_size=37)
    got, want = run(wide, backend), run(call, backend)
    assert all(same_bits(got[k], want[k]) for k in want)
    outside = run(wide.replace(tokens=torch.full_like(call.tensors["tokens"], 38)), backend)
    assert bool(outside["mean_logit"].isnan().all()) and not bool(outside["is_top1"].any())


def test_run_to_run(kernel: str, device: str) -> None:
    call = token_stats_call((2, 3), 33000, 4, device=device)
    want, got = run(call, kernel), run(call, kernel)
    assert all(same_bits(got[k], want[k]) for k in want)


def test_results_are_constants(backend: str, device: str) -> None:
    """Of arguments that require gradients; they are read, never written."""
    call = token_stats_call((2, 3), device=device)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    before = {k: (x.clone(), x._version) for k, x in call.replace(**leaves).tensors.items()}
    out = ppo_fast.linear_token_stats(
        **call.replace(**leaves).tensors, **call.options, backend=backend
    )
    want = run(call, backend)
    for name, x in out._asdict().items():
        assert not x.requires_grad and same_bits(x, want[name]), name
    for name, x in call.replace(**leaves).tensors.items():
        assert same_bits(x, before[name][0]) and x._version == before[name][1], name


def test_the_logits_never_exist_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One product of the rows that are kept, a chunk at a time."""
    short_chunks(monkeypatch)
    call, rows = token_stats_call((10, 12), 501, mask="right"), products(monkeypatch)
    seen = Allocations()
    with seen:
        run(call, "cpu")
    kept = int((call.tensors["mask"] & (call.tensors["tokens"] != -100)).sum())
    assert rows["logits_into"] == -(-kept // 16) * 16 > 16
    assert set(rows) == {"logits_into"} and seen.largest() <= 16 * 501


def test_probabilities_squared_are_those_of_verl(backend: str) -> None:
    """Its `sum_pi_squared` of the logits, which it can have without fused kernels alone."""
    name = "calculate_sum_pi_squared_from_logits"
    theirs = functions(source("verl==0.9.1", "utils/torch_functional.py"), name)
    call = token_stats_call((2, 3), mask=None, ignored=False, extras=(), temperature=1.0)
    t = {k: x.double() for k, x in call.tensors.items() if x.is_floating_point()}
    want = getattr(theirs, name)(t["hidden"] @ t["weight"].t())
    got = run(call, backend)["log_sum_sq_probs"]
    exact = run(testing.promoted(call), "reference")["log_sum_sq_probs"]
    # Both are fp64: a sum of 37 of numbers that are exponentials of numbers up to 2^5.
    assert bool((exact.exp() / want - 1).abs().max() <= 1e-12)
    testing.assert_agrees(call, backend, run(call, backend))
    assert got.shape == want.shape and bool((got <= 0).all())


def test_six_statistics_of_trl() -> None:
    """TRL's chunked head computes the same five, to our own budget of fp32."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="needs TRL 1.16")
    call = token_stats_call((3, 5), mask=None, ignored=False, temperature=0.8, softcap=5.0)
    t, o = call.tensors, call.options
    rows = chunked.ChunkedLogProbFunction.apply(
        *(t["hidden"].view(15, -1), t["weight"], t["bias"], t["tokens"].view(-1)),
        *(o["temperature"], 16, o["softcap"], 1.0),
    )
    names = ("logprobs", "entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    theirs = {name: x.view(3, 5) for name, x in zip(names, rows, strict=True)}
    testing.assert_agrees(call, "cpu", run(call, "cpu") | theirs)
    assert bool(theirs["is_top1"].any()) and not bool(theirs["is_top1"].all())
