"""The referee's formulas against scalar Python floats, and their other readings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import spelled_out
import torch

from ppo_fast.referee import cases
from ppo_fast.referee.formulas import Exact
from ppo_fast.referee.formulas.advantages import GroupAdvantages, StepGAE, TokenGAE, Whiten
from ppo_fast.referee.formulas.losses import PolicyLoss, ValueLoss
from ppo_fast.referee.formulas.tokens import KL, Entropy, LogProbs
from ppo_fast.referee.judge import Trial, diagnose, differences, judge

EPS = torch.finfo(torch.float32).eps
GAMMA, LAM = 0.97, 0.9


def tokens(name: str = "tool-tokens", seed: int = 0, per_sequence: bool = False) -> cases.Tokens:
    return cases.tokens(name, seed, cases.Edges(0.2, 0.3, 3.0), per_sequence)


def rows(batch: cases.Tokens) -> Iterator[tuple[int, list[int]]]:
    """Each sequence's own tokens."""
    for row in range(len(batch.mask)):
        yield row, [t for t in range(batch.mask.shape[1]) if batch.mask[row, t]]


def assert_near(exact: Exact | torch.Tensor, want: Any) -> None:
    value = exact.value if isinstance(exact, Exact) else exact
    torch.testing.assert_close(
        value, torch.as_tensor(want, dtype=torch.float64), rtol=1e-11, atol=1e-12
    )


def spelled_policy(batch: cases.Tokens, f: PolicyLoss) -> float:
    """Clip, dual clip, k3 and entropy of each token by scalar arithmetic, then a mean."""
    found = []
    for row, steps in rows(batch):
        terms = []
        for t in steps:
            new, old, ref, a, h = (
                float(x[row, t])
                for x in (
                    batch.logprobs,
                    batch.old_logprobs,
                    batch.ref_logprobs,
                    batch.advantages,
                    batch.entropies,
                )
            )
            ratio = math.exp(new - old)
            term = spelled_out.policy_term("clip", new, ratio, a, f.clip_low or 0, f.clip_high)
            if f.dual_clip is not None and a < 0:
                term = min(term, -a * f.dual_clip)
            k3 = spelled_out.kl(new - ref, "k3", None)
            terms.append(term + f.kl_coef * k3 - f.entropy_coef * h)
        found.append(terms)
    every = [x for terms in found for x in terms]
    if f.reduction == "token-mean":
        return math.fsum(every) / len(every)
    if f.reduction == "seq-mean-token-mean":
        return math.fsum(math.fsum(x) / len(x) for x in found if x) / len(found)
    return math.fsum(every) / len(found) / (f.divisor if f.reduction.endswith("norm") else 1.0)


@pytest.mark.parametrize(
    "name", ["tool-tokens", "empty-row", "clip-edges", "ranks-and-micro-batches"]
)
@pytest.mark.parametrize(
    "reduction",
    ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"],
)
def test_policy_loss(name: str, reduction: str) -> None:
    f = PolicyLoss(
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=3.0,
        reduction=reduction,
        divisor=7.0,
        kl_coef=0.1,
        entropy_coef=0.02,
    )
    batch = tokens(name)
    assert_near(f.exact(batch, EPS)["loss"], spelled_policy(batch, f))


