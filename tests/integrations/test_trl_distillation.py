"""TRL's DistillationTrainer: twelve steps on ppo_fast against twelve of its own; its loss."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from trainers import needs

needs("trl_distillation")

import trl_distillation_run
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold.gold_trainer import GOLDTrainer
from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
from trl.experimental.sdft import loss_utils
from trl.trainer import distillation_trainer

import ppo_fast
from ppo_fast import Teacher, testing
from ppo_fast.integrations import MismatchError, trl_distillation

TIMES = ("step_time", "epoch")
KERNELS = "trl.kernels.chunked_divergence"
from_1_15 = pytest.mark.skipif(
    importlib.util.find_spec("trl.kernels") is None or importlib.util.find_spec(KERNELS) is None,
    reason="TRL has this function from 1.15",
)
takes = inspect.signature(distillation_trainer._chunked_divergence_loss).parameters
CHUNKS = {"chunk_size": 16} if "chunk_size" in takes else {}
BETAS = (0.0, 0.3, 1.0)
B, K, V = 5, 9, 101
WIDTHS = {"student": 16, "teacher": 24}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {
        "student_logit_scale": 0.5,
        "teacher_logit_scale": 0.25,
        "bias": True,
        "temperature": 0.7,
    },
    "capped": {
        "student_logit_scale": 2.0,
        "student_final_logit_softcapping": 5.0,
        "teacher_logit_scale": 1.5,
        "teacher_final_logit_softcapping": 8.0,
        "temperature": 1.3,
    },
    "the teacher capped": {"teacher_final_logit_softcapping": 4.0, "bias": True},
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_run_is_the_same(beta: float, scaled: bool) -> None:
    theirs = trl_distillation_run.run(beta=beta, scaled=scaled)
    with trl_distillation.patched() as calls:
        ours = trl_distillation_run.run(beta=beta, scaled=scaled)
    tiny.assert_same_run(ours, theirs, 12, TIMES)
    assert (calls["loss"].fused, calls["loss"].left) == (24, 0)  # 12 steps of 2 micro-batches


def heads(head: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Hidden states (B, K, H) and a head of each side, and the options that act on them."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {k: v for k, v in HEADS[head].items() if k != "bias"}
    for side, width in WIDTHS.items():
        found[f"{side}_hidden"] = torch.randn(B, K, width, generator=g)
        found[f"{side}_weight"] = torch.randn(V, width, generator=g)
        bias = torch.randn(V, generator=g)
        found[f"{side}_bias"] = bias if "bias" in HEADS[head] else None
    return {k: _leaf(x, dtype) if isinstance(x, Tensor) else x for k, x in found.items()}


def _leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).requires_grad_()


def leaves(x: dict[str, Any]) -> list[Tensor]:
    """Hidden states, weight and bias of the student."""
    names = ("student_hidden", "student_weight", "student_bias")
    return [x[name] for name in names if x[name] is not None]


def in_float64(x: dict[str, Any], beta: float, slopes: Tensor) -> list[Tensor]:
    """Divergences, entropies and gradients by the formulas; TRL's own compute in fp32 at most.

    JSD of β as in GKD, arXiv:2306.13649: β·KL(t‖m) + (1 − β)·KL(s‖m), m = βt + (1 − β)s.
    """
    x = {k: _leaf(v.detach(), torch.float64) if isinstance(v, Tensor) else v for k, v in x.items()}
    s, t = (_logprobs(x, side) for side in WIDTHS)
    mixture = ((1.0 - beta) * s.exp() + beta * t.exp()).log()
    from_teacher, from_student = (
        (t.exp() * (t - mixture)).sum(-1),
        (s.exp() * (s - mixture)).sum(-1),
    )
    found = from_teacher if beta == 0.0 else from_student  # the mixture is then the other side
    if beta not in (0.0, 1.0):
        found = beta * from_teacher + (1.0 - beta) * from_student
    grads = torch.autograd.grad(found, leaves(x), slopes.double().flatten())
    return [found.detach(), -(s.exp() * s).sum(-1).detach(), *grads]


def _logprobs(x: dict[str, Any], side: str) -> Tensor:
    z = x[f"{side}_hidden"].flatten(0, 1) @ x[f"{side}_weight"].t()
    if x[f"{side}_bias"] is not None:
        z = z + x[f"{side}_bias"]
    z, cap = z * x.get(f"{side}_logit_scale", 1.0), x.get(f"{side}_final_logit_softcapping")
    z = z if cap is None else cap * (z / cap).tanh()
    return (z / x.get("temperature", 1.0)).log_softmax(-1)


def assert_near(
    ours: list[Tensor], exact: list[Tensor], theirs: list[Tensor] | None = None
) -> None:
    """Within fp64's budget, or of a few roundings beside twice TRL's own error."""
    assert len(ours) == len(exact)
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        # A logit is at most some 60 and so is its product with a logarithm's slope.
        size = 60.0 * (60.0 if theirs is None else 0.0) + float(b.abs().max())
        testing.assert_within_budget(
            a.detach(),
            b,
            condition=size,
            ops=8 * (max(WIDTHS.values()) + V) if theirs is None else 8,
            eager=None if theirs is None else theirs[i].detach(),
        )


def token_divergence(x: dict[str, Any], beta: float, slopes: Tensor) -> list[Tensor]:
    """The results of `ChunkedDivergenceFunction.apply`, patched or not, and their gradients."""
    order = ("student_hidden", "student_weight", "student_bias")
    order += tuple(name.replace("student", "teacher") for name in order)
    given = [x[k].flatten(0, 1) if k.endswith("_hidden") else x[k] for k in order]
    found, entropy = importlib.import_module(KERNELS).ChunkedDivergenceFunction.apply(
        *given,
        beta,
        x.get("temperature", 1.0),
        x.get("student_logit_scale", 1.0),
        x.get("student_final_logit_softcapping"),
        x.get("teacher_logit_scale", 1.0),
        x.get("teacher_final_logit_softcapping"),
    )
    assert not entropy.requires_grad
    of_teacher = [x["teacher_hidden"], x["teacher_weight"]]
    grads = torch.autograd.grad(
        found, [*leaves(x), *of_teacher], slopes.flatten().to(found.dtype), allow_unused=True
    )
    assert grads[-2:] == (None, None)
    return [found, entropy, *grads[:-2]]


@from_1_15
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", HEADS)
def test_the_token_divergence(head: str, beta: float) -> None:
    slopes = torch.linspace(-1.0, 2.0, B * K)
    for dtype in (torch.float64, torch.float32):
        x = heads(head, dtype)
        theirs = token_divergence(x, beta, slopes)
        with trl_distillation.patched(("token_divergence",)) as calls:
            ours = token_divergence(x, beta, slopes)
        assert (calls["token_divergence"].fused, calls["token_divergence"].left) == (1, 0)
        exact = in_float64(x, beta, slopes)
        assert_near(ours, exact, None if dtype == torch.float64 else theirs)
    assert_near(theirs, exact)


def masks() -> dict[str, Tensor]:
    """Rows padded, with a tool's answer inside, of one token and of none; and nothing kept."""
    mask = torch.ones(B, K, dtype=torch.int64)
    mask[0, 5:], mask[1, 3:6], mask[2, 1:], mask[3] = 0, 0, 0, 0
    return {"some": mask, "all": torch.ones_like(mask), "none": torch.zeros_like(mask)}


