"""TRL's GRPOTrainer: its loss by `loss_type`, group advantages, log-probabilities, entropies.

A real trainer with a tiny model is made, and its `_compute_loss` is called. Its log-probabilities
and entropies are given, in the place of a forward of that model; for two ranks its accelerator is
a stand-in that knows their number.
"""

from __future__ import annotations

import importlib
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppo_fast.referee.cases import Groups, Tokens
from ppo_fast.referee.formulas.advantages import GroupAdvantages
from ppo_fast.referee.formulas.losses import PolicyLoss
from ppo_fast.referee.formulas.tokens import Entropy, LogProbs
from ppo_fast.referee.judge import Given
from ppo_fast.referee.statements import of_function
from ppo_fast.referee.trainers import (
    Function,
    Missing,
    Probe,
    Window,
    over_step,
    values_and_gradient,
)

PACKAGE = "trl"
OPTIONS: dict[str, Any] = {
    "loss_type": "dapo",
    "beta": 0.0,
    "use_bias_correction_kl": True,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "entropy_coef": 0.0,
    "scale_rewards": "group",
    "temperature": 1.0,
}
_WIDTH = 64
_REDUCTIONS = {
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
    "dapo": "token-mean",
    "cispo": "token-mean",
}
_DOCUMENTED = {
    "denominator.micro-batch": "GRPOConfig's documentation of loss_type 'bnpo': normalised over"
    " the local batch, so that results may vary with its size; 'dapo' is over the step",
    "clip.itself": "GRPOConfig's documentation: with loss_type 'cispo', epsilon_high is ScaleRL's"
    " ε_max, for which it recommends 5.0",
    "entropy.micro-batch": "code comment: a mean over the micro-batch's tokens, scaled for"
    " accumulation alone",
}


def probes(options: dict[str, Any]) -> list[Probe | Missing]:
    """Every part of GRPO that runs on a CPU."""
    utils: Any = importlib.import_module("trl.trainer.utils")
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    heat = {"temperature": options["temperature"]}
    branch = "if self.multi_objective_aggregation == 'sum_then_normalize':"
    return [
        _policy_loss(options, trainer),
        Probe(
            "group_advantages",
            of_function(trainer._generate_and_score_completions, branch, branch),
            partial(_advantages, options),
            GroupAdvantages(scale=options["scale_rewards"], eps=1e-4),
            "groups",
            taken=("1e-4 is added to the deviation",),
        ),
        Probe(
            "logprobs",
            utils.selective_log_softmax,
            values_and_gradient(
                lambda f, x, b: f(x, b.labels, temperature=b.temperature), "logits"
            ),
            LogProbs(),
            "logits",
            heat,
        ),
        Probe(
            "entropy",
            utils.entropy_from_logits,
            values_and_gradient(lambda f, x, b: f(x / b.temperature), "logits"),
            Entropy(),
            "logits",
            heat,
        ),
    ]


def _policy_loss(options: dict[str, Any], trainer_type: Any) -> Probe | Missing:
    kind, low, high = options["loss_type"], options["epsilon"], options["epsilon_high"]
    if kind not in _REDUCTIONS:
        known = ", ".join(_REDUCTIONS)
        return Missing("policy_loss", f"no formula here for loss_type {kind}, one of {known}")
    high = low if high is None else high
    of_kind: dict[str, dict[str, Any]] = {
        "cispo": {"surrogate": "cispo", "clip_low": None},
        "sapo": {
            "surrogate": "sapo",
            "tau": (options["sapo_temperature_pos"], options["sapo_temperature_neg"]),
        },
    }
    if options["delta"] is not None and kind not in of_kind:
        if options["delta"] < 1 + high:
            return Missing("policy_loss", "no formula here for a delta below 1 + epsilon_high")
        of_kind[kind] = {"dual_clip": options["delta"]}
    formula = PolicyLoss(
        **{
            "level": options["importance_sampling_level"],
            "clip_low": low,
            "clip_high": high,
            "reduction": _REDUCTIONS[kind],
            "divisor": float(_WIDTH),
            "kl_coef": options["beta"],
            "kl_weight": "ratio" if options["use_bias_correction_kl"] else None,
            "entropy_coef": options["entropy_coef"],
            "entropy_reduction": "token-mean",
            **of_kind.get(kind, {}),
        }
    )
    trainer = _Trainer(options)
    return Probe(
        "policy_loss",
        trainer_type._compute_loss,
        over_step(trainer.loss, entropies=bool(options["entropy_coef"])),
        formula,
        case={"edges": formula.edges, "per_sequence": True},
        left_out=dict.fromkeys(
            ("uneven-rows", "uneven-ranks"), "TRL's micro-batches have equal numbers of sequences"
        ),
        documented=_DOCUMENTED,
    )


class _Trainer:
    """A GRPOTrainer of TRL's with a tiny model, in a folder that goes with it."""

    def __init__(self, options: dict[str, Any]) -> None:
        trl: Any = importlib.import_module("trl")
        transformers: Any = importlib.import_module("transformers")
        datasets: Any = importlib.import_module("datasets")
        transformers.utils.logging.disable_progress_bar()
        self.folder = tempfile.TemporaryDirectory()
        name = f"{self.folder.name}/model"
        sizes = {"vocab_size": 8, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
        config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
        transformers.GPT2LMHeadModel(config).save_pretrained(name)
        model = transformers.GPT2LMHeadModel.from_pretrained(name)
        args = trl.GRPOConfig(
            output_dir=self.folder.name,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=_WIDTH,
            **{k: v for k, v in options.items() if v is not None},
        )
        self.trainer = trl.GRPOTrainer(
            model=model,
            processing_class=_words(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 4),
        )
        self.trainer.model.train()

    def loss(self, function: Function, batch: Tokens, window: Window) -> Tensor:
        """The loss of one micro-batch, as TRL's training step calls it."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = window.micro_batches
        trainer.args.steps_per_generation = window.micro_batches
        trainer.accelerator = SimpleNamespace(
            num_processes=window.ranks,
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            reduce=lambda x, reduction: x,
            sync_gradients=True,
            device=torch.device("cpu"),
        )
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
            batch.logprobs,
            batch.entropies,
            None,
        )
        ones = torch.ones(len(batch.mask), 1, dtype=torch.int64)
        inputs = {
            "prompt_ids": ones,
            "prompt_mask": ones,
            "completion_ids": batch.mask.long(),
            "completion_mask": torch.ones_like(batch.mask).long(),
            "tool_mask": batch.mask.long(),
            "advantages": batch.advantages[:, 0],
            "old_per_token_logps": batch.old_logprobs,
            "ref_per_token_logps": batch.ref_logprobs,
            "num_items_in_batch": torch.tensor(float(window.tokens)),
        }
        return function(trainer, trainer.model, inputs)


def _words() -> Any:
    """A tokenizer of eight words."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    words = ["<pad>", "<eos>", *"abcdef"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="a"
    )


def _advantages(options: dict[str, Any], function: Function, batch: Groups) -> Given:
    own = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=options["scale_rewards"],
        reward_weights=torch.ones(1),
    )
    found = function(
        self=own,
        rewards_per_func=batch.scores.float()[:, None],
        unscorable_mask=torch.zeros(len(batch.scores), dtype=torch.bool),
        num_generations=4,
        device=torch.device("cpu"),
    )
    return {"value": found["advantages"]}