@pytest.mark.parametrize("variant", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_surrogates(variant: str, reduction: str) -> None:
    level = {"gspo": "sequence"}.get(variant, "token")
    kind = {"cispo": "cispo"}.get(variant, "clip")
    batch = tokens()
    f = PolicyLoss(surrogate=kind, level=level, clip_low=0.2, clip_high=0.3, reduction=reduction)
    want = spelled_out.ppo_rows(
        batch.logprobs,
        batch.old_logprobs,
        batch.advantages,
        batch.mask,
        variant,
        reduction,
        0.2,
        0.3,
    )
    assert_near(f.exact(batch, EPS)["loss"], want)


def spelled_term(surrogate: str, new: float, old: float, a: float) -> float:
    ratio, gap = math.exp(new - old), math.exp(new) - math.exp(old)
    if surrogate == "sapo":
        tau = 1.0 if a > 0 else 1.05
        return -a * 4 / tau / (1 + math.exp(-tau * (ratio - 1)))
    if surrogate == "gpg":
        return -a * new
    if surrogate == "dro":
        return -(a * new - 0.25 * (new - old) ** 2)
    inside = gap <= 0.3 if a > 0 else gap >= -0.2
    return -a * min(ratio, 3.0) * new if inside else 0.0


@pytest.mark.parametrize("surrogate", ["sapo", "gpg", "dro", "dppo_tv"])
def test_other_surrogates(surrogate: str) -> None:
    batch = tokens()
    f = PolicyLoss(surrogate=surrogate, clip_low=0.2, clip_high=0.3, dual_clip=3.0, beta=0.5)
    inputs = (batch.logprobs, batch.old_logprobs, batch.advantages)
    values = [
        spelled_term(surrogate, *(float(x[row, t]) for x in inputs))
        for row, steps in rows(batch)
        for t in steps
    ]
    assert_near(f.exact(batch, EPS)["loss"], math.fsum(values) / len(values))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradients_are_the_losses_slopes(level: str) -> None:
    """By central differences of the loss."""
    batch, step = tokens("random", seed=3), 1e-6
    f = PolicyLoss(level=level, dual_clip=3.0, kl_coef=0.1, kl_weight="ratio")
    exact = f.exact(batch, EPS)["gradient"].value
    for row, t in itertools.product(range(2), range(4)):
        losses = []
        for sign in (1, -1):
            moved = batch.logprobs.clone()
            moved[row, t] += sign * step
            fields = {**vars(batch), "logprobs": moved}
            losses.append(f.exact(cases.Tokens(**fields), EPS)["loss"].value)
        torch.testing.assert_close(
            (losses[0] - losses[1]) / (2 * step), exact[row, t], rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize(("larger", "form"), [(True, "max"), (False, "clipped")])
def test_value_loss(larger: bool, form: str) -> None:
    batch = tokens("long-tail")
    values = [
        spelled_out.value_token(
            *(float(x[row, t]) for x in (batch.values, batch.old_values, batch.returns)), 0.2, form
        )
        for row, steps in rows(batch)
        for t in steps
    ]
    f = ValueLoss(clip=0.2, larger=larger)
    assert_near(f.exact(batch, EPS)["loss"], math.fsum(values) / len(values))


@pytest.mark.parametrize(("holes", "masked"), [("skip", "carry"), ("zero", "zero")])
def test_token_gae(holes: str, masked: str) -> None:
    batch = tokens()
    exact = TokenGAE(GAMMA, LAM, holes=holes).exact(batch, EPS)
    for row, steps in rows(batch):
        advantages, returns = spelled_out.gae_row(
            batch.rewards[row].tolist(),
            batch.values[row].tolist(),
            GAMMA,
            LAM,
            mask=batch.mask[row].int().tolist(),
            masked=masked,
        )
        assert_near(exact["advantages"].value[row][steps], [advantages[t] for t in steps])
        assert_near(exact["returns"].value[row][steps], [returns[t] for t in steps])


@pytest.mark.parametrize("name", cases.STEPS)
def test_step_gae(name: str) -> None:
    batch = cases.steps(name, 0)
    exact = StepGAE(GAMMA, LAM).exact(batch, EPS)
    for env in range(batch.rewards.shape[1]):
        advantages, returns = spelled_out.gae_row(
            *(batch.rewards[:, env].tolist(), batch.values[:, env].tolist(), GAMMA, LAM),
            following=batch.next_values[:, env].tolist(),
            terminated=batch.terminated[:, env].int().tolist(),
            truncated=batch.truncated[:, env].int().tolist(),
        )
        assert_near(exact["advantages"].value[:, env], advantages)
        assert_near(exact["returns"].value[:, env], returns)


def spelled_moments(x: list[float], unbiased: bool) -> tuple[float, float]:
    mean = math.fsum(x) / len(x)
    return mean, math.fsum((v - mean) ** 2 for v in x) / (len(x) - unbiased)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("eps_at", ["variance", "deviation"])
def test_whitening(unbiased: bool, shift: bool, eps_at: str) -> None:
    batch = tokens()
    f = Whiten(unbiased, 1e-3, eps_at, shift)
    x = batch.rewards[batch.mask].tolist()
    mean, variance = spelled_moments(x, unbiased)
    scale = math.sqrt(variance + 1e-3) if eps_at == "variance" else math.sqrt(variance) + 1e-3
    want = [(v - mean) / scale + (0.0 if shift else mean) for v in x]
    assert_near(f.exact(batch, EPS)["value"].value[batch.mask], want)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "others"])
