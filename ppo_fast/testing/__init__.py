"""Equipment of tests and benchmarks: input factories, fp64 error budgets, poisoned allocations.

An op call is data (`Call`), so one test can run every op: promote it to fp64, put its tensors in
another layout, fill its masked slots with garbage, take some of its rows.
"""

from ppo_fast.testing.budget import assert_agrees, assert_within_budget
from ppo_fast.testing.calls import Call, arguments, output, promoted, run, same_bits
from ppo_fast.testing.head_inputs import (
    DIVERGENCES,
    HEADS,
    divergence_call,
    linear_at_call,
    linear_call,
    linear_divergence_call,
    linear_ppo_call,
    logits_ppo_call,
    token_divergence_call,
    token_stats_call,
)
from ppo_fast.testing.inputs import (
    FACTORIES,
    gae_call,
    logprobs_call,
    make_mask,
    ppo_call,
    rlhf_call,
    value_call,
    whiten_call,
)
from ppo_fast.testing.layouts import LAYOUTS, laid_out, with_garbage, with_layout, with_rows
from ppo_fast.testing.poison import poisoned_allocations

__all__ = [
    "DIVERGENCES",
    "FACTORIES",
    "HEADS",
    "LAYOUTS",
    "Call",
    "arguments",
    "assert_agrees",
    "assert_within_budget",
    "divergence_call",
    "gae_call",
    "laid_out",
    "linear_at_call",
    "linear_call",
    "linear_divergence_call",
    "linear_ppo_call",
    "logits_ppo_call",
    "logprobs_call",
    "make_mask",
    "output",
    "poisoned_allocations",
    "ppo_call",
    "promoted",
    "rlhf_call",
    "run",
    "same_bits",
    "token_divergence_call",
    "token_stats_call",
    "value_call",
    "whiten_call",
    "with_garbage",
    "with_layout",
    "with_rows",
]
