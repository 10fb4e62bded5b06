"""Seeded mistakes in what the loop assumes of a model."""

from __future__ import annotations

from mutant import Mutant

MODELS = (
    Mutant(
        "a model's factor is lost", "ppo_fast/loop/head.py",
        '({} if self.scale == 1 else {"temperature": 1 / self.scale})', "{}",
        "loop_head", "factors",
    ),
    Mutant(
        "a cap behind a factor is not widened", "ppo_fast/loop/head.py",
        "else self.softcap / self.scale", "else self.softcap",
        "loop_head", "gradient_of_the_logits",
    ),
    Mutant(
        "logits that are changed in place look unchanged", "ppo_fast/loop/head.py",
        "return sent.clone()", "return sent",
        "loop_head", "masked",
    ),
    Mutant(
        "a factor gives way to the run's temperature", "ppo_fast/loop/agent.py",
        'self.config.temperature * head.get("temperature", 1.0)', "self.config.temperature",
        "loop_families", "granite",
    ),
    Mutant(
        "the reference's head is not compared", "ppo_fast/loop/first_batch.py",
        "in (self.agent.policy, self.agent.reference)", "in (self.agent.policy,)",
        "loop_head", "first_batch",
    ),
    Mutant(
        "distributions are compared in vain", "ppo_fast/loop/head.py",
        "if bool((worst > 0).any()):", "if bool((worst > 1e9).any()):",
        "loop_head", "first_batch",
    ),
    Mutant(
        "a state's mask covers what was read", "ppo_fast/loop/decoder.py",
        "seen[:, -new:] if self._stateful else seen", "seen",
        "loop_families", "recurrent",
    ),
    Mutant(
        "padding is cut where positions count it", "ppo_fast/loop/decoder.py",
        "spare if self._cuts else tokens.numel()", "spare",
        "loop_families", "bart",
    ),
    Mutant(
        "a sampler's gap stops no run", "ppo_fast/loop/first_batch.py",
        "if found is not None:", "if found == 0:",
        "loop_guards", "gap",
    ),
    Mutant(
        "the layers of images are taken for text's", "ppo_fast/loop/layers.py",
        "return len(list(shared)), len(layers) == wanted, -len(path), len(layers)",
        "return 0, len(layers) == wanted, 0, 0",
        "loop_families", "images",
    ),
    Mutant(
        "the final norm stays frozen", "ppo_fast/loop/layers.py",
        "found.extend(ran)", "found.extend(ran[:0])",
        "loop_families", "norm",
    ),
    Mutant(
        "a frozen layer trains with the one above", "ppo_fast/loop/layers.py",
        "    check_frozen(model, layers, split)\n    return split", "    return split",
        "loop_families", "share_weights",
    ),
    Mutant(
        "bf16 weights swallow their steps", "ppo_fast/loop/weights.py",
        "(p.dtype == torch.bfloat16 and p.requires_grad)", "False",
        "loop_guards", "bf16",
    ),
    Mutant(
        "a policy that is all frozen", "ppo_fast/loop/weights.py",
        "if len(frozen) == len(weights):", "if not weights:",
        "loop_guards", "trainable",
    ),
)  # fmt: skip
