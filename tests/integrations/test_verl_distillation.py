"""verl's distillation losses: the recipes of docs/integrations/verl.md against its own."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from both_sides import B, T, assert_near, mask_of, normal
from torch import Tensor
from trainers import needs

needs("verl")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests say when it is patched

from tensordict import TensorDict
from verl.trainer.distillation import losses
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import DistillationConfig, DistillationLossConfig
from verl_calls import MODES, config

import ppo_fast
from ppo_fast import Surrogate, Teacher, TokenTerms, compat, surrogates
from ppo_fast.integrations import verl

PROMPT, H, WIDE, V, TOPK, BOUND = 2, 16, 24, 53, 6, 2.0
ESTIMATORS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


def lengths() -> Tensor:
    """Tokens of each response; a mask also leaves out some of them."""
    return torch.tensor([T, 7, T, 4, 9])


def response_mask() -> Tensor:
    return mask_of("bool") & (torch.arange(T) < lengths()[:, None])


def packed(x: Tensor) -> Tensor:
    """(B, T, …) of response tokens, each at the token before it, as verl's engine packs them."""
    rows = []
    for row, n in zip(x, lengths().tolist(), strict=True):
        before, after = x.new_zeros(PROMPT - 1, *row.shape[1:]), x.new_zeros(1, *row.shape[1:])
        rows.append(torch.cat([before, row[:n], after]))
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(**more: Any) -> TensorDict:
    ids = torch.ones(B, PROMPT + T, dtype=torch.int64)
    seen = torch.cat([ids[:, :PROMPT], (torch.arange(T) < lengths()[:, None]).long()], 1)
    made = TensorDict(
        {
            "prompts": ids[:, :PROMPT],
            "responses": ids[:, PROMPT:],
            "attention_mask": seen,
            "response_mask": response_mask(),
            **more,
        },
        batch_size=B,
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}.items():
        made.set_non_tensor(name, value)
    return made


def distillation(mode: str, policy_gradient: bool, **options: Any) -> DistillationConfig:
    loss = DistillationLossConfig(
        loss_mode=mode,
        use_policy_gradient=policy_gradient,
        topk=TOPK,
        loss_max_clamp=BOUND,
        **options,
    )
    return DistillationConfig(distillation_loss=loss)


def reduced(mode: str) -> dict[str, Any]:
    """verl's `loss_agg_mode` as `reduction` and `denom`."""
    if mode != "seq-mean-token-sum-norm":
        return {"reduction": mode}
    some = response_mask().any(1).sum()
    return {"reduction": "seq-mean-token-sum", "denom": float(some * T)}


class Drawn:
    """A student's head, response tokens, and what a teacher and the old policy say of them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        # From two almost even distributions to two that have little in common.
        apart = torch.linspace(0.02, 1.0, T, dtype=torch.float64)[:, None]
        self.hidden = (apart * normal(B, T, H)).to(dtype).requires_grad_()
        self.weight = normal(V, H, seed=1).to(dtype).requires_grad_()
        self.tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(2))
        self.wide, self.wide_weight = apart * normal(B, T, WIDE, seed=3), normal(V, WIDE, seed=4)
        self.wide, self.wide_weight = self.wide.to(dtype), self.wide_weight.to(dtype)
        self.teacher = (self.wide @ self.wide_weight.t()).log_softmax(-1)
        own = self.logprobs().detach().gather(-1, self.tokens[..., None])[..., 0]
        self.old = own + 0.3 * normal(B, T, seed=5).to(dtype)
        self.advantages = normal(B, T, seed=6).to(dtype)
        self.of_tokens = self.teacher.gather(-1, self.tokens[..., None])[..., 0]

    def logprobs(self) -> Tensor:
        return (self.hidden @ self.weight.t()).log_softmax(-1)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.tokens


def with_gradients(loss: Tensor, x: Drawn) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, x.leaves())]


def assert_same(ours: Tensor, theirs: Tensor, x: Drawn) -> None:
    """The loss and its gradients: verl adds 1e-8 to counts, and forms its first K's KL in fp32."""
    for a, b in zip(with_gradients(ours, x), with_gradients(theirs, x), strict=True):
        assert_near(a, b, size=float(b.abs().max()))


def verls(made: DistillationConfig, output: dict[str, Tensor], mode: str, **data: Any) -> Tensor:
    """verl's whole loss of a micro-batch."""
    actor = config({}, loss_agg_mode=mode)
    return losses.distillation_loss(actor, made, output, batch(**data))[0]


@pytest.mark.parametrize("mode", MODES)
def test_forward_kl_of_the_teachers_first_k(mode: str) -> None:
    """With verl's floor and bound, each of which holds some tokens."""
    x, made = Drawn(), distillation("forward_kl_topk", False, log_prob_min_clamp=-6.0)
    # A teacher that prefers what the student does, less: its first K have a divergence below 0.
    likewise = (0.1 * x.logprobs().detach()).log_softmax(-1)
    teacher, ids = torch.cat([likewise[:2], x.teacher[2:]]).topk(TOPK)
    found = compute_forward_kl_topk(
        packed(x.hidden).values()[None] @ x.weight.t(), packed(teacher), packed(ids), made, "thd"
    )
    output = {name: value[0] for name, value in found.items()}
    want = verls(made, output, mode)

    mask = response_mask()
    at = ppo_fast.linear_logprobs_at(x.hidden, x.weight, ids, mask=mask)
    ours = ppo_fast.topk_divergence(
        at.logprobs, teacher, mask[..., None], kind="forward", floor=-6.0, max=BOUND
    )
    assert (at.logprobs[mask] < -6.0).any() and (teacher[mask] < -6.0).any()
    for bound in (0.0, BOUND):
        assert (ours.divergence[mask] == bound).any()
    assert_same(agg_loss(ours.divergence, mask, mode), want, x)
    for name in ("student_mass", "teacher_mass"):
        theirs = losses.no_padding_2_padding(output[name], batch())
        assert_near(getattr(ours, name)[mask], theirs[mask], size=1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "k1"])
