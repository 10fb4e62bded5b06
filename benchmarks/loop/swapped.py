"""Functions of trainers, each in turn with what an integration puts in its place.

    python -m benchmarks.loop.swapped verl|areal
    PYTHONPATH=.:tests/integrations python -m benchmarks.loop.swapped openrlhf|skyrl|trl_grpo

with the Python of an environment that has the trainer (`make test-verl`, ... make them;
tests/integrations has stand-ins for what OpenRLHF and SkyRL import and a CPU has not, and a small
trainer of TRL's) prints the rows of docs/integrations: medians of one interleaved run, counting of
calls included. Times are of the processor, on one thread: other work on the cores does not add
to them. `apply` compares the first call of each with the trainer's own, and raises MismatchError.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.machine import describe
from benchmarks.harness.timing import interleave, median
from benchmarks.loop.swap_rows import Draws, sampler
from benchmarks.report.tables import describe_facts

BUDGET = 4.0  # seconds for each side of a row
LOGITS, HEAD, TOKENS, STEPS = (512, 50257), (512, 49152, 576), (256, 1024), (8, 512)
GAMMA, LAM, CLIP = 1.0, 0.95, 0.2

Run = Callable[[Callable[..., Any]], Any]


class Row(NamedTuple):
    """A function that is measured: its op, the place that is replaced, and a call of it."""

    what: str
    op: str
    place: str
    run: Run


def backward(leaves: list[Tensor], run: Run) -> Run:
    """The call and the gradients of its first result, summed."""

    def both(function: Callable[..., Any]) -> Any:
        found = run(function)
        first = found[0] if isinstance(found, tuple) else found
        return torch.autograd.grad(first.sum(), leaves)

    return both


def losses(x: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities, advantages, and a mask of which a tenth is 0."""
    new = x.normal(*TOKENS).abs().neg().sub(0.1).requires_grad_()
    old = new.detach() + 0.1 * x.normal(*TOKENS)
    return new, old, x.normal(*TOKENS), (x.normal(*TOKENS) > -1.28).float()


def verl_rows() -> Iterator[Row]:
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.workers.config import ActorConfig

    core, x = "verl.trainer.ppo.core_algos", Draws()
    place = "verl.utils.torch_functional:logprobs_from_logits"
    logits, tokens = x.normal(*LOGITS), x.tokens(*LOGITS)
    yield Row("log-probabilities", "logprobs", place, lambda f: f(logits, tokens))
    leaf = x.leaf(*LOGITS)
    run = backward([leaf], lambda f: f(leaf, tokens))
    yield Row("the same with backward", "logprobs", place, run)
    place = "verl.utils.torch_functional:entropy_from_logits"
    yield Row("entropy", "entropy", place, lambda f: f(logits))
    run = backward([leaf], lambda f: f(leaf))
    yield Row("the same with backward", "entropy", place, run)

    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    new, old, advantages, mask = losses(x)
    run = backward([new], lambda f: f(old, new, advantages, mask, config=config))
    place = f"{core}:compute_policy_loss_vanilla"
    yield Row("clipped loss with backward", "policy_loss", place, run)
    place = f"{core}:compute_policy_loss_sapo"
    yield Row("SAPO's loss with backward", "policy_loss", place, run)
    run = backward([new], lambda f: f(new, advantages, old, mask, CLIP))
    yield Row("value loss with backward", "value_loss", f"{core}:compute_value_loss", run)

    rewards, values = x.normal(*STEPS), x.normal(*STEPS)
    run = lambda f: f(rewards, values, torch.ones(STEPS), GAMMA, LAM)  # noqa: E731
    yield Row("GAE and whitening", "gae", f"{core}:compute_gae_advantage_return", run)

    rows, vocab, width = HEAD
    hidden, weight, head = x.leaf(rows, width), x.leaf(vocab, width), FusedLinearForPPO()
    tokens_of_head, place = x.tokens(rows, vocab), f"{FusedLinearForPPO.__module__}:"
    place += "FusedLinearForPPO.forward"
    args = head, hidden.detach(), weight.detach(), tokens_of_head
    yield Row("fused head", "linear_logprobs", place, lambda f: f(*args))
    run = backward([hidden, weight], lambda f: f(head, hidden, weight, tokens_of_head))
    yield Row("the same with backward", "linear_logprobs", place, run)


