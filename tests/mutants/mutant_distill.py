"""Seeded mistakes in what the loop learns from a teacher."""

from __future__ import annotations

from mutant import Mutant

_EXPERIENCE = "ppo_fast/loop/data/experience.py"
_UPDATE = "ppo_fast/loop/update.py"
_SCORE = "ppo_fast/loop/score.py"
_AGENT = "ppo_fast/loop/model/agent.py"
_TEACHER = "ppo_fast/loop/model/teacher.py"
_DISTILL = "ppo_fast/loop/distill.py"

DISTILL = (
    Mutant(
        "the policy flees its teacher",
        _EXPERIENCE,
        "found = found - config.distill_coef *",
        "found = found + config.distill_coef *",
        "loop_distill",
        "advantages_are",
    ),
    Mutant(
        "the reward's advantages are not whitened beside a teacher's",
        _EXPERIENCE,
        "        if batch.moments is not None:\n            found = ppo_fast.whiten",
        "        if False:\n            found = ppo_fast.whiten",
        "loop_distill",
        "advantages_are and beside",
    ),
    Mutant(
        "a teacher's advantages are whitened with the reward's",
        _EXPERIENCE,
        "return batch._replace(advantages=found, moments=None)",
        "return batch._replace(advantages=found)",
        "loop_distill",
        "advantages_are and alone",
    ),
    Mutant(
        "the teacher has the policy's temperature",
        _AGENT,
        "own = self.config.distill_temperature if tower is self.teacher else None",
        "own = None",
        "loop_distill",
        "gradients_are and reference and reverse",
    ),
    Mutant(
        "the divergence has no coefficient",
        _UPDATE,
        "        coef=config.distill_coef,\n",
        "",
        "loop_distill",
        "gradients_are and reference and reverse",
    ),
    Mutant(
        "the divergence's beta is the default",
        _UPDATE,
        "        beta=config.distill_beta,\n",
        "",
        "loop_distill",
        "gradients_are and reference and jsd",
    ),
    Mutant(
        "each rank has its own share of the teacher alone",
        _SCORE,
        "for held in (scored.frozen_out, scored.teacher):",
        "for held in (scored.frozen_out,):",
        "loop_parallel",
        "number_of_processes and taught",
    ),
    Mutant(
        "a critic learns of nothing",
        _AGENT,
        "if config.has_critic:",
        'if config.advantages == "gae":',
        "loop_distill",
        "needs_no_critic",
    ),
    Mutant(
        "a teacher of any vocabulary",
        _TEACHER,
        "if size is not None and own is not None and size != own:",
        "if False:",
        "loop_teachers",
        "vocabulary or both_sizes",
    ),
    Mutant(
        "a teacher of any tokenizer",
        _DISTILL,
        "    if differ:\n",
        "    if False:\n",
        "loop_teachers",
        "another_tokenizer",
    ),
    Mutant(
        "another teacher's run is resumed",
        "ppo_fast/loop/ppo.py",
        'kept["the teacher\'s sha256"] = teacher',
        "pass",
        "loop_distill",
        "resumed",
    ),
)
