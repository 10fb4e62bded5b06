"""One update's samples, its minibatches, advantages and importance weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.sequences import Rollout, Scores, Sequences

Plan = list[list[Tensor]]


class Experience(NamedTuple):
    """One update's samples: prompts and completions as texts and as tokens, and their rewards.

    `ended[i]` says whether completion i ended by itself. `token_rewards` (B, R) takes the place of
    the scores where every token has a reward of its own.
    """

    prompts: list[str]
    texts: list[str]
    rollout: Rollout
    scores: Scores
    ended: list[bool]
    token_rewards: Tensor | None = None

    def lengths(self) -> dict[str, float]:
        """`response_length`, mean tokens a response with its end; `ended`, the share with one."""
        n = len(self.ended)
        tokens = float(self.rollout.seqs.mask.sum())
        return {"response_length": tokens / n, "ended": sum(self.ended) / n}

    def learnt(self, config: TrainConfig) -> Sequences:
        """The sequences, masked where they have no reward, or are truncated and not to be kept."""
        pairs = zip(self.scores.kept, self.ended, strict=True)
        return self.rollout.seqs.kept(
            [kept and (end or config.keep_truncated) for kept, end in pairs]
        )

    def rows(self, index: list[int]) -> Experience:
        """The samples at `index`."""
        rows = torch.tensor(index, device=self.rollout.logprobs.device)
        return Experience(
            [self.prompts[i] for i in index],
            [self.texts[i] for i in index],
            self.rollout.rows(rows),
            self.scores.rows(index),
            [self.ended[i] for i in index],
            None if self.token_rewards is None else self.token_rewards[rows],
        )


def joined(samples: list[Experience]) -> Experience:
    """Samples of several rollouts in one."""
    return Experience(
        [text for s in samples for text in s.prompts],
        [text for s in samples for text in s.texts],
        Rollout.joined([s.rollout for s in samples]),
        Scores.joined([s.scores for s in samples]),
        [end for s in samples for end in s.ended],
    )


class Scored(NamedTuple):
    """Constants of one batch: old policy, reference and value of each response token, (B, R).

    The values are 0 without a critic. `frozen_out` (B, P + R, H) is the frozen layers' output,
    None when nothing is frozen. `teacher` has a teacher's log-probabilities (B, R) with "pg", its
    last hidden states (B, R, H) with a divergence of whole distributions.
    """

    old: Tensor
    ref: Tensor
    values: Tensor
    frozen_out: Tensor | None
    teacher: Tensor | None = None

    def rows(self, index: Tensor) -> Scored:
        """The constants at row indices `index`."""
        frozen_out, teacher = (
            None if x is None else x[index] for x in (self.frozen_out, self.teacher)
        )
        old, ref, values = self.old[index], self.ref[index], self.values[index]
        return Scored(old, ref, values, frozen_out, teacher)


class Batch(NamedTuple):
    """Everything an update reads. Per-token tensors are (B, R) fp32 and constant.

    The loss whitens the advantages by their `moments`, None for those of groups.
    """

    seqs: Sequences
    scored: Scored
    advantages: Tensor
    returns: Tensor
    moments: ppo_fast.Moments | None
    sampled: Tensor | None = None  # the sampler's log-probabilities, where they are corrected for
    counted: Tensor | None = None  # tokens that count in the loss's divisor, if not the mask's
    correction: ppo_fast.Correction | None = None

    def rows(self, index: Tensor) -> Batch:
        """The batch at row indices `index`; the moments stay those of the whole."""
        advantages, returns = self.advantages[index], self.returns[index]
        sampled, counted = (None if x is None else x[index] for x in (self.sampled, self.counted))
        return self._replace(
            seqs=self.seqs.rows(index),
            scored=self.scored.rows(index),
            advantages=advantages,
            returns=returns,
            sampled=sampled,
            counted=counted,
        )

    def require_ratio_one(self, logprobs: Tensor) -> None:
        """Raise RuntimeError unless `logprobs` (n,) are the old ones, to the last bit."""
        old = self.seqs.flat(self.scored.old)
        if not torch.equal(logprobs, old):
            gap = (logprobs - old).abs().max().item()
            raise RuntimeError(
                "the policy's log-probs must equal the old ones before the first optimiser step,"
                f" got a difference of {gap}: the model's forward is not deterministic"
                " (dropout, or kernels that differ between runs)"
            )


def supported(seqs: Sequences, rollout: Rollout) -> dict[str, float]:
    """Numbers for the log on the ids that the tokens of `seqs` were drawn from, where there are.

    `support_size` is the mean number of a token that has any, `support_none` counts those without,
    which take the whole vocabulary, and `support_mb` is the memory of all. Of own samples
    `support_cut` is the mean probability that was cut, and `support_limited` counts tokens at the
    sampler's limit; of others' `support_missed` counts tokens that are not among their ids.
    """
    whole, support = seqs.support, seqs.flat_support()
    if whole is None or support is None:
        return {}
    held, none = whole.ids.nbytes + whole.offsets.nbytes, int(support.whole.sum())
    told = {
        "support_size": len(support.ids) / max(1, support.n_rows - none),
        "support_none": none,
        "support_mb": held / 1e6,
    }
    if rollout.cut is None:
        missed = support.missed(seqs.flat(seqs.response))
        return told | {"support_missed": int(missed.sum())}
    return told | {
        "support_cut": float(seqs.flat(rollout.cut.mass).mean()),
        "support_limited": int(seqs.flat(rollout.cut.limited).sum()),
    }


def make_plan(n: int, minibatches: int, micro_batch: int, generator: torch.Generator) -> Plan:
    """A fresh permutation of `n` sequences, cut into minibatches of micro-batches (rows)."""
    order = torch.randperm(n, generator=generator)
    return [list(part.split(micro_batch)) for part in order.tensor_split(minibatches)]


def advantages(
    config: TrainConfig,
    kl_coef: float,
    seqs: Sequences,
    scored: Scored,
    scores: Scores,
    backend: str,
    token_rewards: Tensor | None = None,
) -> tuple[Batch, float]:
    """The batch an update reads, and its mean KL to the reference per sequence (nats).

    With a baseline of groups, of `config.group` neighbours each, every token of a completion has
    the advantage of its score less `kl_coef` times its KL. Without a critic there are no returns.
    A teacher's part is added as in `beside_teacher`.
    """
    given = scored.old.new_tensor(scores.values) if token_rewards is None else token_rewards
    out = ppo_fast.rlhf_advantages(
        given,
        scored.old,
        scored.ref,
        scored.values,
        seqs.mask,
        kl_coef=kl_coef,
        kl_estimator=config.kl_estimator,
        score_at="last-token" if token_rewards is None else "per-token",
        gamma=config.gamma,
        lam=config.lam,
        backend=backend,
    )
    kl = float(out.kl.sum()) / max(1, int(seqs.mask.any(1).sum()))
    if config.advantages == "gae":
        batch = Batch(seqs, scored, out.advantages, out.returns, out.moments)
        return beside_teacher(config, batch, backend), kl
    shaped = given.double() - kl_coef * out.kl.sum(1, dtype=torch.float64)
    of_group = _of_groups(config, seqs, scores, shaped).to(scored.old.dtype)
    spread = torch.where(seqs.mask, of_group[:, None], torch.zeros_like(scored.old))
    batch = Batch(seqs, scored, spread, torch.zeros_like(spread), None)
    return beside_teacher(config, batch, backend), kl


def beside_teacher(config: TrainConfig, batch: Batch, backend: str) -> Batch:
    """The batch with its reward's advantages times `reward_coef`, and with "pg" the teacher's.

    A token's advantage from the teacher is `distill_coef` (log p_teacher - log p_old), as verl and
    slime have it: in expectation over the token that descends its state's KL(policy‖teacher), with
    nothing of later tokens. It keeps its size, in nats; so the reward's advantages are
    whitened here, as the loss would, and not the sum.
    """
    if config.distill is None:
        return batch
    mask, found = batch.seqs.mask, torch.zeros_like(batch.advantages)
    if config.reward_coef > 0:
        found = batch.advantages
        if batch.moments is not None:
            found = ppo_fast.whiten(found, mask, moments=batch.moments, backend=backend)
        found = config.reward_coef * found
    if (gap := _behind(config, batch.scored)) is not None:
        found = found - config.distill_coef * torch.where(mask, gap, 0.0)
    return batch._replace(advantages=found, moments=None)


def _behind(config: TrainConfig, scored: Scored) -> Tensor | None:
    """log p_old - log p_teacher of each token, (B, R), where the teacher scored tokens."""
    if config.distill != "pg" or scored.teacher is None:
        return None
    return scored.old - scored.teacher


def taught(config: TrainConfig, seqs: Sequences, scored: Scored) -> dict[str, float]:
    """For the log `divergence`, the mean of log p_old - log p_teacher over the tokens, with "pg".

    That estimates KL(policy‖teacher) of own samples (k1, Schulman 2020). Other kinds of
    distillation have a divergence of whole distributions among the loss's statistics.
    """
    gap = _behind(config, scored)
    return {} if gap is None else {"divergence": float(seqs.flat(gap).double().mean())}


def _of_groups(config: TrainConfig, seqs: Sequences, scores: Scores, shaped: Tensor) -> Tensor:
    """The advantage of each completion, (B,) fp64, against the rewarded ones of its group."""
    kept = torch.tensor(scores.kept, device=shaped.device)
    groups = torch.arange(len(shaped), device=shaped.device) // config.group
    lengths = seqs.attention[:, -seqs.mask.shape[1] :].sum(1)
    out = ppo_fast.group_advantages(
        shaped[kept],
        groups[kept],
        baseline=config.advantages,
        lengths=lengths[kept] if config.advantages == "opo" else None,
    )
    return torch.zeros_like(shaped).masked_scatter(kept, out)


@torch.no_grad()
def corrected(
    batch: Batch, rollout: Rollout, correction: ppo_fast.Correction | None, backend: str
) -> tuple[Batch, dict[str, float]]:
    """The batch with the sampler's log-probabilities, for its loss to correct, and the log's part.

    Weights multiply the policy term, beside the ratio that PPO clips, which stays 1 at the start
    (decoupled objective, Hilton et al. 2022). Over the tokens of the mask: `is_mean` of the
    weights, `is_max` of a token's e^(old − sampler's), `is_truncated` and `is_rejected` (shares of
    tokens above the bound, and dropped), `is_ess` (effective sample size (Σw)²/(n Σw²), Kong
    1992), `is_unscored` (tokens without a sampler's log-probability), `rollout_k3` (an estimate of
    the KL from the sampler).
    """
    if correction is None:
        return batch, {}
    old, mask = batch.scored.old, batch.seqs.mask
    name = "reference" if backend == "reference" else None
    out = ppo_fast.rollout_weights(
        old, rollout.logprobs, mask, correction=correction, backend=name
    )
    found = out.stats.compute()
    largest = torch.where(mask, old - rollout.logprobs, -torch.inf).nan_to_num(nan=0.0).amax()
    told = {
        "is_mean": found["weight_mean"],
        "is_max": float(largest.double().exp()),
        "is_truncated": found["frac_high"],
        "is_rejected": found["rejected_frac"],
        "is_ess": found["ess"],
        "is_unscored": found["missing"],
        "rollout_k3": found["k3_kl"],
    }
    counted = out.mask if correction.count == "kept" else mask
    return batch._replace(sampled=rollout.logprobs, counted=counted, correction=correction), told