def loss_of(x: dict[str, Any], mask: Tensor, beta: float, items: Any) -> list[Tensor]:
    """The results of `_chunked_divergence_loss`, patched or not, and the gradients."""
    given = {
        k.replace("hidden", "hidden_states").replace("_weight", "_lm_head_weight"): v
        for k, v in x.items()
        if not k.endswith("_bias")
    }
    biases = {f"{side}_lm_head_bias": x[f"{side}_bias"] for side in WIDTHS}
    loss, entropy, count = distillation_trainer._chunked_divergence_loss(
        **given, **biases, **CHUNKS, completion_mask=mask, beta=beta, num_items_in_batch=items
    )
    return [loss, entropy, count, *torch.autograd.grad(loss, leaves(x))]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("head", HEADS)
def test_the_loss(head: str, beta: float) -> None:
    """Divided by the batch's count, a tensor or a number, and by its own."""
    x, wide = heads(head), heads(head, torch.float64)
    cases = [(m, items) for m in masks().values() for items in (None, 31, torch.tensor(17.0))]
    theirs = [loss_of(x, mask, beta, items) for mask, items in cases]
    with trl_distillation.patched() as calls:
        ours = [loss_of(x, mask, beta, items) for mask, items in cases]
        doubles = [loss_of(wide, mask, beta, items) for mask, items in cases]
    assert (calls["loss"].fused, calls["loss"].left) == (2 * len(cases), 0)
    for (mask, items), a, b, c in zip(cases, ours, theirs, doubles, strict=True):
        divisor = float(mask.sum().clamp(min=1)) if items is None else float(items)
        assert a[2] == b[2] == c[2] == mask.sum()
        for found, tensors, eager in ((c, wide, None), (a, x, b)):
            slopes = mask.double() / divisor
            tokens, entropy, *grads = in_float64(tensors, beta, slopes)
            kept = mask.flatten() != 0
            exact = [(tokens * slopes.flatten()).sum(), entropy[kept].sum(), *grads]
            del found[2]
            assert_near(found, exact, eager and [*eager[:2], *eager[3:]])
        assert_near([*b[:2], *b[3:]], exact)


