"""Seeded mistakes in the weights and rejections of other policies' samples."""

from __future__ import annotations

from mutant import Mutant

_KERNEL = "csrc/cpu/rollout/rollout_weights_simd.h"
_CALL = "csrc/cpu/rollout/rollout_weights.cpp"
_TESTS = "rollout_weights"

ROLLOUT_CPU = (
    Mutant(
        "masked lanes lower the smallest x",
        _KERNEL,
        "so_far = vmin(which == LaneMask::every ? x : select(at.live, x, so_far), so_far);",
        "so_far = vmin(x, so_far);",
        _TESTS,
    ),
    Mutant(
        "masked lanes count in the sum of squared ratios",
        _KERNEL,
        "sums.ratio_sq.add_square(at.only(e.exp));",
        "sums.ratio_sq.add_square(e.exp);",
        _TESTS,
    ),
    Mutant(
        "a missing token keeps its NaN",
        _KERNEL,
        "x = select(missing, set1<T>(0), x);",
        "",
        _TESTS,
    ),
    Mutant(
        "what the clamp takes is lost to the sequence",
        _KERNEL,
        "if (any(bounded != x)) sums.excess.add(x - bounded);",
        "",
        _TESTS,
    ),
    Mutant(
        "masking clamps",
        _KERNEL,
        "if (c.masks) w = select(below | above, set1<T>(0), ratio);",
        "",
        _TESTS,
    ),
    Mutant(
        "k3 of a token is not bounded",
        _KERNEL,
        "(bounded <= c.x_high) & (e.k3 <= c.k3);",
        "(bounded <= c.x_high);",
        _TESTS,
    ),
    Mutant(
        "a sequence's later segments stay unweighed",
        _CALL,
        "std::fill(&verdicts[i], &verdicts[0] + end, v);",
        "verdicts[i] = v;",
        _TESTS,
    ),
    Mutant(
        "the largest k2 is that of the largest x",
        _CALL,
        "const double far = std::max(-s.x_min, s.x_max)",
        "const double far = s.x_max",
        _TESTS,
    ),
    Mutant(
        "the mean over all slots of the sequence's first segment",
        _CALL,
        "sum.tokens += more.tokens, sum.missing",
        "sum.missing",
        _TESTS,
    ),
    Mutant(
        "a token's bound of k2 is one of x alone",
        _CALL,
        "w.low = std::max(w.low, -reach), w.high = std::min(w.high, reach);",
        "w.high = std::min(w.high, reach);",
        _TESTS,
    ),
    Mutant(
        "a rejected sequence is counted by its rejected tokens",
        _CALL,
        "totals[K::rejected] = v.accepted ? s.rejected : n;",
        "totals[K::rejected] = s.rejected;",
        _TESTS,
    ),
    Mutant(
        "a flat call is a sequence",
        _CALL,
        "if (!per_sequence) return v;",
        "",
        _TESTS,
    ),
)

ROLLOUT = (
    Mutant(
        "the largest k1 bounds the largest x",
        "ppo_fast/corrections.py",
        'where = {"seq-min": "seq-max", "seq-max": "seq-min"}.get(where, where)',
        "pass",
        _TESTS,
    ),
    Mutant(
        "k1 has the ratio's sign",
        "ppo_fast/corrections.py",
        "low, high = -high, -low",
        "pass",
        _TESTS,
    ),
    Mutant(
        "the mean of sequences over tokens",
        "ppo_fast/ops/rollout_weights.py",
        'stats.field("seqs")]',
        'stats.field("tokens")]',
        "rollout_weights_rules rollout_weights_presets",
    ),
    Mutant(
        "sequences far off are dropped whatever their advantage",
        "ppo_fast/ops/rollout_weights.py",
        "(advantages.detach() < 0) & far",
        "far",
        "rollout_weights_rules rollout_weights_presets",
    ),
    Mutant(
        "a sequence's sum in place of its mean",
        "ppo_fast/ops/rollout_weights.py",
        "far = seqs.mean(gap) > bound",
        "far = seqs.sum(gap) > bound",
        "rollout_weights_rules rollout_weights_presets",
    ),
)
