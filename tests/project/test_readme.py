"""The two loops of README.md are one loss: with the logits, and with the head handed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import tiny

README = Path(__file__).resolve().parents[2] / "README.md"


def block(first: str) -> str:
    """The fenced block of README.md that starts with `first`."""
    text = README.read_text(encoding="utf-8")
    return first + text.split(f"```python\n{first}", 1)[1].split("```", 1)[0]


def scope() -> dict[str, Any]:
    """What the snippets take for granted, with ratios that meet both clips."""
    model, _ = tiny(torch.float64)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ids = torch.randint(0, model.config.vocab_size, (4, 9), generator=draw)
    mask = torch.ones_like(ids)
    response = torch.arange(8).expand(4, 8) >= torch.tensor([[2], [3], [4], [5]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.7
    now = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return {
        "model": model,
        "ids": ids,
        "mask": mask,
        "response": response,
        "scores": random(4),
        "old_logprobs": now + 2 * random(4, 8),
        "ref_logprobs": now + 0.1 * random(4, 8),
        "values": random(4, 8).requires_grad_(),
        "old_values": random(4, 8),
    }


def test_both_snippets_give_one_loss_and_its_gradients() -> None:
    names = scope()
    parameters = [*names["model"].parameters(), names["values"]]

    def ran(first: str) -> tuple[float, list[torch.Tensor]]:
        for p in parameters:
            p.grad = None
        exec(block(first), names)
        return names["policy"].loss.item(), [p.grad.clone() for p in parameters]

    loss, grads = ran("import torch, ppo_fast")
    stats = names["policy"].stats.compute()
    names["value"] = names["ppo_fast"].value_loss(
        names["values"], names["old_values"], names["adv"].returns, names["response"]
    )
    again, grads_again = ran("hidden = ")
    assert again == pytest.approx(loss, rel=1e-12)
    again_stats = names["policy"].stats.compute()
    for name in ("clip_frac_high", "clip_frac_dual"):
        assert again_stats[name] == stats[name] > 0
    for a, b in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
