"""Tests of the benchmark's cases with two distributions: inputs, providers, gates, goals."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_rows import FACTS, lines_with, row

from benchmarks.harness import gate as module_of_gate
from benchmarks.harness import measure
from benchmarks.harness.gate import Gate
from benchmarks.ops import registry, teacher
from benchmarks.ops.case import BOTH, FORWARD, Case, Shape
from benchmarks.ops.linear_divergence import HEADS_BOTH
from benchmarks.ops.linear_ppo_loss import LINEAR_LOSS_BOTH, WITH_TEACHER
from benchmarks.ops.registry import cost, gradient_mb, make_call
from benchmarks.peers import Provider, providers_of
from benchmarks.peers.base import Bound
from benchmarks.report import pages, plots
from benchmarks.report.results import Results
from ppo_fast.testing import Call

_DIMS = (16, 330, 24)
_TINY = [
    *(Case("linear_divergence", BOTH, Shape(f"t-{kind}", _DIMS)) for kind in teacher.KINDS),
    *(
        Case(op, way, Shape(f"t-{kind}/2", _DIMS if op.startswith("linear") else _DIMS[:2]))
        for op in ("linear_token_divergence", "divergence")
        for kind in teacher.KINDS
        for way in (FORWARD, BOTH)
    ),
    Case("linear_ppo_loss", BOTH, Shape("t-taught", _DIMS)),
]
_HEADS, _TAUGHT = _TINY[0], _TINY[-1]


_PACKAGES = {"trl": "trl", "liger": "liger_kernel"}


def installed(name: str) -> bool:
    """True for a provider whose package is there, or that needs none."""
    return name not in _PACKAGES or importlib.util.find_spec(_PACKAGES[name]) is not None


def provider(case: Case, name: str) -> Provider:
    return next(p for p in providers_of(case) if p.name == name)


def results_of(case: Case, name: str) -> dict[str, torch.Tensor]:
    bound = provider(case, name).bind(case, make_call(case))
    return bound.named(bound.call())


def test_the_shape_s_last_word_is_the_kind() -> None:
    assert {teacher.kind_of(case) for case in HEADS_BOTH.values()} == set(teacher.KINDS)
    assert teacher.kind_of(replace(_HEADS, shape=HEADS_BOTH["jsd"].shape.part(2))) == "jsd"
    assert teacher.kind_of(Case("divergence", BOTH, Shape("free", (3, 5)))) == "reverse"
    assert teacher.kind_of(WITH_TEACHER) == "reverse"
    assert teacher.kind_of(LINEAR_LOSS_BOTH) is None
    assert teacher.kind_of(Case("token_logprobs", BOTH, Shape("t-jsd", (3, 5)))) is None


@pytest.mark.parametrize("case", _TINY, ids=lambda case: case.name)
def test_each_provider_passes_its_gate(case: Case) -> None:
    """All peers in their own arithmetic, on values and gradients; what is compiled, beside."""
    names = [p.name for p in providers_of(case) if p.name != "compile"]  # seconds each
    ours = ["ppo_fast-cpu", "ppo_fast-reference"]
    if case == _TAUGHT:
        ours.insert(1, "ppo_fast-cpu-apart")
    ceiling = {"divergence": "copy" if case.differentiates else "read"}.get(case.op, "gemms")
    peers = {"linear_divergence": ["trl", "liger"], "linear_token_divergence": ["trl"]}
    assert names == [*ours, "eager", ceiling, *peers.get(case.op, [])]
    names = [name for name in names if name != "liger" and installed(name)]  # compiled, too
    outcomes = measure.measure(case, names, time=False)
    assert {name: (x.status, x.detail) for name, x in outcomes.items()} == dict.fromkeys(
        names, ("ok", "")
    )


@pytest.mark.parametrize("case", [_TINY[2], _TAUGHT], ids=lambda case: case.name)
def test_what_is_compiled_passes_too(case: Case) -> None:
    every = [p.name for p in providers_of(case) if p.name in ("compile", "liger")]
    names = [name for name in every if installed(name)]
    outcomes = measure.measure(case, names, time=False)
    assert {name: x.status for name, x in outcomes.items()} == dict.fromkeys(names, "ok")


@pytest.mark.parametrize("name", ["eager", "trl"])
def test_a_peer_of_another_kind_is_red(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed(name):
        pytest.skip(f"needs {_PACKAGES[name]}")
    other = provider(_TINY[1], name)

    def wrong(case: Case, call: Call) -> Bound:
        return other.bind(case, call.option(teacher=call.options["teacher"] | {"kind": "forward"}))

    spoiled = replace(other, bind=wrong)
    monkeypatch.setattr(measure, "providers_of", lambda case: (spoiled,))
    outcome = measure.measure(_HEADS, [name], time=False)[name]
    assert outcome.status == "red" and "loss" in outcome.detail


def test_a_sample_of_the_rows_keeps_the_whole_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of sixteen rows of both heads' logits, which are divided by all rows."""
    monkeypatch.setattr(module_of_gate, "_SAMPLE", {"cpu": 2 * 5 * 330})
    gate, found = Gate(make_call(_HEADS)), results_of(_HEADS, "eager")
    gate.check(found, plain=True)
    for at, seen in ((0, True), (1, False), (15, True)):
        for name in ("divergence", "grad_hidden"):
            spoiled = found | {name: found[name].index_fill(0, torch.tensor(at), 1.0)}
            if seen:
                with pytest.raises(AssertionError, match=name):
                    gate.check(spoiled, plain=True)
            else:
                gate.check(spoiled, plain=True)


