"""linear_ppo_loss with a teacher and a z-loss: one write of the gradient for all terms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import usable
from head_helpers import products, shape_for, short_chunks

import ppo_fast
from ppo_fast import Correction, Stats, Support, Teacher, testing
from ppo_fast._boundary.schema import REDUCTIONS
from ppo_fast.teacher import KINDS
from ppo_fast.testing import Call, linear_ppo_call, run, same_bits

DOUBLE = torch.float64
FLOATS = (torch.float32, torch.bfloat16, torch.float16, DOUBLE)
REJECT = {"token-k3": 0.2}
LOSSES: dict[str, dict[str, Any]] = {
    "clip": {},
    "gspo": {"variant": "gspo"},
    "rows": {"head_extras": ("bias", "row_index"), "mask": "row"},
    "softcap": {"softcap": 4.0, "teacher": {"softcap": 3.0, "logit_scale": 1.5}},
    "no policy": {"extras": (), "kl_coef": 0.0, "entropy_coef": 0.0},
    "sequence weights": {"extras": ("sequence_weights", "ref_logprobs"), "denom": 5.0},
    "coefficient": {"teacher": {"coef": 0.125, "temperature": 0.7}},
    "nothing kept": {"mask": "empty"},
}


@pytest.fixture(params=("reference", "cpu", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Those that take a teacher."""
    return usable(request.param)


