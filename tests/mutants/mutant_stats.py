"""Seeded mistakes of token statistics, the optimal token baseline and groups of several scores."""

from __future__ import annotations

from mutant import Mutant

STATS_CPU = (
    Mutant(
        "a square is not moved twice to a new maximum",
        "csrc/cpu/softmax/token_stats_simd.h",
        "squares = squares * scale * scale;",
        "squares = squares * scale;",
        "linear_token_stats",
        "instruction",
    ),
    Mutant(
        "a later equal block takes the first one's place",
        "csrc/cpu/softmax/token_stats_simd.h",
        "while (top + 1 < end && !(x[top] == state.peak)) ++top;",
        "while (top + 1 < end && x[top] == state.peak) ++top;",
        "linear_token_stats",
        "likeliest and cpu",
    ),
    Mutant(
        "a segment's squares keep its own maximum",
        "csrc/cpu/softmax/token_stats.cpp",
        "squares += parts[i].squares * scale * scale;",
        "squares += parts[i].squares;",
        "linear_token_stats",
        "instruction",
    ),
    Mutant(
        "an equal segment further on is the likeliest",
        "csrc/cpu/softmax/token_stats.cpp",
        "if (parts[i].peak > parts[best].peak) best = i;",
        "if (parts[i].peak >= parts[best].peak) best = i;",
        "linear_token_stats",
        "likeliest and cpu",
    ),
)

STATS_TRITON = (
    Mutant(
        "a square is moved once to a lane's new maximum",
        "kernels/token_stats.py",
        "return total * factor, tl.fma(shift, total, dot) * factor, squares * factor * factor",
        "return total * factor, tl.fma(shift, total, dot) * factor, squares * factor",
        "linear_token_stats",
        "within_budget and triton",
    ),
    Mutant(
        "a lane's last equal step counts",
        "kernels/token_stats.py",
        "step = tl.where(best > top, col, step)",
        "step = tl.where(best >= top, col, step)",
        "linear_token_stats",
        "likeliest and triton",
    ),
    Mutant(
        "columns beyond the row count in its mean",
        "kernels/token_stats.py",
        "x = tl.where(col + u * LANES + lanes < end, x, 0.0)",
        "x = tl.where(col + u * LANES + lanes < end, x, 1.0)",
        "linear_token_stats",
        "within_budget and triton",
    ),
    Mutant(
        "segments' squares are not moved",
        "kernels/token_stats.py",
        "pair_sums(squares * factor * factor, means, SEGMENTS)",
        "pair_sums(squares, means, SEGMENTS)",
        "linear_token_stats",
        "within_budget and triton and segments",
    ),
)

STATS = (
    Mutant(
        "a share's squares are moved once",
        "ppo_fast/ops/linear_token_stats.py",
        "(log_sum_sq + 2 * (row_max - whole.row_max.double())).exp()",
        "(log_sum_sq + (row_max - whole.row_max.double())).exp()",
        "head_parallel",
        "statistics",
    ),
    Mutant(
        "a later share's equal id is the likeliest",
        "ppo_fast/ops/linear_token_stats.py",
        "top = torch.where(own_peak > best, own_top, top)",
        "top = torch.where(own_peak >= best, own_top, top)",
        "head_parallel",
        "statistics",
    ),
    Mutant(
        "a row that is no distribution has a likeliest id",
        "ppo_fast/ops/linear_token_stats.py",
        "(part.top == s.tokens) & ~part.log_sum.isnan() & ~nowhere",
        "(part.top == s.tokens) & ~nowhere",
        "linear_token_stats",
        "no_distribution and cpu",
    ),
    Mutant(
        "statistics carry a gradient",
        "ppo_fast/ops/linear_token_stats.py",
        "given = _detached(given)",
        "given = given._replace()",
        "linear_token_stats",
        "constants",
    ),
    Mutant(
        "the energy of a step is its own alone",
        "ppo_fast/ops/optimal_token_baseline.py",
        "_kept(keep, w).cumsum(-1)",
        "_kept(keep, w)",
        "optimal_token_baseline",
        "verl",
    ),
    Mutant(
        "importance weights scale the energy once",
        "ppo_fast/ops/optimal_token_baseline.py",
        "_kept(keep, is_weights.expand(rewards.shape)).square()",
        "_kept(keep, is_weights.expand(rewards.shape))",
        "optimal_token_baseline",
        "verl",
    ),
    Mutant(
        "the end of the longest response is its own baseline",
        "ppo_fast/ops/optimal_token_baseline.py",
        "groups.sum(keep.double()) > 1",
        "groups.sum(keep.double()) > 0",
        "optimal_token_baseline",
        "verl or lone",
    ),
    Mutant(
        "gdpo forgets the standardisation over the batch",
        "ppo_fast/ops/group_advantages.py",
        "out = (total - _mean(total)) / (_variance(total).sqrt() + eps)",
        "out = total",
        "group_advantages",
        "gdpo",
    ),
    Mutant(
        "gdpo takes every score alike",
        "ppo_fast/ops/group_advantages.py",
        "out.sum(-1) if weights is None else out @ weights.detach().double()",
        "out.sum(-1)",
        "advantage_presets_group",
        "trl",
    ),
)
