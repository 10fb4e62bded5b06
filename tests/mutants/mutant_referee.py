"""Seeded mistakes of the referee: its formulas, its diagnosis, its command."""

from __future__ import annotations

from mutant import Mutant

REFEREE = (
    Mutant(
        "the referee's denominator is each micro-batch's",
        "ppo_fast/referee/formulas/reduction.py",
        'if scope in ("step", "local"):',
        'if scope == "local":',
        "referee_formulas",
        "policy_loss",
    ),
    Mutant(
        "the referee's dual clip holds positive advantages",
        "ppo_fast/referee/formulas/losses.py",
        'signs = {"negative": a < 0,',
        'signs = {"negative": a > 0,',
        "referee_formulas",
        "policy_loss",
    ),
    Mutant(
        "the referee's k3 has its sign turned",
        "ppo_fast/referee/formulas/tokens.py",
        "value, size = (-gap).exp() - 1 + gap",
        "value, size = gap.exp() - 1 - gap",
        "referee_formulas",
        "kl",
    ),
    Mutant(
        "the referee's GAE counts masked tokens as steps",
        "ppo_fast/referee/formulas/advantages.py",
        'moves = keep if self.holes == "skip"',
        'moves = keep if self.holes == "zero"',
        "referee_formulas",
        "token_gae",
    ),
    Mutant(
        "the referee's batches hold numbers that are not fp32's",
        "ppo_fast/referee/cases.py",
        "per_sequence).to(torch.float32).to(torch.float64)",
        "per_sequence).to(torch.float64)",
        "referee_formulas",
        "batches",
    ),
    Mutant(
        "a difference within a hundredth is rounding",
        "ppo_fast/referee/judge.py",
        "(eps * size + torch",
        "(1e4 * eps * size + torch",
        "referee",
        "planted and clip",
    ),
    Mutant(
        "the first change that helps is taken, not the best",
        "ppo_fast/referee/judge.py",
        "if len(cases) < most:",
        "if len(cases) < most and best is None:",
        "referee",
        "planted",
    ),
    Mutant(
        "a difference leaves the exit status at 0",
        "ppo_fast/referee/verify.py",
        "if self.findings:\n            return 1",
        "if not self.parts:\n            return 1",
        "referee",
        "json or text",
    ),
)