def test_masked_tokens_may_hold_anything() -> None:
    """Hidden states of padding that are NaN, which TRL on a CPU passes to the weight."""
    mask = masks()["some"]
    with trl_distillation.patched():
        want = loss_of(heads("plain"), mask, 0.3, None)
        x = heads("plain")
        for side in WIDTHS:
            x[f"{side}_hidden"].detach()[mask == 0] = math.nan
        got = loss_of(x, mask, 0.3, None)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_under_autocast() -> None:
    """bf16 products of fp32 tensors, each side's own: no further off than twice TRL."""
    x, mask = heads("capped"), masks()["some"]
    with torch.autocast("cpu", torch.bfloat16):
        theirs = loss_of(x, mask, 0.3, None)
        with trl_distillation.patched() as calls:
            ours = loss_of(x, mask, 0.3, None)
    assert (calls["loss"].fused, calls["loss"].left) == (1, 0)
    rounded = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in x.items()}
    for side in WIDTHS:
        rounded[f"{side}_bias"] = x[f"{side}_bias"]
    slopes = mask / mask.sum()
    tokens, entropy, *grads = in_float64(rounded, 0.3, slopes)
    exact = [(tokens * slopes.flatten()).sum(), entropy[mask.flatten() != 0].sum(), *grads]
    assert_near([*ours[:2], *ours[3:]], exact, [*theirs[:2], *theirs[3:]])


