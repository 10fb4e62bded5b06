"""The op boundary: schemas, fakes, opcheck of every overload, fp64 gradcheck."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from head_helpers import short_chunks

import ppo_fast
from ppo_fast import testing
from ppo_fast._boundary import emit, schema
from ppo_fast._boundary.options import PACKED, PolicyOptions, ValueOptions
from ppo_fast.teacher import KINDS

ROOT = Path(__file__).parents[2]
DOUBLE = torch.float64
HEAD = ("hidden", "weight", "bias", "extra_u", "extra_b")
OVERLOADS = [(op, backend) for op in schema.OPS for backend in schema.backends_of(op)]
PPO = [1, 2, 1, 2, 0, 0, 2], [0.2, 0.3, 3.0, -20.0, 20.0, 0.01, 0.1, 10.0, 2.0, 0.0]


def boundary(device: str) -> dict[str, tuple[Any, ...]]:
    """One full argument list per op."""
    g = torch.Generator().manual_seed(0)

    def x(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device)

    mask = torch.tensor([[1, 1, 0, 1, 0]] * 3, dtype=torch.uint8, device=device)
    tokens = torch.arange(15, device=device).view(3, 5) % 11
    temperature = x(3, 5).abs() + 0.5
    logits, logs, entropy, row_max = x(3, 5, 11), x(3, 5), x(3, 5).abs(), x(3, 5) + 5
    moments = torch.tensor([9.0, 0.1, 8.0], dtype=DOUBLE, device=device)
    back = (
        logs,
        x(3, 5),
        logits,
        tokens,
        mask,
        temperature,
        entropy,
        row_max,
        entropy + 1,
        1.0,
        -100,
    )
    none = None
    token = (logs - 3, x(3, 5), x(3, 5).abs(), moments, logs - 3.2, x(3, 5).abs(), none, none)
    one_pass = (tokens, mask, temperature, *token, 1.0, -100, [0, 2, 0, 1, 1, 0, 0], PPO[1])
    return {
        "logprobs_fwd": (logits, tokens, mask, temperature, 1.0, -100),
        "token_stats": (logits, tokens, mask, temperature, 1.0, -100),
        "logprobs_bwd": back,
        "logprobs_bwd_": (*back[:2], logits.clone(), *back[3:]),
        "logprobs_bwd_bf16_": (*back[:2], logits.clone(), *back[3:]),
        **of_supports(x, device),
        **of_teachers(x, logits, mask, tokens, temperature),
        "ppo_loss": (logs, logs + 0.1, x(3, 5), mask, x(3, 5).abs(), moments, entropy, logs - 0.2,
                     none, x(3).abs(), none, none, none, *PPO),
        "logits_ppo_loss": (logits, *one_pass),
        "logits_ppo_loss_": (logits.clone(), *one_pass),
        "logits_ppo_loss_bf16_": (logits.clone(), *one_pass),
        "value_loss": (logs, logs + 0.1, x(3, 5), mask, none, none, [1, 2, 1], [0.2, 0.5, 0.0]),
        "gae": (x(3, 5), x(3, 5), mask, none, x(3), mask, none, none, none, none, none, none,
                0, False, False, False, 0.99, 0.95, 0.95),
        "rlhf_advantages": (x(3), logs, logs + 0.1, x(3, 5), mask, x(3), none, none, 0, 0, 1,
                            0.99, 0.95, 0.1, 5.0, -3.0, 3.0),
        "moments": (x(3, 5), mask),
        "whiten": (x(3, 5), mask, moments, True, True, False, 1e-8),
        "scaled": (x(3, 5), x(), x()), "scaled_": (x(3, 5), x(), none),
        "few_rows_linear": (x(3, 5), x(7, 5), x(7)),
        "bf16_product_": (x(3, 5), x(5, 7).bfloat16(), x(3, 7), True),
        "rollout_weights": (logs, logs + 0.1, mask, none, 2, 1, 0.9, 1.1,
                            [-1.0, 1.0, 0.5, 0.4] * 5),
    }  # fmt: skip


def of_supports(x: Callable[..., torch.Tensor], device: str) -> dict[str, tuple[Any, ...]]:
    """The same of the ops over pairs: three rows of seven."""
    ids = torch.tensor([4, 1, -1, 0, 6, 2, 2], dtype=torch.int32, device=device)
    ends, kept = torch.tensor([0, 3, 4, 7], device=device), torch.ones(3, dtype=torch.bool)
    pairs = (ids, ends, kept.to(device))
    starts = torch.tensor([0, 1, 1, 4, 4, 7], device=device)
    temperature, entropy = x(3).abs() + 0.5, x(3).abs()
    numbers = (temperature, entropy, x(3) + 5, entropy + 1, 1.0)
    return {
        "support_fwd": (x(7), *pairs[1:], temperature, 1.0),
        "support_bwd": (x(3), x(3), x(7), *pairs[1:], *numbers),
        "sparse_logits": (x(3, 5), x(7, 5), *pairs),
        "sparse_hidden_grad": (x(7), x(7, 5), *pairs),
        "sparse_weight_grad": (x(7), ids.clamp(0, 2), starts, x(5, 5)),
    }


def of_teachers(
    x: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    mask: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
) -> dict[str, tuple[Any, ...]]:
    """The same of the divergences of rows of logits from a teacher's."""
    rows = (x(3, 5, 11), mask, temperature, None)
    states = (x(3, 5) + 5, x(3, 5).abs(), x(3, 5) + 5, x(3, 5).abs())
    numbers = (1.0, 0.7, schema.KINDS.index("jsd"), 0.3)
    grads = (x(3, 5), x(3, 5), x(3, 5))
    back = (rows[0], tokens, *rows[1:], x(3, 5).abs(), *states, x(3, 5), *numbers)
    return {
        "divergence_fwd": (logits, *rows, *states, *numbers),
        "divergence_bwd": (*grads, logits, *back),
        "divergence_bwd_": (*grads, logits.clone(), *back),
        "divergence_bwd_bf16_": (*grads, logits.clone(), *back),
    }


