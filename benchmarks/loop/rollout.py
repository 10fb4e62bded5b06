"""Tokens a second of the loop's sampling against `model.generate` at the same settings.

    python -m benchmarks.loop.rollout --model smollm2 --shapes 16x16 8x64

Prompts are the first six words of film reviews. With "EOS on" a full stop ends a completion too,
so that rows end at different times. Tokens are those up to a row's EOS; `ppo_fast` keeps each
one's log-probability besides, which `model.generate` does not. Both are called in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.run import Trainer, load_trainer
from ppo_fast.loop.sampling.generate import generate
from ppo_fast.loop.sampling.sampler import encode

# fp32 sums in another order than the training forward's: 2**-24 times a condition below 1e4.
_GAP = 2**-24 * 1e4


class Workload:
    """One batch of prompts and how to continue it, by either provider."""

    def __init__(self, trainer: Trainer, batch: int, steps: int, eos: list[int]) -> None:
        self.model, self.eos, self.steps = trainer.agent.policy.model, eos, steps
        self.backend = trainer.backend
        prompts = [prompt.text for prompt in trainer.prompts.next(batch)]
        self.tokens, self.attention = encode(trainer.tokenizer, prompts, trainer.device)
        self.generator = torch.Generator(trainer.device).manual_seed(0)

    def ours(self) -> Sequences:
        return self._rollout(1.0).seqs

    def theirs(self) -> Tensor:
        return self._generate(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    def count(self, response: Tensor) -> int:
        """Tokens up to the first EOS of each row, (B, R)."""
        ended = torch.isin(response, response.new_tensor(self.eos)).cumsum(1)
        before = torch.cat([torch.zeros_like(ended[:, :1]), ended[:, :-1]], dim=1)
        return int((before == 0).sum())

    def check(self) -> None:
        """Log-probs are the training forward's, and nearly greedy draws the greedy tokens."""
        seqs, logprobs, _ = self._rollout(1.0)
        with torch.no_grad():
            logits, _ = Tower(self.model, 0).logits(seqs)
        again = torch.log_softmax(logits, -1).gather(1, seqs.flat(seqs.response)[:, None])
        gap = float((seqs.flat(logprobs) - again.squeeze(1)).abs().max())
        if gap > _GAP:
            raise AssertionError(f"log-probs are {gap:.1e} off the training forward's")
        cold, greedy = self._rollout(1e-4).seqs, self._generate(do_sample=False)
        want = greedy[:, : cold.mask.shape[1]]
        if not torch.equal(cold.flat(cold.response), cold.flat(want)):
            raise AssertionError("nearly greedy tokens differ from model.generate's greedy ones")

    def _rollout(self, temperature: float) -> Any:
        return generate(
            self.model,
            self.tokens,
            self.attention,
            max_new_tokens=self.steps,
            temperature=temperature,
            eos=self.eos,
            generator=self.generator,
            backend=self.backend,
        )

    def _generate(self, **options: Any) -> Tensor:
        # 0 pads: no EOS of ours, so that padding behind an EOS is not counted either way
        out = self.model.generate(
            self.tokens,
            attention_mask=self.attention,
            max_new_tokens=self.steps,
            eos_token_id=self.eos or None,
            pad_token_id=0,
            **options,
        )
        return out[:, self.tokens.shape[1] :]


def measure(work: Workload, repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Tokens a second of the clock and of processor time, by provider."""
    calls: dict[str, Callable[[], int]] = {
        "ppo_fast": lambda: int(work.ours().mask.sum()),
        "generate": lambda: work.count(work.theirs()),
    }
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = call()
            rates[name][0].append(tokens / (time.perf_counter() - wall))
            rates[name][1].append(tokens / (time.process_time() - cpu))
    return rates


def line(name: str, rates: dict[str, tuple[list[float], list[float]]]) -> str:
    """A row of the table: medians, and how many times as fast by either clock."""
    ours, theirs = ([statistics.median(x) for x in rates[k]] for k in ("ppo_fast", "generate"))
    cells = [f"{a:.0f} | {b:.0f} | {a / b:.2f}×" for a, b in zip(ours, theirs, strict=True)]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Check and time every shape with EOS off and on, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shapes", nargs="+", default=["16x16", "8x64"], help="rows x new tokens")
    parser.add_argument("--eos", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = load_trainer(TrainConfig(model=chosen.model, out=Path(folder), train_layers=0))
        trainer.agent.policy.model.generation_config.eos_token_id = None  # only what a case names
        stop = trainer.tokenizer(".")["input_ids"][-1]
        print(f"{chosen.threads} threads, medians of {chosen.repeats}", flush=True)
        print(
            "| model, rows × new tokens, EOS | ppo_fast tokens/s | generate | | "
            "ppo_fast tokens per CPU second | generate | |\n|---|" + "---:|" * 6
        )
        for shape in chosen.shapes:
            batch, steps = map(int, shape.split("x"))
            for name in chosen.eos:
                eos = [*trainer.eos, stop] if name == "on" else []
                Workload(trainer, batch, min(steps, 4), eos).check()
                work = Workload(trainer, batch, steps, eos)
                rates = measure(work, chosen.repeats)
                print(line(f"{chosen.model} {batch} × {steps}, {name}", rates), flush=True)


if __name__ == "__main__":
    main()