UNCOVERED: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"student_logit_scale": -0.5}, "student_logit_scale -0.5"),
    "a teacher's scale": ({"teacher_logit_scale": 0.0}, "teacher_logit_scale 0.0"),
    "cap": ({"student_final_logit_softcapping": -2.0}, "student_final_logit_softcapping -2.0"),
    "temperature": ({"temperature": -1.0}, "temperature -1.0"),
    "rows": ({"teacher_weight": torch.ones(V + 3, 24)}, "heads of 101 and 104 rows"),
    "types": (
        {"student_hidden": torch.ones(B, K, 16).bfloat16().requires_grad_()},
        "a student's hidden states torch.bfloat16 beside a weight torch.float32",
    ),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_left_to_trl(name: str) -> None:
    """Its own result, and a warning that names the reason."""
    if name == "rows" and CHUNKS:
        pytest.skip("TRL stacks the two sides' log-probabilities before 1.15, and has an error")
    changed, reason = UNCOVERED[name]
    x, mask = heads("plain") | changed, masks()["some"]
    want = loss_of(x, mask, 0.3, 31)
    with (
        pytest.warns(RuntimeWarning, match=f"left to trl: {reason}"),
        trl_distillation.patched() as calls,
    ):
        got = loss_of(x, mask, 0.3, 31)
    assert (calls["loss"].fused, calls["loss"].left) == (0, 1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_weight_that_zero_3_takes_away() -> None:
    x = heads("plain")
    x["teacher_weight"].ds_id = 0
    with pytest.raises(trl_distillation.Uncovered, match="a teacher's weight that DeepSpeed"):
        trl_distillation._token_divergence(**x, beta=0.3)


WRONG: dict[str, Callable[..., Any]] = {
    "mask": lambda call, **given: call(
        **given | {"mask": torch.ones_like(given["mask"]), "row_index": None}
    ),
    "temperature": lambda call, **given: call(**given | {"temperature": 1.1}),
    "divisor": lambda call, **given: call(**given | {"denom": 30.0}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_first_call_sees_what_is_wrong(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ppo_fast.linear_divergence
    change = WRONG[wrong]
    monkeypatch.setattr(ppo_fast, "linear_divergence", lambda **given: change(call, **given))
    with pytest.raises(MismatchError, match="the original gives"), trl_distillation.patched():
        loss_of(heads("plain"), masks()["some"], 0.3, torch.tensor(3100.0))


def logits_of(x: dict[str, Any], side: str) -> Tensor:
    return x[f"{side}_hidden"] @ x[f"{side}_weight"].t()


def gradients(value: Tensor, x: dict[str, Any]) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves(x))]


def teacher_of(x: dict[str, Any], beta: float) -> Teacher:
    kind = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")
    return Teacher(x["teacher_hidden"], x["teacher_weight"], kind=kind, beta=beta)


TRAINERS = {"gkd": GKDTrainer, "gold": GOLDTrainer}
REDUCTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "own": ({}, {}),
    "number": ({"num_items_in_batch": 31}, {"denom": 31.0}),
    "tensor": ({"num_items_in_batch": torch.tensor(17)}, {"denom": 17.0}),
    "sum": ({"reduction": "sum"}, {"reduction": "token-sum"}),
}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", TRAINERS)
def test_gkd_and_gold(name: str, beta: float) -> None:
    """Their loss of logits, patched and by two heads; fp64."""
    x, mask = heads("plain", torch.float64), masks()["some"]
    labels = torch.where(mask != 0, 7, -100)

    def call(options: dict[str, Any]) -> list[Tensor]:
        s, t = (logits_of(x, side) for side in WIDTHS)
        loss = TRAINERS[name].generalized_jsd_loss(
            s, t.detach(), labels, beta=beta, temperature=0.9, **options
        )
        return gradients(loss, x)

    theirs = {key: call(options) for key, (options, _) in REDUCTIONS.items()}
    with trl_distillation.patched((name,)) as calls:
        ours = {key: call(options) for key, (options, _) in REDUCTIONS.items()}
    assert (calls[name].fused, calls[name].left) == (len(REDUCTIONS), 0)
    for key, (_, own) in REDUCTIONS.items():
        given = x["student_hidden"], x["student_weight"], teacher_of(x, beta), mask
        head = ppo_fast.linear_divergence(*given, temperature=0.9, **own)
        assert_near(ours[key], theirs[key])
        assert_near(gradients(head.loss, x), theirs[key])


def test_a_run_of_gkd_is_the_same() -> None:
    theirs = trl_distillation_run.run_of(trl_distillation_run.gkd)
    with trl_distillation.patched(("gkd",)) as calls:
        ours = trl_distillation_run.run_of(trl_distillation_run.gkd)
    tiny.assert_same_run(ours, theirs, 6, TIMES)
    assert (calls["gkd"].fused, calls["gkd"].left) == (12, 0)


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"labels": None}, "a loss without labels"),
    "reduction": ({"reduction": "mean"}, "reduction 'mean'"),
    "temperature": ({"temperature": -0.5}, "temperature -0.5"),
    "dtype": ({"teacher_logits": torch.zeros(B, K, V).double()}, "logits .*float32.* beside"),
    "probabilities": ({"logits_are_probs": True}, "probabilities of two tokenizers"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_gold(name: str) -> None:
    changed, reason = LEFT[name]
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, B, K, V, generator=g).softmax(-1)
    labels = torch.where(masks()["some"] != 0, 7, -100)
    given = {"student_logits": s, "teacher_logits": t, "labels": labels} | changed
    want = GOLDTrainer.generalized_jsd_loss(**given)
    with (
        pytest.warns(RuntimeWarning, match=f"left to trl: {reason}"),
        trl_distillation.patched(("gold",)) as calls,
    ):
        got = GOLDTrainer.generalized_jsd_loss(**given)
    assert (calls["gold"].fused, calls["gold"].left) == (0, 1) and torch.equal(got, want)


