"""Options that `quick`, tasks, baselines and the tiny model put in place of the defaults: data."""

from __future__ import annotations

# What `--quick` puts in place of what was not given.
QUICK: dict[str, object] = {
    "model": "tiny",
    "reward": "letters",
    "updates": 30,
    "batch": 32,
    "micro_batch": 16,
    "max_new_tokens": 8,
    "train_layers": 0,
    "lr": 1e-2,
    "warmup": 1,
}

# What the tiny model does, whatever the task: it has two layers.
TINY: dict[str, object] = {"train_layers": 0}

# Without a reward there is none for the KL to be taken off.
ALONE: dict[str, object] = {"kl_coef": 0.0}

# What each task puts in place of the options' defaults, found by trial on two CPU cores.
TASK_DEFAULTS: dict[str, dict[str, object]] = {
    "sentiment": {},
    "summarize": {
        "updates": 16,
        "max_new_tokens": 16,
        "temperature": 0.8,
        "train_layers": 4,
        "lr": 2e-4,
        "warmup": 4,
        "kl_coef": 0.01,
    },
    "translate": {
        "updates": 18,
        "max_new_tokens": 10,
        "temperature": 0.6,
        "train_layers": 4,
        "lr": 4e-4,
        "warmup": 4,
        "kl_coef": 0.003,
    },
    "qa": {"updates": 15, "max_new_tokens": 6, "train_layers": 4, "lr": 2e-4, "warmup": 4},
}


# What each baseline of groups puts in place of the defaults: eight prompts, four times each, and
# the KL where its paper has it. RLOO and REINFORCE++ keep it in the reward.
_GROUPS: dict[str, object] = {"batch": 8, "group": 4}
_NO_KL: dict[str, object] = {**_GROUPS, "kl_coef": 0.0}
ADVANTAGE_DEFAULTS: dict[str, dict[str, object]] = {
    "grpo": {**_NO_KL, "loss_kl_coef": 0.04},  # Shao et al. 2024, DeepSeekMath, section 4.2
    "grpo-batch-std": _NO_KL,
    "grpo-passk": _NO_KL,
    "dr_grpo": _NO_KL,
    "opo": _NO_KL,
    "maxrl": _NO_KL,
    "rloo": _GROUPS,
    "reinforce++": _GROUPS,
}