@pytest.mark.parametrize("kind", [PolicyOptions, ValueOptions])
def test_packed_numbers_have_the_order_of_the_table(kind: Any) -> None:
    """Every field in its place, by numbers that differ."""
    numbers = kind(*range(len(kind._fields)))
    name = kind.__name__.removesuffix("Options")
    packed = {"Codes": numbers.codes(99), "Params": numbers.params()}
    for vector, values in packed.items():
        fields, _ = PACKED[name + vector]
        want = [99 if field == "n_grads" else getattr(numbers, field) for field in fields]
        assert values == want


def test_the_generated_codes_are_up_to_date() -> None:
    assert emit.stale(ROOT) == [] and emit.main(["--check"]) == 0


def test_codes_that_are_out_of_date_are_named_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, text in emit.emitted().items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert emit.main(["--check"], tmp_path) == 1
    assert "csrc/codes.h, kernels/codes.py" in capsys.readouterr().err
    assert emit.main([], tmp_path) == 0 and emit.stale(tmp_path) == []


@pytest.mark.case("I1")
@pytest.mark.parametrize("op, kernel", OVERLOADS, indirect=["kernel"])
def test_opcheck(kernel: str, device: str, op: str) -> None:
    """Schema, autograd registration, fake tensors and dynamic shapes of every overload."""
    results = torch.library.opcheck(schema.HANDLES[op][kernel], boundary(device)[op])
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("op, kernel", OVERLOADS, indirect=["kernel"])
@pytest.mark.parametrize("rows", [0, 3])
def test_outputs_are_contiguous_and_as_the_fake_says(
    kernel: str, device: str, op: str, rows: int
) -> None:
    def cut(a: Any) -> Any:
        """The first rows of a tensor that has a row per sequence, or of their ends."""
        whole = not isinstance(a, torch.Tensor) or a.dtype == DOUBLE or op == "moments"
        if whole or a.shape[:1] not in ((3,), (4,)):
            return a
        return a[: rows + a.shape[0] - 3]

    args = [cut(a) for a in boundary(device)[op]]
    real = schema.HANDLES[op][kernel](*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake = schema.HANDLES[op][kernel](*fakes)
    if real is None:
        assert fake is None
        return
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True)
    for got, want in pairs:
        assert got.is_contiguous() and got.shape == want.shape and got.dtype == want.dtype


@pytest.mark.parametrize("op", ["ppo_loss", "value_loss"])
def test_gradients_that_nobody_wants_change_no_bit(kernel: str, device: str, op: str) -> None:
    handle = schema.HANDLES[op][kernel]
    *args, codes, params = boundary(device)[op]
    *full, every = handle(*args, codes, params)
    assert bool((every != 0).any())
    for n in range(codes[-1]):
        *some, grads = handle(*args, [*codes[:-1], n], params)
        assert torch.equal(grads, every[:n])
        for got, want in zip(some, full, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["reference", "cpu"])