@pytest.mark.parametrize("beta", BETAS)
def test_liger(beta: float) -> None:
    """Liger 0.8.5's fused JSD, its cross-entropy left out; fp64 but for its sum, in fp32."""
    jsd_loss = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    x, mask = heads("plain", torch.float64), masks()["some"].flatten()
    theirs = jsd_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=0.5, beta=beta, temperature=0.9, compiled=False
    )
    flat = {side: x[f"{side}_hidden"].flatten(0, 1) for side in WIDTHS}
    loss = theirs(
        flat["student"],
        x["student_weight"],
        flat["teacher"].detach(),
        x["teacher_weight"].detach(),
        torch.where(mask != 0, 7, -100),
    )
    teacher = replace(teacher_of(x, beta), coef=0.5, hidden=flat["teacher"])
    ours = ppo_fast.linear_divergence(
        flat["student"], x["student_weight"], teacher, mask, temperature=0.9
    )
    (value, *got), (total, *want) = gradients(ours.loss, x), gradients(loss, x)
    assert_near(got, want)
    testing.assert_within_budget(
        value, total.double(), condition=float(total), ops=2, compute=torch.float32
    )


@pytest.mark.parametrize("alpha", BETAS)
def test_self_distillation_over_the_vocabulary(alpha: float) -> None:
    """SDFT's and SDPO's `full_logits`, per token; fp64."""
    x = heads("plain", torch.float64)
    s, t = (logits_of(x, side) for side in WIDTHS)
    want = loss_utils.compute_full_logit_self_distillation_loss(
        s, t.detach(), distillation_alpha=alpha
    )
    ours = ppo_fast.linear_token_divergence(
        x["student_hidden"], x["student_weight"], teacher_of(x, alpha)
    )
    assert_near(gradients(ours.divergence, x), gradients(want, x))


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_self_distillation_of_the_first_k(tail: str, alpha: float) -> None:
    """SDFT's and SDPO's `topk_logits`: the student's own first K; fp64."""
    x = heads("plain", torch.float64)
    s, t = (logits_of(x, side) for side in WIDTHS)
    want = loss_utils.compute_topk_self_distillation_loss(
        s,
        t.detach(),
        distillation_topk=20,
        distillation_alpha=alpha,
        distillation_add_tail=tail == "bucket",
    )
    ids = s.detach().topk(20).indices
    student, teacher = (
        ppo_fast.linear_logprobs_at(x[f"{side}_hidden"], x[f"{side}_weight"], ids).logprobs
        for side in WIDTHS
    )
    kind = teacher_of(x, alpha).kind
    ours = ppo_fast.topk_divergence(student, teacher, kind=kind, beta=alpha, tail=tail)
    assert_near(gradients(ours.divergence, x), gradients(want, x))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_iw_opd_of_the_first_k(tail: str, beta: float) -> None:
    """The teacher's first K, the student's, or for a JSD both, an id once; fp64."""
    x, mask = heads("plain", torch.float64), masks()["some"]
    s, t = (logits_of(x, side).detach() for side in WIDTHS)
    want = IWOPDTrainer.generalized_jsd_loss(
        logits_of(x, "student"),
        t,
        torch.where(mask != 0, 7, -100),
        beta=beta,
        top_k=6,
        add_tail=tail == "bucket",
    )
    firsts = {0.0: [t], 1.0: [s]}.get(beta, [t, s])
    ids = torch.cat([z.topk(6).indices for z in firsts], -1)
    again = (ids[..., None] == ids[..., None, :]).tril(-1).any(-1)
    student, teacher = (
        ppo_fast.linear_logprobs_at(x[f"{side}_hidden"], x[f"{side}_weight"], ids).logprobs
        for side in WIDTHS
    )
    keep = ~again & (mask != 0)[..., None]
    kind = teacher_of(x, beta).kind
    ours = ppo_fast.topk_divergence(student, teacher, keep, kind=kind, beta=beta, tail=tail)
    assert_near(gradients(ours.divergence.sum() / mask.sum(), x), gradients(want, x))
