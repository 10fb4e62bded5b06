"""Seeded mistakes in the checks of rewards, prompts, stored rows and foreign arrays."""

from __future__ import annotations

from mutant import Mutant

INPUTS = (
    Mutant(
        "a reward that is infinite in fp32",
        "ppo_fast/loop/values.py",
        "abs(number) <= LARGEST_FP32",
        "abs(number) <= 1.7e308",
        "loop_reward_calls",
        "fp32",
    ),
    Mutant(
        "shaping leaves fp32",
        "ppo_fast/loop/rewards/scoring.py",
        "if is_fp32(number):\n            out",
        "if number == number:\n            out",
        "loop_reward_calls",
        "shaping",
    ),
    Mutant(
        "token rewards add up to infinity",
        "ppo_fast/loop/data/transitions.py",
        "sum(map(abs, rewards))",
        "max(map(abs, rewards))",
        "loop_texts",
        "sum",
    ),
    Mutant(
        "a dict's keys are rewards",
        "ppo_fast/loop/rewards/calls.py",
        "bytearray, Mapping, Set)",
        "bytearray, Set)",
        "loop_reward_calls",
        "order",
    ),
    Mutant(
        "imaginary parts are left out",
        "ppo_fast/loop/rewards/calls.py",
        'getattr(dtype, "kind", "") == "c"',
        "False",
        "loop_reward_calls",
        "fp32",
    ),
    Mutant(
        "the reward edits the run's own texts",
        "ppo_fast/loop/rewards/calls.py",
        "reward(list(prompts), list(completions))",
        "reward(prompts, completions)",
        "loop_reward_calls",
        "edits",
    ),
    Mutant(
        "autocast left on by a reward",
        "ppo_fast/loop/rewards/settings.py",
        "with torch.inference_mode(False):",
        "with torch.enable_grad():",
        "loop_reward_calls",
        "put_back",
    ),
    Mutant(
        "one text is a list of letters",
        "ppo_fast/loop/data/prompts.py",
        "if isinstance(prompts, (str, bytes, Mapping)):",
        "if isinstance(prompts, Mapping):",
        "loop_texts",
        "no_list",
    ),
    Mutant(
        "a run without any reward goes on",
        "ppo_fast/loop/rewards/watch.py",
        "if any(scores.kept):",
        "if scores.values:",
        "loop_no_reward",
        "first_batch",
    ),
    Mutant(
        "the mask of a masked array is lost",
        "ppo_fast/compat.py",
        "if _is_masked(array):",
        "if False:",
        "array_kinds",
    ),
)