def openrlhf_rows() -> Iterator[Row]:
    importlib.import_module("openrlhf_imports")
    from openrlhf.models import PolicyLoss, ValueLoss

    x = Draws()
    place = "openrlhf.models.utils:log_probs_from_logits"
    logits, tokens = x.normal(*LOGITS), x.tokens(*LOGITS)
    yield Row("log-probabilities", "logprobs", place, lambda f: f(logits, tokens))
    leaf = x.leaf(*LOGITS)
    run = backward([leaf], lambda f: f(leaf, tokens))
    yield Row("the same with backward", "logprobs", place, run)
    place = "openrlhf.models.utils:compute_entropy"
    yield Row("entropy", "entropy", place, lambda f: f(logits))

    new, old, advantages, mask = losses(x)
    policy, value = PolicyLoss(), ValueLoss(CLIP)
    run = backward([new], lambda f: f(policy, new, old, advantages, mask))
    place = "openrlhf.models.loss:PolicyLoss.forward"
    yield Row("clipped loss with backward", "policy_loss", place, run)
    run = backward([new], lambda f: f(value, new, old, advantages, mask))
    place = "openrlhf.models.loss:ValueLoss.forward"
    yield Row("value loss with backward", "value_loss", place, run)

    values, rewards, ones = x.normal(*STEPS), x.normal(*STEPS), torch.ones(STEPS)
    place = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker."
    place += "get_advantages_and_returns"
    run = lambda f: f(SimpleNamespace(), values, rewards, ones, GAMMA, LAM)  # noqa: E731
    yield Row("GAE", "advantages", place, run)


def skyrl_rows() -> Iterator[Row]:
    importlib.import_module("skyrl_imports")
    from skyrl.train.config import AlgorithmConfig

    core, x = "skyrl.backends.skyrl_train.utils.ppo_utils", Draws()
    torch_utils, own = "skyrl.backends.skyrl_train.utils.torch_utils", AlgorithmConfig()
    logits, tokens = (part[None] for part in (x.normal(*LOGITS), x.tokens(*LOGITS)))
    leaf, place = x.leaf(1, *LOGITS), f"{torch_utils}:logprobs_from_logits"
    yield Row("log-probabilities", "logprobs", place, lambda f: f(logits, tokens))
    run = backward([leaf], lambda f: f(leaf, tokens))
    yield Row("the same with backward", "logprobs", place, run)
    place = f"{torch_utils}:chunked_entropy_from_logits"
    yield Row("entropy", "entropy", place, lambda f: f(logits))
    run = backward([leaf], lambda f: f(leaf, requires_grad=True))
    yield Row("the same with backward", "entropy", place, run)

    new, old, advantages, mask = losses(x)
    run = backward([new], lambda f: f(new, old, advantages, own, mask))
    place = f"{core}:ppo_policy_loss"
    yield Row("clipped loss with backward", "policy_loss", place, run)
    run = backward([new], lambda f: f(new, old, advantages, own, mask))
    yield Row("critic loss with backward", "value_loss", f"{core}:ppo_critic_loss", run)

    rewards, values, ones = x.normal(*STEPS), x.normal(*STEPS), torch.ones(STEPS)
    run = lambda f: f(rewards, values, ones, GAMMA, LAM)  # noqa: E731
    yield Row("GAE and whitening", "gae", f"{core}:compute_gae_advantage_return", run)


def areal_rows() -> Iterator[Row]:
    from areal.api.cli_args import PPOActorConfig
    from areal.trainer.ppo.actor import PPOActor

    logits_of, losses_of = (
        f"areal.utils.functional.{m}" for m in ("vocab_parallel", "functional")
    )
    x = Draws()
    logits, tokens, leaf = x.normal(*LOGITS), x.tokens(*LOGITS), x.leaf(*LOGITS)
    place = f"{logits_of}:gather_logprobs"
    yield Row("log-probabilities", "logprobs", place, lambda f: f(logits, tokens))
    place = f"{logits_of}:gather_logprobs_entropy"
    yield Row("with entropies", "logprobs", place, lambda f: f(logits, tokens))
    run = backward([leaf], lambda f: f(leaf, tokens))
    yield Row("the same with backward", "logprobs", place, run)

    new, old, advantages, mask = losses(x)
    keep = mask.bool()
    run = backward([new], lambda f: f(new, old, old, advantages, CLIP, keep))
    place = f"{losses_of}:ppo_actor_loss_fn"
    yield Row("clipped loss with backward", "policy_loss", place, run)
    run = backward([new], lambda f: f(new, old, advantages, CLIP, keep))
    yield Row("critic loss with backward", "value_loss", f"{losses_of}:ppo_critic_loss_fn", run)

    actor = PPOActor(PPOActorConfig(), engine=None)
    given = {k: x.normal(*STEPS) for k in ("logprobs", "values")} | {"rewards": x.normal(STEPS[0])}
    ones = {k: torch.ones(STEPS) for k in ("input_ids", "attention_mask", "loss_mask")}
    place = f"{PPOActor.__module__}:PPOActor._compute_advantages"
    yield Row("advantages", "gae", place, lambda f: f(actor, given | ones))


