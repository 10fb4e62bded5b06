"""Seeded mistakes of recognising and patching a trainer."""

from __future__ import annotations

from mutant import Mutant

_CONTENT = "ppo_fast/integrations/_content.py"
_PATCH = "ppo_fast/integrations/_patch.py"
_AREAL = "ppo_fast/integrations/areal.py"
_SKYRL = "ppo_fast/integrations/skyrl.py"

TRAINERS = (
    Mutant(
        "a changed statement of a trainer is known",
        _CONTENT,
        "return self.fits(other) and self.statements == other.statements",
        "return self.fits(other)",
        "known",
        "changed_source",
    ),
    Mutant(
        "a trainer's default that changed is known",
        _CONTENT,
        "    if default is None:\n",
        "    if default is not None or True:\n",
        "known",
        "changed_source",
    ),
    Mutant(
        "statements have no place in the nesting",
        _CONTENT,
        "_digest(path + _dump(node))",
        "_digest(_dump(node))",
        "known",
        "changed_source",
    ),
    Mutant(
        "a name that a block sets for new code is not looked at",
        _CONTENT,
        "return self.takes == other.takes and set(other.gives) <= set(self.gives)",
        "return self.takes == other.takes",
        "known",
        "changed_source",
    ),
    Mutant(
        "texts of all statements are those of errors",
        _CONTENT,
        "    if isinstance(x, ast.Raise):\n",
        "    if isinstance(x, ast.stmt):\n",
        "known",
        "text_of_a_statement",
    ),
    Mutant(
        "a backward is not part of an autograd function's source",
        _CONTENT,
        '("forward", "setup_context", "backward")',
        '("forward", "setup_context")',
        "known",
        "autograd",
    ),
    Mutant(
        "an untested version is patched without a word",
        _PATCH,
        "        elif not check.tested:\n",
        "        elif check.tested and not check.tested:\n",
        "known",
        "untested",
    ),
    Mutant(
        "unknown source with other names is patched if the user says so",
        _PATCH,
        'if check.unknown and (unknown == "refuse" or not check.fits):',
        'if check.unknown and unknown == "refuse":',
        "known",
        "other_names",
    ),
    Mutant(
        "a place that is not optional may be missing",
        _PATCH,
        "if not (swap.optional and isinstance(error, NoPlaceError)):",
        "if not isinstance(error, NoPlaceError):",
        "patch",
        "place_that_is_not_there",
    ),
    Mutant(
        "the first alternative is taken whatever its statements are",
        _PATCH,
        "if swap.having and not any(s.text.startswith(swap.having) for s in statements):",
        "if swap.having and not statements:",
        "known",
        "alternatives",
    ),
    Mutant(
        "modules are those of the package's name",
        _PATCH,
        "return self.module or self.package",
        "return self.package",
        "patch",
        "another_name",
    ),
    Mutant(
        "a cap of the ratio below 1 is a dual clip",
        "ppo_fast/integrations/_grpo.py",
        "ratio.clamp(max=least), ratio.clamp(low, most)",
        "ratio.clamp(max=most), ratio.clamp(low, most)",
        "trl_grpo",
        "two_sided",
    ),
    Mutant(
        "a registry that a class holds is not patched",
        "ppo_fast/integrations/_places.py",
        "if type(x) is dict)",
        "if type(x) is list)",
        "patch",
        "import_site",
    ),
    Mutant(
        "skyrl: a rejected token keeps its weight",
        _SKYRL,
        "weights = torch.where(mask != 0, weights, 0.0)",
        "weights = torch.where(mask != 0, weights, weights)",
        "skyrl",
        "corrections",
    ),
    Mutant(
        "skyrl: dppo counts tokens without advantage as dropped",
        _SKYRL,
        "dropped & (t.advantages != 0)",
        "dropped",
        "skyrl",
        "dppo",
    ),
    Mutant(
        "skyrl: the critic's mean is over rows with a token alone",
        _SKYRL,
        "denom=float(len(values)),",
        "denom=None,",
        "skyrl",
        "value_loss",
    ),
    Mutant(
        "areal: a divisor without the tokens that rejection sampling drops",
        _AREAL,
        "loss_mask, weights = found.loss_mask, found.behave_imp_weight",
        "loss_mask, weights = found.loss_mask, found.behave_imp_weight\n"
        "        count = loss_mask.count_nonzero()",
        "areal",
        "actor_loss",
    ),
    Mutant(
        "areal: a value follows sequences that have ended",
        _AREAL,
        "torch.where(seq_no_eos_mask, values[:, -1], 0.0)",
        "values[:, -1]",
        "areal",
        "gae",
    ),
    Mutant(
        "areal: shards of a vocabulary are taken for the whole",
        _AREAL,
        "group = tp_group if shared else None",
        "group = None if shared else tp_group",
        "areal",
        "shared_vocabulary",
    ),
)