def test_a_teacher_is_some_steps_away() -> None:
    """Logits apart by 0.3 · √2 of their deviation of 3 in the heads, by 0.3 of it in logits: half
    the variance of that, 0.81 or 0.4 nats, is KL up to its third cumulant."""
    for op, least, most in (("linear_divergence", 0.4, 1.6), ("divergence", 0.2, 0.8)):
        dims = (64, 4096, 576) if op.startswith("linear") else (64, 4096)
        found = results_of(Case(op, BOTH, Shape("t-reverse", dims)), "eager")
        assert least < float(found["divergence"].mean()) < most


def test_the_floor_is_four_products() -> None:
    """Two of logits and two of gradients, and the softmaxes; six where logits are formed again."""
    rows, vocab, width = _DIMS
    product = 2 * rows * vocab * width
    heads, tokens = (
        Case(op, BOTH, Shape("t-jsd", _DIMS))
        for op in ("linear_divergence", "linear_token_divergence")
    )
    assert cost(heads).flops - cost(tokens).flops == -2 * product
    assert 4 * product < cost(heads).flops < 4 * product + 30 * rows * vocab
    assert cost(_TAUGHT).flops == cost(heads).flops
    plain = Case("linear_ppo_loss", BOTH, Shape("t", _DIMS))
    assert cost(_TAUGHT).bytes - cost(plain).bytes > (rows + vocab) * width * 4


def test_the_goals_are_those_of_the_project() -> None:
    """At most 1.2 times the four products, 1.5 times as fast as TRL and Liger, a sixth of the
    memory of materialised logits; gradients are in neither side's memory."""
    for case in HEADS_BOTH.values():
        found = {g.against: (g.must, g.faster, g.memory) for g in registry.GOALS if g.case == case}
        assert found == {
            "gemms": (1.2, False, False),
            "trl": (1.5, True, False),
            "liger": (1.5, True, False),
            "eager": (6, True, True),
        }
        assert gradient_mb(case) == (2048 + 49152) * 576 * 4 / 2**20


@pytest.mark.parametrize(("peak", "verdict"), [(275.0, "met"), (280.0, "SHORT")])
def test_the_page_judges_memory_beyond_the_gradients(peak: float, verdict: str) -> None:
    """The gradients are 112.5 MB: 162.5 beyond them are a sixth of 975, 167.5 are more."""
    case = HEADS_BOTH["reverse"]
    rows = [
        row(case, "ppo_fast-cpu", 2.0, run=0, peak_mb=peak),
        row(case, "eager", 8.0, run=0, peak_mb=1087.5),
    ]
    text = pages.page({Path("some-cpu-avx2-2026-01-02.json"): Results([FACTS], rows)})
    goal = "smaller peak beyond inputs and gradients than eager"
    assert lines_with(text, f"{case.name} ppo_fast-cpu {goal}", "≥ 6×", f"| {verdict} |")


def test_kinds_are_no_size_to_plot_against() -> None:
    other = Case("linear_divergence", BOTH, Shape("t-reverse", (64, 330, 24)))
    cases = [*HEADS_BOTH.values(), other, WITH_TEACHER, LINEAR_LOSS_BOTH]
    assert plots.by_size([row(case, "ppo_fast-cpu", 1.0) for case in cases], "some") == []
