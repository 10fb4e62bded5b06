"""Tests of the benchmark's cases and providers: names, scaling, the gate, reasons for absence."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command
from benchmarks import ops
from benchmarks.harness import gate as module_of_gate
from benchmarks.harness import measure
from benchmarks.harness.gate import Gate
from benchmarks.ops import case as module_of_case
from benchmarks.ops import linear_ppo_loss, registry
from benchmarks.ops.case import (
    _COPIES,
    BACKWARD,
    BOTH,
    FORWARD,
    LAYOUTS,
    Case,
    Shape,
    fitted,
)
from benchmarks.ops.gae import GAE
from benchmarks.ops.linear_ppo_loss import CHOSEN_R2
from benchmarks.ops.registry import SHAPES, cost, make_call
from benchmarks.ops.token_logprobs import GPU_LOGPROBS_FORWARD, LOGPROBS_FORWARD
from benchmarks.peers import providers_of
from benchmarks.peers.base import Bound, Provider, leaves, single, timed
from ppo_fast.testing import Call, run

_TINY = [
    *(Case("token_logprobs", way, Shape("t", (8, 37))) for way in (FORWARD, BACKWARD, BOTH)),
    Case("linear_token_logprobs", FORWARD, Shape("t", (8, 100, 32))),
    *(Case(op, BOTH, Shape("t", (4, 16))) for op in ("ppo_loss", "value_loss")),
    *(
        Case(op, FORWARD, Shape("t", (4, 16)))
        for op in ("rlhf_advantages", "whiten", "rollout_weights")
    ),
    *(Case("gae", FORWARD, Shape("t", (4, 16), layout)) for layout in LAYOUTS),
]


def test_a_file_of_its_own_is_all_that_a_new_op_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "group_advantages.py").write_text(
        "from benchmarks.ops import op, whiten\n"
        "OP = op.Op('group_advantages', 0, (), whiten.inputs, whiten.cost)\n"
    )
    (tmp_path / "notes.py").write_text("raise AssertionError('no op has this name')\n")
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    names = list(registry.found())
    del sys.modules["benchmarks.ops.group_advantages"], ops.group_advantages
    assert names == ["group_advantages", *registry.OPS]
    case = Case("group_advantages", FORWARD, Shape("t", (4, 16)))
    monkeypatch.setitem(registry.OPS, case.op, replace(registry.OPS["whiten"], name=case.op))
    names = [provider.name for provider in providers_of(case)]
    assert names == ["ppo_fast-cpu", "ppo_fast-reference", "copy"]


def test_an_op_s_cases_and_goals_are_its_own() -> None:
    for name, op in registry.OPS.items():
        assert {case.op for case in op.cases} == {op.name} == {name}
        assert {goal.case for goal in op.goals} <= set(op.cases)


def test_every_op_has_a_case_on_each_device() -> None:
    for device in ("cpu", "cuda"):
        only = {"rollout_weights"} if device == "cuda" else set()  # has kernels for the CPU alone
        found = {case.op for case in registry.CASES if case.device == device}
        assert found == set(registry.OPS) - only


def test_names_tell_cases_and_their_providers_apart() -> None:
    every = registry.FULL
    assert len({case.name for case in every}) == len(every)
    for case in every:
        names = [provider.name for provider in providers_of(case)]
        assert len(set(names)) == len(names), case.name
        assert names[0].startswith("ppo_fast-") and "ppo_fast-reference" in names


@pytest.mark.parametrize("case", registry.FULL, ids=lambda case: case.name)
def test_a_case_survives_json_and_costs_something(case: Case) -> None:
    assert Case.from_json(case.to_json()) == case
    moved, flops = cost(case)
    assert moved > 0 and flops > 0


def test_a_shape_is_scaled_by_name_to_half_after_half() -> None:
    full = SHAPES["qwen-r1"]
    need = full.numel * 4 * _COPIES
    assert fitted(full, "fp32", need) is full
    small = fitted(full, "fp32", need // 9)
    assert (small.name, small.dims) == ("qwen-r1/16", (512, 151936))
    assert fitted(full, "bf16", need // 9).name == "qwen-r1/8"
    assert fitted(SHAPES["long-1m"], "fp32", 1).dims == (1, 1048576)
    assert f"{small.name}:{small}" in Case("token_logprobs", FORWARD, small).name


def test_a_scaled_case_meets_no_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_case, "memory", lambda device: 2**30)
    here = module_of_case.here(LOGPROBS_FORWARD)
    assert here.shape.name == "gpt2/8"
    assert here not in {goal.case for goal in registry.GOALS}


def test_every_goal_is_about_a_case_and_providers_that_exist() -> None:
    for goal in registry.GOALS:
        assert goal.case in registry.FULL
        names = {provider.name for provider in providers_of(goal.case)}
        assert goal.provider in names
        assert goal.against in names | {None}


@pytest.mark.parametrize("case", _TINY, ids=lambda case: case.name)
def test_each_provider_passes_the_gate_or_gives_its_reason(case: Case) -> None:
    names = [p.name for p in providers_of(case) if p.name != "compile"]  # seconds each
    outcomes = measure.measure(case, names, time=False)
    assert list(outcomes) == names
    for name, outcome in outcomes.items():
        assert outcome.status in ("ok", "skipped"), (name, outcome)
        assert outcome.status == "ok" or outcome.detail, name
    ours = [name for name in names if name.startswith("ppo_fast-")]
    assert all(outcomes[name].status == "ok" for name in ours)


@pytest.mark.parametrize("case", _TINY[:1] + _TINY[4:5], ids=lambda case: case.name)
def test_compiled_peers_pass_too(case: Case) -> None:
    assert measure.measure(case, ["compile"], time=False)["compile"].status == "ok"


def test_peers_of_a_gpu_say_what_they_lack() -> None:
    case = GPU_LOGPROBS_FORWARD
    for provider in providers_of(case):
        if provider.name in ("liger", "flash-attn", "quack") and not torch.cuda.is_available():
            assert provider.missing() == "its kernels need a GPU"


def _log_prob_only(case: Case, call: Call) -> Bound:
    tensors, inputs = leaves(case, call)

    def run() -> torch.Tensor:
        return -F.cross_entropy(tensors["logits"], tensors["tokens"], reduction="none")

    return timed(case, call, run, inputs, single("logprobs"), only="logprobs")


@pytest.mark.parametrize("direction", [BACKWARD, BOTH])
def test_a_gradient_of_one_output_is_gated_against_that_of_this_output(direction: str) -> None:
    case = Case("token_logprobs", direction, Shape("t", (8, 37)))
    call = make_call(case)
    bound = _log_prob_only(case, call)
    if bound.prepare is not None:
        bound.prepare()
    named = bound.named(bound.call())
    assert named.keys() == {"logprobs", "grad_logits|logprobs"}
    gate = Gate(call)
    gate.check(named, plain=True)
    with pytest.raises(AssertionError, match="grad_logits"):
        gate.check({"grad_logits": named["grad_logits|logprobs"]}, plain=True)


def test_the_gate_samples_rows_from_the_first_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_gate, "_SAMPLE", {"cpu": 5 * 37})
    call = make_call(Case("token_logprobs", BOTH, Shape("t", (9, 37))))
    gate = Gate(call)
    results = run(call, "reference")
    gate.check(results)
    for row, seen in ((0, True), (1, False), (2, True), (8, True)):
        spoiled = {name: x.clone() for name, x in results.items()}
        spoiled["grad_logits"][row, 3] += 1e-2
        if seen:
            with pytest.raises(AssertionError, match="grad_logits"):
                gate.check(spoiled)
        else:
            gate.check(spoiled)


def test_a_peer_that_crashes_or_disagrees_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gae", FORWARD, Shape("t", (4, 16)))
    good = next(p for p in providers_of(case) if p.name == "loop")

    def wrong(case: Case, call: Call) -> Bound:
        bound = good.bind(case, call)
        return replace(bound, named=lambda out: {k: x + 1e-3 for k, x in bound.named(out).items()})

    def broken(case: Case, call: Call) -> Bound:
        raise RuntimeError("no such kernel")

    peers = (Provider("wrong", wrong), Provider("broken", broken), good)
    monkeypatch.setattr(measure, "providers_of", lambda case: peers)
    outcomes = measure.measure(case, ["wrong", "broken", "loop"], time=False)
    assert {name: x.status for name, x in outcomes.items()} == {
        "wrong": "red",
        "broken": "error",
        "loop": "ok",
    }
    assert "advantages" in outcomes["wrong"].detail
    assert outcomes["broken"].detail == "RuntimeError: no such kernel"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--op gea", "known: token_logprobs, linear_token_logprobs, ppo_loss, linear_ppo_loss"),
        ("--shape 64by4096", "known: gpt2 (512x50257)"),
        ("--op gae --shape 4x8x16", "known: rlhf-long"),
        ("--op gae --shape 4x8:column-major", "ROWSxCOLUMNS[:batch-major|time-major|packed]"),
        ("--op whiten --shape 4x8:packed", "unknown shape for the op"),
        ("--op gae --peers torchrl,nobody", "unknown peer 'nobody'; known: all, none, loop, "),
        ("--op gae --direction backward", "known: forward, call"),
        ("--dtype int8", "fp32"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        command.main(options.split())
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64x4096", "rlhf-long"])
def test_a_shape_is_found_by_name_and_by_size(text: str) -> None:
    found = command.cases_of("gae", text, None, None, "cpu")
    assert found == (module_of_case.here(GAE),)


def test_another_shape_makes_cases_of_the_op() -> None:
    (case,) = command.cases_of("gae", "24x40:time-major", None, "bf16", "cpu")
    assert (case.op, case.direction, case.dtype) == ("gae", FORWARD, "bf16")
    assert case.shape == Shape("free", (24, 40), "time-major")
    both = command.cases_of("token_logprobs", "3x5", None, None, "cpu")
    assert {each.direction for each in both} == {FORWARD, BOTH}
    assert make_call(case).tensors["rewards"].shape == (40, 24)


def test_peers_are_chosen_by_name() -> None:
    (case,) = command.cases_of("gae", "64x4096", None, None, "cpu")
    assert command.peers_of("all", [case]) is None
    assert command.peers_of("none", [case]) == frozenset()
    assert command.peers_of("torchrl,loop", [case]) == {"torchrl", "loop"}


@pytest.mark.parametrize("sample", [2**26, 101 * 20], ids=["all rows", "a sample"])
def test_chosen_rows_are_measured_with_their_peers(
    monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    """Three rows in ten, masked for those who cannot leave the others out."""
    monkeypatch.setattr(module_of_gate, "_SAMPLE", {"cpu": sample})
    case = Case(linear_ppo_loss.NAME, BOTH, Shape(f"{CHOSEN_R2.name}/128", (64, 101, 16)))
    call = linear_ppo_loss.inputs(case)
    assert int(call.tensors["mask"].sum()) == call.tensors["row_index"].numel() == 20
    checked = Gate(call)
    for provider in providers_of(case):
        if provider.name in ("eager", "ppo_fast-cpu", "ppo_fast-reference"):
            bound = provider.bind(case, call)
            checked.check(bound.named(bound.call()), plain=provider.plain)


def test_another_op_s_name_of_a_shape_is_not_taken() -> None:
    """`256x49152x576` is a support's shape, whose name says how many ids are kept."""
    size = "256x49152x576"
    found = command.cases_of("linear_divergence", size, None, None, "cpu")
    assert {case.shape for case in found} == {Shape("free", (256, 49152, 576))}
    (kept, *_) = command.cases_of("linear_ppo_loss", size, None, None, "cpu")
    assert kept.shape.name.startswith("support")
