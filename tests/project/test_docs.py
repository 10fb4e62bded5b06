"""Tests of the pages: their code runs, all are on the map, both READMEs agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import make_api
import pages
import pytest
import torch
from loop_helpers import tiny

ROOT = pages.ROOT
# Blocks that a test of their trainer or framework runs, or that show a line in the user's code.
MOST_WITH_NEEDS = 25
SHARED = re.compile("blocks of this page share their variables|本页的代码块共用变量")


@pytest.mark.parametrize("path", pages.paths(), ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(path: Path) -> None:
    """Each block alone, or one after the other where the page says that they share variables."""
    text, scope = path.read_text(encoding="utf-8"), {}
    found = pages.blocks(path)
    assert text.count("```python") == len(found)
    for block in found:
        if not SHARED.search(text):
            scope = {}
        if not block.needs:
            exec(compile(block.code, str(path), "exec"), scope)


def test_few_blocks_are_not_run() -> None:
    every = [block for path in pages.paths() for block in pages.blocks(path)]
    assert len([block for block in every if block.needs]) <= MOST_WITH_NEEDS
    assert len([block for block in every if not block.needs]) >= 7
    for block in every:
        compile(block.code, block.page, "exec")


def test_every_page_is_on_the_map() -> None:
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    trainers = (ROOT / "docs/integrations/index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in text, path.name
    for path in (ROOT / "docs/quickstart").glob("*.md"):
        assert f"(quickstart/{path.name})" in text, path.name
    for path in (ROOT / "docs/integrations").glob("*.md"):
        assert path.name == "index.md" or f"({path.name})" in trainers, path.name


def test_the_api_page_is_that_of_the_docstrings() -> None:
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "python docs/make_api.py"


def test_both_readmes_say_the_same() -> None:
    """The same code and commands, the same figures and links in the same order."""
    english, chinese = ROOT / "README.md", ROOT / "README.zh-CN.md"
    for language in ("python", "bash"):
        assert pages.fenced(english, language) == pages.fenced(chinese, language)
    a, b = (_prose(path) for path in (english, chinese))
    for kind in (r"\d+(?:[.,]\d+)*", r"`[^`]+`", r"\]\(([^)]+)\)"):
        found = [sorted(re.findall(kind, text)) for text in (a, b)]
        assert found[0] == found[1], kind
    assert len(re.findall("^## ", a, re.M)) == len(re.findall("^## ", b, re.M))
    for path, other in ((english, chinese), (chinese, english)):
        text = path.read_text(encoding="utf-8")
        assert f"]({other.name})" in text and len(text.splitlines()) <= 130


def _prose(path: Path) -> str:
    """A page without its code, and without its line of languages."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^.*\]\(README(?:\.zh-CN)?\.md\).*$", "", text, flags=re.M)
    return re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.DOTALL | re.M)


def test_the_install_lines_take_the_torch_of_make() -> None:
    (_, *lines) = pages.fenced(ROOT / "README.md", "bash")[0].splitlines()
    torch_pin = re.search(r"^TORCH \?= (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert torch_pin
    assert lines[1:3] == [f"pip install {torch_pin[1]}", "pip install -e ."]


def scope() -> dict[str, Any]:
    """Variables of docs/ops.md in fp64, with ratios that meet both clips."""
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
    made: dict[str, Any] = {}
    exec(pages.block("ops.md", "LlamaForCausalLM"), made)
    mine = {
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
    assert set(mine) <= set(made), "the page makes them under the same names"
    return made | mine


def test_both_ways_give_one_loss_and_its_gradients() -> None:
    """From the logits, and from the hidden states, on docs/ops.md."""
    names = scope()
    parameters = [*names["model"].parameters(), names["values"]]

    def ran(holding: str) -> tuple[float, list[torch.Tensor]]:
        for p in parameters:
            p.grad = None
        exec(pages.block("ops.md", holding), names)
        return names["policy"].loss.item(), [p.grad.clone() for p in parameters]

    loss, grads = ran("new = ppo_fast.token_logprobs")
    stats = names["policy"].stats.compute()
    again, grads_again = ran("linear_ppo_loss")
    assert again == pytest.approx(loss, rel=1e-12)
    again_stats = names["policy"].stats.compute()
    for name in ("clip_frac_high", "clip_frac_dual"):
        assert again_stats[name] == stats[name] > 0
    for a, b in zip(grads, grads_again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