def test_estimators_as_a_loss(estimator: str, mode: str) -> None:
    """`use_policy_gradient=False`: the KL term of a policy loss whose advantages are 0."""
    x = Drawn()
    given = {"log_probs": packed(compat.logprobs_from_logits(x.hidden @ x.weight.t(), x.tokens))}
    teacher = packed(x.of_tokens[..., None])
    want = verls(distillation(estimator, False), given, mode, teacher_logprobs=teacher)
    ours = ppo_fast.linear_ppo_loss(
        *x.head(),
        x.old,
        torch.zeros_like(x.old),
        mask=response_mask(),
        ref_logprobs=x.of_tokens,
        kl_coef=1.0,
        kl_estimator={"kl": "k1", "mse": "k2", "low_var_kl": "k3"}.get(estimator, estimator),
        kl_clamp=BOUND,
        **reduced(mode),
    )
    assert_same(ours.loss, want, x)


CLIPPED = surrogates.clip(0.2, 0.2, dual_clip=3.0)


def distilled(t: TokenTerms) -> Any:
    """Advantages log p_teacher − log p_student of the sampled tokens, a constant, clipped."""
    advantages = (t.ref_logprobs - t.logprobs.detach()).clamp(-BOUND, BOUND)
    return CLIPPED.fn(replace(t, advantages=advantages))


@pytest.mark.parametrize("mode", MODES)
def test_the_policy_gradient(mode: str) -> None:
    """`use_policy_gradient=True` with k1, as a surrogate: no pass over the head beforehand."""
    x = Drawn()
    given = {"log_probs": packed(compat.logprobs_from_logits(x.hidden @ x.weight.t(), x.tokens))}
    data = {"teacher_logprobs": packed(x.of_tokens[..., None]), "old_log_probs": x.old}
    want = verls(distillation("k1", True), given, mode, **data)
    ours = ppo_fast.linear_ppo_loss(
        *x.head(),
        x.old,
        torch.zeros_like(x.old),
        mask=response_mask(),
        variant=Surrogate(distilled),
        ref_logprobs=x.of_tokens,
        **reduced(mode),
    )
    assert_same(ours.loss, want, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_whole_distributions(kind: str, mode: str) -> None:
    """The KL that verl has over a teacher's first K alone, over the vocabulary."""
    x, mask = Drawn(), response_mask()
    p, q = (x.logprobs(), x.teacher) if kind == "reverse" else (x.teacher, x.logprobs())
    want = agg_loss((p.exp() * (p - q)).sum(-1), mask, mode)
    teacher = Teacher(x.wide, x.wide_weight, kind=kind)
    ours = ppo_fast.linear_divergence(x.hidden, x.weight, teacher, mask, **reduced(mode))
    assert_same(ours.loss, want, x)


@pytest.mark.parametrize("mode", MODES)
def test_beside_the_reward(mode: str) -> None:
    """`use_task_rewards=True`: verl's sum of the two losses, in one pass over the head."""
    x, mask = Drawn(), response_mask()
    actor = config({}, clip_ratio_low=0.2, clip_ratio_high=0.2)
    new = compat.logprobs_from_logits(x.hidden @ x.weight.t(), x.tokens)
    policy, _ = losses.get_policy_loss_fn("vanilla")(
        old_log_prob=x.old,
        log_prob=new,
        advantages=x.advantages,
        response_mask=mask,
        loss_agg_mode=mode,
        config=actor,
    )
    kl = (x.teacher.exp() * (x.teacher - x.logprobs())).sum(-1)
    want = policy + 0.3 * agg_loss(kl, mask, mode)
    ours = ppo_fast.linear_ppo_loss(
        *x.head(),
        x.old,
        x.advantages,
        mask=mask,
        dual_clip=3.0,
        teacher=Teacher(x.wide, x.wide_weight, kind="forward", coef=0.3),
        **reduced(mode),
    )
    assert_same(ours.loss, want, x)


@pytest.mark.parametrize("policy_gradient", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_patched(estimator: str, policy_gradient: bool) -> None:
    """verl's own function on the ops that are patched: its estimators and its policy loss."""
    if estimator == "k1" and not policy_gradient:
        return  # verl refuses it
    x, made = Drawn(), distillation(estimator, policy_gradient)

    def call() -> Tensor:
        new = compat.logprobs_from_logits(x.hidden @ x.weight.t(), x.tokens)
        data = {"teacher_logprobs": packed(x.of_tokens[..., None]), "old_log_probs": x.old}
        return verls(made, {"log_probs": packed(new)}, "token-mean", **data)

    want = call()
    ops = ("kl", "policy_loss") if policy_gradient else ("kl",)
    with verl.patched(ops) as calls:
        assert_same(call(), want, x)
    assert {op: (n.fused, n.left) for op, n in calls.items()} == dict.fromkeys(ops, (1, 0))
