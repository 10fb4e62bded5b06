"""Mistakes in losses whose sequences are split over ranks."""

from __future__ import annotations

from mutant import Mutant

_SEQUENCES, _POLICY = "ppo_fast/_sequences.py", "ppo_fast/ops/policy.py"
_SURROGATE, _STATS = "ppo_fast/ops/surrogate.py", "ppo_fast/ops/policy_loss.py"


def _mutant(name: str, path: str, before: str, after: str, select: str = "add_up") -> Mutant:
    return Mutant(name, path, before, after, "context_group", select)


CONTEXT = (
    _mutant(
        "a sequence's sum learns from its own rank alone",
        _SEQUENCES,
        "mine = _Gathered.apply(grad, ctx.group)[:, dist.get_rank(ctx.group)]",
        "mine = grad[dist.get_rank(ctx.group)][None]",
    ),
    _mutant(
        "a rank without tokens leaves the graph",
        _SEQUENCES,
        "return rows.sum(1) + empty",
        "return rows.new_full((rows.shape[0],), empty)",
    ),
    _mutant(
        "parts are added with the own one first",
        _SEQUENCES,
        "functools.reduce(torch.add, parts.unbind(0))",
        "functools.reduce(torch.add, parts.roll(-dist.get_rank(), 0).unbind(0))",
        "same_bits",
    ),
    _mutant(
        "a sequence is counted once a rank",
        _STATS,
        "n_seqs=whole.once((whole.tokens > 0).sum())",
        "n_seqs=(whole.tokens > 0).sum()",
        "count_a_sequence",
    ),
    _mutant(
        "D is counted once a rank",
        _STATS,
        "loss_denom=whole.once(own)",
        "loss_denom=own",
        "count_a_sequence",
    ),
    _mutant(
        "gspo's ratio of a part",
        _POLICY,
        'if new.seqs is not None and g.variant == "gspo":',
        'if new.seqs is None and g.variant == "gspo":',
    ),
    _mutant(
        "the width of a part in D",
        _SEQUENCES,
        "return self.keep.shape[-1] if self.group is None else self._counts[-1]",
        "return self.keep.shape[-1]",
    ),
    _mutant(
        "D of what a part keeps",
        _SEQUENCES,
        "return self.keep.sum(dtype=torch.float64) if self.group is None else self._counts[-2]",
        "return self.keep.sum(dtype=torch.float64)",
    ),
    _mutant(
        "a bound on KL by a part's ratio",
        _SURROGATE,
        'inside = level != "token" and (by_ratio or options.kl_ratio_clip is not None)',
        'inside = level != "token" and by_ratio',
    ),
    _mutant(
        "a correction of a part of the sequence",
        "ppo_fast/ops/rollout_weights.py",
        'if backend == "cpu" and not parts:',
        'if backend == "cpu":',
    ),
    _mutant(
        "statistics of a part's ratio",
        _SURROGATE,
        'if policy.whole is not None and policy.given.ratio_level != "token":',
        'if policy.whole is None and policy.given.ratio_level != "token":',
    ),
    _mutant(
        "ranks with other options go on",
        "ppo_fast/ops/context.py",
        "    if others:\n",
        "    if False:\n",
        "refused",
    ),
)
