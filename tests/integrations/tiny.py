"""Small models and tokenizers, and the comparison of two runs of a trainer."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORDS, LENGTH = 64, 64


class Run(NamedTuple):
    """Log of a training run, and its final weights."""

    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]
    start: dict[str, Tensor]


def tokenizer() -> Any:
    """Words w0, w1, …; <pad> and <eos> are not the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def config(vocab: int, n_embd: int = 32, n_head: int = 2, **more: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab,
        n_positions=2 * LENGTH,
        n_embd=n_embd,
        n_layer=2,
        n_head=n_head,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        initializer_range=0.2,
        **more,
    )


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_run(ours: Run, theirs: Run, steps: int, ignored: tuple[str, ...]) -> None:
    """Every logged metric to 1e-4 of its size in the run, every weight to 1e-4."""
    assert len(theirs.metrics) >= steps
    names = {name for logged in theirs.metrics for name in logged} - set(ignored)
    assert [m.keys() for m in ours.metrics] == [m.keys() for m in theirs.metrics]
    for name in sorted(names):
        a, b = (
            torch.tensor([m[name] for m in run.metrics if name in m], dtype=torch.float64)
            for run in (ours, theirs)
        )
        size = b[b.isfinite()].abs().max() if b.isfinite().any() else torch.tensor(0.0)
        assert torch.allclose(a, b, rtol=0.0, atol=1e-4 * float(size), equal_nan=True), (
            name,
            a.tolist(),
            b.tolist(),
        )
    moved = max(float((w - theirs.start[k]).abs().max()) for k, w in theirs.weights.items())
    assert moved > 1e-2, "the run must learn for its weights to say anything"
    off = {k: float((ours.weights[k] - w).abs().max()) for k, w in theirs.weights.items()}
    assert max(off.values()) < 1e-4, off


def report(run: Callable[..., Run], patched: Callable[[], Any]) -> None:
    """Print the seconds of one run and the peak memory; `--patched` runs on ppo_fast."""
    vocab = 32000
    wall, cpu = time.perf_counter(), time.process_time()
    if "--patched" in sys.argv:
        with patched() as calls:
            run(vocab)
        print({op: n.fused for op, n in calls.items()})
    else:
        run(vocab)
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({k: round(s, 1) for k, s in seconds.items()} | {"peak_mib": round(peak)}))