def trl_grpo_rows() -> Iterator[Row]:
    """The loss of a trainer that is given its log-probabilities, its metrics included."""
    rows, length = 16, 1024
    trainer = importlib.import_module("trl_grpo_run").trainer(tempfile.mkdtemp())
    trainer.current_gradient_accumulation_steps = 2
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    trainer.model.train()
    x, ones = Draws(), torch.ones(rows, length, dtype=torch.int64)
    new = x.leaf(rows, length)
    entropy = x.normal(rows, length)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (new, entropy, None)
    given = dict.fromkeys(("completion_ids", "completion_mask"), ones)
    given |= dict.fromkeys(("prompt_ids", "prompt_mask"), ones[:, :2])
    given |= {
        name: new.detach() + 0.1 * x.normal(rows, length)
        for name in ("old_per_token_logps", "ref_per_token_logps")
    }
    given |= {"advantages": x.normal(rows), "num_items_in_batch": ones.sum().float()}

    def loss(function: Callable[..., Any], options: dict[str, Any]) -> Tensor:
        for name, value in options.items():
            setattr(trainer if hasattr(trainer, name) else trainer.args, name, value)
        trainer._metrics["train"].clear()
        return function(trainer, trainer.model, dict(given))

    place = "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss"
    levels = {"token": ("dapo", "cispo", "vespo", "sapo"), "sequence": ("grpo", "cispo")}
    for level, kinds in levels.items():
        for kind, kl in itertools.product(kinds, ("no", "corrected")):
            options = {"loss_type": kind, "importance_sampling_level": level}
            options |= {"epsilon_high": 2.0 if kind == "cispo" else 0.2}
            options |= {"beta": 0.0 if kl == "no" else 0.3, "use_bias_correction_kl": kl != "no"}
            run = backward([new], partial(loss, options=options))
            yield Row(f"{kind}, {level}, {kl} KL", "loss", place, run)


def found(place: str) -> Callable[..., Any]:
    """The function at "module:name" as it is now."""
    module, _, path = place.partition(":")
    held = importlib.import_module(module)
    for name in path.split("."):
        held = getattr(held, name)
    return held  # type: ignore[return-value]


def milliseconds(row: Row, integration: Any) -> tuple[float, float]:
    """Medians of the trainer's function and of what replaces it."""
    own = found(row.place)
    with integration.patched((row.op,)):
        sides = {"own": own, "here": found(row.place)}
        for side in sides.values():
            row.run(side)  # the first call here is compared
        calls = {name: sampler(partial(row.run, side)) for name, side in sides.items()}
        taken = interleave(calls, BUDGET)
    return 1e3 * median(taken["own"]), 1e3 * median(taken["here"])


ROWS = {
    "verl": verl_rows,
    "openrlhf": openrlhf_rows,
    "skyrl": skyrl_rows,
    "areal": areal_rows,
    "trl_grpo": trl_grpo_rows,
}


def main() -> None:
    """Print the table of a trainer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trainer", choices=ROWS)
    name = parser.parse_args().trainer
    torch.set_num_threads(1)
    print(describe_facts(describe()), f"one thread; load {os.getloadavg()[0]:.1f}")
    print(f"\n| | {name} | here |\n|---|---:|---:|")
    for row in ROWS[name]():
        integration = importlib.import_module(f"ppo_fast.integrations.{name}").integration
        own, here = milliseconds(row, integration)
        print(f"| {row.what} | {own:.3g} ms | {here:.3g} ms |", flush=True)


if __name__ == "__main__":
    main()