def test_group_advantages(scale: str, baseline: str) -> None:
    batch = cases.groups("random", 0)
    scores = batch.scores.tolist()
    want = []
    for i, score in enumerate(scores):
        own = scores[i - i % 4 : i - i % 4 + 4]
        others = [s for j, s in enumerate(own) if j != i % 4]
        centre = math.fsum(own) / 4 if baseline == "mean" else math.fsum(others) / 3
        variance = spelled_moments(own if scale == "group" else scores, True)[1]
        divisor = 1.0 if scale == "none" else math.sqrt(variance) + 1e-6
        want.append((score - centre) / divisor)
    assert_near(GroupAdvantages(baseline, scale).exact(batch, EPS)["value"], want)


@pytest.mark.parametrize("name", ["random", "large-logits", "equal-logits"])
def test_logprobs_and_entropy(name: str) -> None:
    batch = cases.logits(name, 0, 0.7)
    logs = [spelled_out.log_softmax([z / 0.7 for z in row]) for row in batch.logits.tolist()]
    want = [row[label] for row, label in zip(logs, batch.labels.tolist(), strict=True)]
    assert_near(LogProbs().exact(batch, EPS)["value"], want)
    want = [-math.fsum(math.exp(x) * x for x in row) for row in logs]
    assert_near(Entropy().exact(batch, EPS)["value"], want)


def test_entropy_without_the_removed_tokens() -> None:
    batch = cases.logits("removed-tokens", 0, 0.7)
    left = [[z / 0.7 for z in row[:40]] for row in batch.logits.tolist()]
    logs = [spelled_out.log_softmax(row) for row in left]
    exact = Entropy().exact(batch, EPS)
    assert_near(exact["value"], [-math.fsum(math.exp(x) * x for x in row) for row in logs])
    assert bool(exact["gradient"].value.isfinite().all())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl(kind: str) -> None:
    batch = tokens()
    exact = KL(kind).exact(batch, EPS)
    gaps = (batch.logprobs - batch.ref_logprobs)[batch.mask].tolist()
    assert_near(exact["value"].value[batch.mask], [spelled_out.kl(x, kind, None) for x in gaps])
    slope = {
        "k1": lambda x: 1.0,
        "k2": lambda x: x,
        "k3": lambda x: 1 - math.exp(-x),
        "abs": lambda x: math.copysign(1.0, x),
    }[kind]
    assert_near(exact["gradient"].value[batch.mask], [slope(x) for x in gaps])
    assert_near(KL(kind, "k2").exact(batch, EPS)["gradient"].value[batch.mask], gaps)


def trials_of(f: Any, kind: str, **options: Any) -> list[Trial]:
    """Every case, with what the reading gives, rounded to fp32."""
    found = []
    for name in cases.NAMES[kind]:
        if name == "one-token" and isinstance(f, Whiten):
            continue
        batch = cases.make(kind, name, 0, **options)
        exact = f.exact(batch, EPS)
        given = {key: value.value.float() for key, value in exact.items()}
        found.append(Trial(name, batch, given))
    return found