class TestGradcheck:
    """Numerical derivatives in fp64, with no tolerance for differences between two runs."""

    def check(self, call: testing.Call, leaves: list[str], outputs: list[str]) -> bool:
        def f(*xs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = call.replace(**dict(zip(leaves, xs, strict=True)))
            arguments = testing.arguments(given.tensors | given.options)
            out = getattr(ppo_fast, call.op)(**arguments, backend=self.name)
            return tuple(testing.output(out)[k] for k in outputs)

        xs = [call.tensors[k].clone().requires_grad_() for k in leaves]
        return torch.autograd.gradcheck(f, xs, eps=1e-6, atol=1e-5, rtol=1e-3, nondet_tol=0.0)

    @pytest.fixture(autouse=True)
    def backend_of(self, name: str) -> None:
        from conftest import usable

        self.name = usable(name)

    @pytest.mark.case("N14")
    def test_logprobs(self) -> None:
        for temperature in (0.7, "token"):
            call = testing.logprobs_call((2, 3), 13, dtype=DOUBLE, temperature=temperature)
            assert self.check(call, ["logits"], ["logprobs", "entropy"])

    @pytest.mark.case("N14")
    @pytest.mark.parametrize("estimator", schema.ESTIMATORS)
    @pytest.mark.parametrize("variant", ["clip", "penalty", "linear"])
    def test_ppo(self, variant: str, estimator: str) -> None:
        """gspo, cispo and "+" stop gradients by definition: test_ppo_loss.py has them by hand."""
        for reduction in schema.REDUCTIONS[1:4]:
            call = testing.ppo_call(
                (3, 6),
                dtype=DOUBLE,
                variant=variant,
                kl_estimator=estimator,
                reduction=reduction,
                dual_clip=3.0 if variant == "clip" else None,
                log_ratio_clamp=5.0,
            )
            assert self.check(call, ["logprobs", "entropy"], ["loss"])

    @pytest.mark.case("N14")
    @pytest.mark.parametrize("options", [{}, {"form": "clipped"}, {"clip": None}], ids=str)
    def test_value(self, options: dict[str, Any]) -> None:
        call = testing.value_call((3, 6), dtype=DOUBLE, **options)
        assert self.check(call, ["values"], ["loss"])

    def test_linear_logprobs(self) -> None:
        every = {"softcap": 3.0, "temperature": 0.7, "extras": ("bias", "row_index", "extra")}
        for options in ({}, every, every | {"kept": 4}):
            call = testing.linear_call((2, 3), 7, 3, dtype=DOUBLE, **options)
            leaves = [k for k in HEAD if k in call.tensors]
            assert self.check(call, leaves, ["logprobs", "entropy"])

    def test_linear_logprobs_at(self) -> None:
        """Ids that stand twice, absent ones, and more ids than the vocabulary has."""
        for options in ({}, {"k": 9, "softcap": 3.0, "extras": ("bias", "row_index", "extra")}):
            call = testing.linear_at_call((2, 3), 7, 3, dtype=DOUBLE, **options)
            leaves = [k for k in HEAD if k in call.tensors]
            assert self.check(call, leaves, ["logprobs", "entropy"])

    @pytest.mark.parametrize("reduction", schema.REDUCTIONS)
    @pytest.mark.parametrize("variant", ["clip", "penalty", "linear"])
    def test_heads(self, monkeypatch: pytest.MonkeyPatch, variant: str, reduction: str) -> None:
        """gspo and cispo: test_l*_ppo_loss.py compare them with autograd of the reference."""
        short_chunks(monkeypatch, "triton")
        options = {"dtype": DOUBLE, "variant": variant, "reduction": reduction}
        logits = testing.logits_ppo_call((2, 3), 5, log_ratio_clamp=5.0, **options)
        assert self.check(logits, ["logits"], ["loss"])
        options |= {"head_extras": ("bias", "extra"), "log_ratio_clamp": 5.0}
        linear = testing.linear_ppo_call((2, 3), 5, 3, softcap=3.0, ignored=False, **options)
        assert self.check(linear, list(HEAD), ["loss"])

    @pytest.mark.parametrize("kind", KINDS)
    def test_divergences(self, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        """Of a student with an adapter on its head, and of it alone."""
        short_chunks(monkeypatch, "triton")
        given: dict[str, Any] = {"dtype": DOUBLE, "extras": ("bias", "extra"), "softcap": 3.0}
        tokens = testing.DIVERGENCES["linear_token_divergence"]((2, 3), 7, 3, kind=kind, **given)
        assert self.check(tokens, list(HEAD), ["divergence", "entropy"])
        loss = testing.DIVERGENCES["linear_divergence"]((2, 3), 7, 3, kind=kind, **given)
        assert self.check(loss, list(HEAD), ["loss"])


@pytest.mark.parametrize("op", testing.FACTORIES)
def test_fp64_agrees_to_fp64(op: str) -> None:
    """The C++ path in double against the reference in double."""
    from conftest import usable

    backend = usable("cpu")
    for seed in range(3):
        testing.assert_agrees(testing.FACTORIES[op]((5, 21), dtype=DOUBLE, seed=seed), backend)
