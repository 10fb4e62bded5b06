"""One micro-batch of SmolLM2's PPO update, 8 sequences of 512 tokens, through each head.

`python -m benchmarks.loop.head_update` prints the table of docs/loop.md: seconds and peak memory
beyond the start of the forward, the loss and the backward, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.loop import TrainConfig
from ppo_fast.loop.data.experience import Batch, Scored
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.log.meter import Measurement, measured
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.run import load_trainer
from ppo_fast.loop.update import accumulate

_PROMPT = 16


def make_batch(agent: Agent, sequences: int, tokens: int, vocab: int) -> Batch:
    """Random tokens, scored as the run that the agent is of would score them."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(sequences, tokens - _PROMPT, generator=generator)

    ids = torch.randint(vocab, (sequences, tokens), generator=generator)
    mask = torch.ones(sequences, tokens - _PROMPT, dtype=torch.bool)
    seqs = Sequences(ids, torch.ones_like(ids), mask)
    old = normal().abs().neg() - 5
    scored = Scored(old, old + 0.1 * normal(), normal(), None)
    moments = ppo_fast.Moments(torch.tensor([float(mask.sum()), 0.0, float(mask.sum())]).double())
    return Batch(seqs, scored, normal(), normal(), moments)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(model=args.model, device="cpu", out=Path(folder))
        trainer = load_trainer(config)
        agent = trainer.agent
        vocab = agent.policy.model.config.vocab_size
        batch = make_batch(agent, args.sequences, args.tokens, vocab)
        rows = [torch.arange(args.sequences)]
        ways = [
            (backend, head) for backend in ("cpu", "reference") for head in ("linear", "logits")
        ]
        took: dict[tuple[str, str], list[Measurement]] = {way: [] for way in ways}
        for turn in range(args.rounds + 1):
            for backend, head in ways:
                agent.config = dataclasses.replace(config, head=head)
                agent.optimizer.zero_grad(set_to_none=True)
                gc.collect()
                with measured(torch.device("cpu")) as result:
                    accumulate(agent, batch, rows, 0.05, backend)
                if turn:  # the first only warms up
                    took[backend, head].append(result)
    print("| backend | head | s | peak MB |\n|---|---|---:|---:|")
    for (backend, head), runs in took.items():
        seconds = statistics.median(m.seconds for m in runs)
        peak = statistics.median(m.peak_mb for m in runs)
        print(f"| `{backend}` | `{head}` | {seconds:.1f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
