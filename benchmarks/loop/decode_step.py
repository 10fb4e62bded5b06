"""One decoding step of SmolLM2 with torch's products and with `few_rows_linear`.

    python -m benchmarks.loop.decode_step --rows 16 32

Both take turns within one process, beside one read of every matrix of the model (the sum of its
elements), which no step can beat. With one thread the clock is that of the processor, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ppo_fast.loop import TrainConfig
from ppo_fast.loop.model.decoder import Decoder
from ppo_fast.loop.model.few_rows import few_rows
from ppo_fast.loop.run import load_trainer
from ppo_fast.loop.sampling.sampler import encode

# fp32 sums in another order: 2**-24 times a condition below 1e4, as in `rollout.py`.
_GAP = 2**-24 * 1e4


def measure(rows: int, repeats: int, threads: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each repeat, after a check that both ways give the same logits."""
    trainer = load_trainer(
        TrainConfig(model="smollm2", device="cpu", batch=rows, train_layers=0, out=folder)
    )
    model = trainer.agent.policy.model
    prompts = [prompt.text for prompt in trainer.prompts.next(rows)]
    decoder = Decoder(model, *encode(trainer.tokenizer, prompts, trainer.device), 2 * repeats + 2)
    token = decoder.logits.argmax(1)
    matrices = [p for p in model.parameters() if p.dim() == 2]

    def step(backend: str) -> Tensor:
        with few_rows(model, backend) if backend == "cpu" else nullcontext():
            decoder.step(token)
        return decoder.logits

    plain = model(input_ids=token[:, None]).logits
    with few_rows(model, "cpu"):
        ours = model(input_ids=token[:, None]).logits
    gap = float((plain.log_softmax(-1) - ours.log_softmax(-1)).abs().max())
    if gap > _GAP:
        raise AssertionError(f"log-probabilities are {gap:.1e} off those of torch's products")
    clock = time.process_time if threads == 1 else time.perf_counter
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: step("reference"),
        "few_rows_linear": lambda: step("cpu"),
        "read": lambda: [p.sum() for p in matrices],
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:  # the first only warms up
                took[name].append(1e3 * (clock() - start))
    return took


def main() -> None:
    """Print a Markdown table: medians and least times in ms, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(
        "| rows | torch ms (least) | few_rows_linear ms (least) | one read ms (least) | of torch |"
        " of one read |\n|---|" + "---:|" * 5
    )
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            took = measure(rows, chosen.repeats, chosen.threads, Path(folder))
        medians = {name: statistics.median(ms) for name, ms in took.items()}
        cells = [f"{medians[name]:.0f} ({min(ms):.0f})" for name, ms in took.items()]
        ours = medians["few_rows_linear"]
        ratios = f"{ours / medians['torch']:.2f} | {ours / medians['read']:.2f}"
        print(f"| {rows} | {' | '.join(cells)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