CLIP = PolicyLoss(
    clip_low=0.2, clip_high=0.28, dual_clip=3.0, kl_coef=0.1, entropy_coef=0.01, divisor=64.0
)
FORMULAS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "policy": (CLIP, "tokens", {"edges": CLIP.edges, "per_sequence": False}),
    "sequence": (
        PolicyLoss(level="sequence", reduction="seq-mean-token-mean"),
        "tokens",
        {"edges": cases.Edges(), "per_sequence": True},
    ),
    "value": (ValueLoss(), "tokens", {"edges": cases.Edges(), "per_sequence": False}),
    "kl": (KL(), "tokens", {"edges": cases.Edges(), "per_sequence": False}),
    "whiten": (Whiten(), "tokens", {"edges": cases.Edges(), "per_sequence": False}),
    "gae": (TokenGAE(whiten=True), "tokens", {"edges": cases.Edges(), "per_sequence": False}),
    "steps": (StepGAE(whiten=True), "steps", {}),
    "groups": (GroupAdvantages(), "groups", {}),
    "logprobs": (LogProbs(), "logits", {"temperature": 0.7}),
    "entropy": (Entropy(), "logits", {"temperature": 0.7}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_silent_on_itself(name: str) -> None:
    f, kind, options = FORMULAS[name]
    for seed in range(3):
        judged = judge(f, trials_of(f, kind, **options), EPS, "here", {})
        assert not judged.findings and len(judged.agree) >= 4, (seed, judged.findings)


# Readings that are the formula's own on every batch.
ALIKE = {
    "policy": ("ratio.clamp", "ratio.ceiling"),  # the dual clip bounds the ratio before
    # The mean holds no masked slot, and a sequence's tokens have like gradients.
    "sequence": ("mask.late", "ratio.sequence-token"),
}
CHANGES = [
    pytest.param(name, change, id=f"{name}-{change.key}-{number}")
    for name, (f, _, _) in FORMULAS.items()
    for number, change in enumerate(f.changes())
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_every_reading_is_told_from_the_formula(name: str, change: Any) -> None:
    """Its results differ somewhere, and one change explains them all."""
    f, kind, options = FORMULAS[name]
    trials = trials_of(f.changed(change.fields), kind, **options)
    alike = change.key in ALIKE.get(name, ())
    assert any(differences(f, trial, EPS) for trial in trials) != alike
    chosen, unexplained = diagnose(f, trials, EPS)
    assert not unexplained and len(chosen) == (0 if alike else 1)
    if chosen and chosen[0].key != change.key:
        # Another name is right only where it is another word for the same numbers.
        ours = trials_of(f.changed(chosen[0].fields), kind, **options)
        theirs = f.changed(change.fields)
        assert not any(differences(theirs, trial, EPS) for trial in ours)


@pytest.mark.parametrize("kind", cases.NAMES)
def test_batches_hold_numbers_of_fp32(kind: str) -> None:
    """So that a trainer and a formula start from the same; and a seed gives the same ones."""
    options = {
        "tokens": {"edges": cases.Edges(0.2, 0.28, 3.0), "per_sequence": False},
        "logits": {"temperature": 0.7},
    }.get(kind, {})
    for name in cases.NAMES[kind]:
        batch, again = (cases.make(kind, name, 5, **options) for _ in range(2))
        fields = batch._asdict() if hasattr(batch, "_asdict") else vars(batch)
        for key, x in fields.items():
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                assert torch.equal(x.float().double().nan_to_num(), x.nan_to_num()), (name, key)
                assert torch.equal(x.nan_to_num(), getattr(again, key).nan_to_num())


def test_two_changes_at_once_are_both_named() -> None:
    f, kind, options = FORMULAS["policy"]
    fields = {"scope": "micro-batch", "kl": "-k3"}
    judged = judge(f, trials_of(f.changed(fields), kind, **options), EPS, "here", {})
    assert {one.key for one in judged.findings} == {"denominator.micro-batch", "kl.-k3"}


def test_what_has_no_known_reading_is_called_that() -> None:
    f, kind, options = FORMULAS["kl"]
    trials = [
        trial._replace(given={key: 1.37 * x for key, x in trial.given.items()})
        for trial in trials_of(f, kind, **options)
    ]
    judged = judge(f, trials, EPS, "here", {})
    assert {one.key for one in judged.findings} == {"unknown"}
    assert sorted(c for one in judged.findings for c in one.cases) == sorted(cases.TOKENS)