def _call(shape: tuple[int, ...] = (5, 12), *, kind: str = "reverse", **options: Any) -> Call:
    """Both terms beside the loss, unless it is asked for one."""
    teacher = {"kind": kind, "coef": 0.5, **options.pop("teacher", {})}
    return linear_ppo_call(
        shape, teacher=teacher, z_loss_coef=options.pop("z_loss_coef", 0.25), **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_within_budget(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: str
) -> None:
    short_chunks(monkeypatch, backend)
    call = _call(shape_for(backend, device), kind=kind, device=device, **options)
    testing.assert_agrees(call, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("terms", ["both", "teacher", "z-loss"])
def test_precisions(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch, terms: str, dtype: torch.dtype
) -> None:
    if dtype == DOUBLE and backend == "triton":
        pytest.skip("triton has no float64")
    short_chunks(monkeypatch, backend)
    call = _call(shape_for(backend, device), kind="jsd", dtype=dtype, device=device)
    if terms == "teacher":
        call = call.option(z_loss_coef=0.0)
    testing.assert_agrees(_alone(call) if terms == "z-loss" else call, backend)


def _alone(call: Call) -> Call:
    """The same without its teacher."""
    tensors = {k: x for k, x in call.tensors.items() if not k.startswith("teacher_")}
    options = {k: x for k, x in call.options.items() if k != "teacher"}
    return call._replace(tensors=tensors, options=options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(backend: str, device: str, reduction: str) -> None:
    shape = (2, 3) if backend == "triton" else (4, 9)
    testing.assert_agrees(_call(shape, reduction=reduction, mask="row", device=device), backend)
    denom = {"denom": 3.0} if reduction == "seq-mean-token-sum-norm" else {}
    shape = (9,) if backend == "triton" else (45,)
    testing.assert_agrees(
        _call(shape, reduction=reduction, packed=True, device=device, **denom), backend
    )


def test_z_loss_on_every_backend(kernel: str, device: str) -> None:
    """CUDA C++ has no teacher, but this term."""
    call = _alone(_call((2, 3), device=device, dtype=torch.bfloat16))
    testing.assert_agrees(call, kernel)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1, 1e-30])
def test_the_z_loss_by_hand(entropy_coef: float) -> None:
    """The gradient of coef·Σ(ln Σe^z)² / D, whatever the entropy's slope is beside it."""
    name = usable("cpu")
    call = _alone(_call((3, 4), dtype=DOUBLE, mask=None, ignored=False, entropy_coef=entropy_coef))
    with_term, without = run(call, name), run(call.option(z_loss_coef=0.0), name)
    leaves = {k: call.tensors[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    z = leaves["hidden"] @ leaves["weight"].t() + leaves["bias"]
    lse = (z / call.tensors["temperature"][..., None]).logsumexp(-1)
    term = 0.25 * lse.square().mean()
    term.backward(call.cotangents["loss"])
    got = with_term["loss"] - without["loss"]
    assert abs(float(got - term.detach())) < 1e-14 * float(term.detach())
    for key, x in leaves.items():
        got, want = with_term[f"grad_{key}"] - without[f"grad_{key}"], x.grad
        assert want is not None
        assert float((got - want).abs().max()) < 1e-13 * float(want.abs().max()), key
    sums = Stats(with_term["stats"])
    assert float(sums.field("z_loss")) == pytest.approx(
        float(lse.detach().square().sum()), rel=1e-14
    )
    assert float(sums.field("divergence")) == 0.0


def test_a_tiny_coefficient_is_not_lost(kernel: str, device: str) -> None:
    """Alone, and beside an entropy's slope that is far larger or far smaller."""
    bare = {"extras": (), "kl_coef": 0.0, "mask": None, "ignored": False, "denom": 1.0}
    for coef, entropy_coef in ((1e-25, 0.0), (1e-4, 1e-30), (1e-30, 1e-3), (1e4, 0.0)):
        call = _alone(_call((2, 2), device=device, entropy_coef=entropy_coef, **bare))
        none = torch.zeros_like(call.tensors["advantages"])
        call = call.replace(advantages=none).option(z_loss_coef=coef)
        testing.assert_agrees(call, kernel)
        assert bool(run(call, kernel)["grad_hidden"].any())


@pytest.mark.parametrize("op_support", ["sparse", "dense"])
def test_z_loss_over_a_support(backend: str, device: str, op_support: str) -> None:
    """ln Σe^z over the kept ids; a row that keeps nothing takes the whole vocabulary."""
    shape = (2, 3) if backend == "triton" else (4, 9)
    for entropy_coef in (0.0, 0.2):
        call = linear_ppo_call(
            shape,
            device=device,
            kept=2 if backend == "triton" else 9,
            sparse=op_support == "sparse",
            z_loss_coef=0.25,
            entropy_coef=entropy_coef,
        )
        assert call.options["support"].n_whole > 0
        testing.assert_agrees(call, backend)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_it_is_the_sum_of_the_losses(variant: str, entropy_coef: float) -> None:
    """Of the policy loss, `linear_divergence` and the z-loss, in fp64."""
    name = usable("cpu")
    call = _call((4, 6), kind="mixed", dtype=DOUBLE, variant=variant, entropy_coef=entropy_coef)
    whole, policy = run(call, name), run(_alone(call.option(z_loss_coef=0.0)), name)
    z_loss = run(_alone(call), name)
    own = ("hidden", "weight", "bias", "mask", "temperature")
    taken = {k: x for k, x in call.tensors.items() if k in own or k.startswith("teacher_")}
    # An ignored token is masked there.
    taken["mask"] = taken["mask"] & (call.tensors["tokens"] != -100)
    options = {k: call.options[k] for k in ("teacher", "reduction")}
    other = run(Call("linear_divergence", taken, options, call.cotangents), name)
    for key in ("loss", "grad_hidden", "grad_weight", "grad_bias"):
        want = z_loss[key] + other[key]
        assert float((whole[key] - want).abs().max()) < 1e-13 * float(want.abs().max() + 1), key
        assert not torch.equal(policy[key], z_loss[key])
    got, want = (Stats(x["stats"]).compute() for x in (whole, other))
    assert got["divergence"] == pytest.approx(want["divergence"], rel=1e-13)


@pytest.mark.parametrize("ratio", ["old", "current"])
@pytest.mark.parametrize("drops", ["policy", "all"])
@pytest.mark.parametrize("count", ["all", "kept"])
def test_corrections(ratio: str, drops: str, count: str) -> None:
    """A rejected token keeps both terms, unless it leaves "all"; weights do not touch them."""
    name = usable("cpu")
    correction = Correction(
        "token", high=1.5, ratio=ratio, reject=REJECT, drops=drops, count=count
    )
    call = _call((4, 6), kind="jsd", dtype=DOUBLE)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    rollout = call.tensors["old_logprobs"] + noise
    call = call.replace(rollout_logprobs=rollout).option(correction=correction)
    got, want = run(call, name), run(call, "reference")
    for key, x in want.items():
        finite = x.isfinite()
        assert torch.equal(finite, got[key].isfinite())
        top = float(x[finite].abs().max())
        assert float((got[key] - x)[finite].abs().max()) < 1e-12 * max(top, 1.0), key
    stats = Stats(got["stats"])
    kept = call.tensors["mask"] & (call.tensors["tokens"] != -100)
    alone = run(call.option(correction=None).replace(rollout_logprobs=None), name)
    every = Stats(alone["stats"]).field("divergence")
    assert int(stats.field("rollout_rejected")) > 0 and int(kept.sum()) > 0
    assert (stats.field("divergence") < every) == (drops == "all")


def test_one_write_and_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of both heads once, and both gradients once."""
    name = usable("cpu")
    call = _call((6, 11), mask=None, ignored=False)
    rows = products(monkeypatch)
    run(call, name)
    # 66 rows, padded to a tile of 16 for the logits and the hidden states' gradient.
    assert rows == {"logits_into": 160, "hidden_gradient": 80, "add_weight_gradient": 66}


def test_merged_statistics() -> None:
    """Micro-batches add up: the divergence is a mean over all their tokens."""
    name = usable("cpu")
    calls = [_call((3, 5), seed=seed) for seed in (0, 1)]
    parts = [Stats(run(call, name)["stats"]) for call in calls]
    sums = [float(p.field("divergence")) for p in parts]
    counts = [float(p.field("n_tokens")) for p in parts]
    merged = (parts[0] + parts[1]).compute()
    assert merged["divergence"] == pytest.approx(sum(sums) / sum(counts), rel=1e-12)


def test_a_teacher_and_no_gradient(backend: str, device: str) -> None:
    call = _call((2, 3), device=device)
    got, want = run(call._replace(cotangents={}), backend), run(call, backend)
    for key in ("logprobs", "entropy"):
        assert same_bits(got[key], want[key])
    top = math.ulp(float(want["loss"].abs())) * 2**30  # a few roundings of fp32
    assert abs(float(got["loss"] - want["loss"])) <= top


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [True, False])
def test_a_teacher_over_a_support(backend: str, device: str, kind: str, sparse: bool) -> None:
    """Both distributions over the kept ids; a row that keeps nothing takes all of them."""
    shape = (2, 3) if backend == "triton" else (4, 9)
    options: dict[str, Any] = {"kept": 2 if backend == "triton" else 9, "sparse": sparse}
    own: dict[str, Any] = {"softcap": 3.0, "logit_scale": 1.5, "temperature": "token"}
    for more in ({}, {"softcap": 4.0, "teacher": own, "entropy_coef": 0.0, "z_loss_coef": 0.0}):
        call = _call(shape, kind=kind, device=device, **options, **more)
        assert call.options["support"].n_whole > 0
        testing.assert_agrees(call, backend)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_support_of_all_ids_changes_nothing(sparse: bool) -> None:
    """In fp64; nor does one that names every id twice change a divergence."""
    name = usable("cpu")
    call = _call((2, 3), vocab=11, kind="jsd", dtype=DOUBLE)
    ids = torch.arange(11).expand(2, 3, 11)
    want, got, twice = (
        run(call if kept is None else call.option(support=Support(kept, sparse=sparse)), name)
        for kept in (None, ids, torch.cat([ids, ids], -1))
    )
    for key in ("loss", "grad_hidden", "grad_weight", "grad_bias"):
        assert float((got[key] - want[key]).abs().max()) < 1e-13, key
    sums = [float(Stats(x["stats"]).field("divergence")) for x in (want, got, twice)]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-13)


def test_cuda_is_refused_by_name() -> None:
    if ppo_fast.backends()["cuda"] is not None:
        pytest.skip(f"no CUDA C++: {ppo_fast.backends()['cuda']}")
    with pytest.raises(ValueError, match=r"must be one of reference, cpu, triton with a teacher"):
        run(_call((2, 3)), "cuda")


@pytest.mark.parametrize("coef", [-0.1, math.nan, "0.1", torch.ones(2)])
def test_a_wrong_z_loss_coef_is_named(coef: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="linear_ppo_loss: z_loss_coef must be"):
        run(_alone(_call((2, 3))).option(z_loss_coef=coef), "reference")


def test_a_teacher_that_is_none_is_named() -> None:
    call = _alone(_call((2, 3))).option(teacher=Teacher)
    with pytest.raises(TypeError, match=r"teacher must be a ppo_fast\.Teacher, got type"):
        run(call, "reference")
