"""On-policy distillation in both forms: a trained policy teaches the model that it came from.

    make train
    python -m benchmarks.loop.distillation --teacher runs/default --seeds 0 1 2

trains every seed twice from the base model, with the teacher alone: `reverse` takes the reverse KL
of whole distributions, `pg` the policy gradient of the sampled tokens. Before every update KL and
agreement with the teacher are computed on half of the batch from both models' own logits, not by
the ops. Options it does not know go to `ppo-fast train`. Curves go into docs/distillation.json,
the figure into docs/distillation.png, the table between the markers of docs/distillation.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ppo_fast.loop import TrainConfig, ppo
from ppo_fast.loop.data.experience import Scored
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.log.history import fifths
from ppo_fast.loop.model.agent import Agent
from ppo_fast.loop.run import load_trainer

DOCS = Path(__file__).resolve().parents[2] / "docs"
CURVES, FIGURE, PAGE = (DOCS / f"distillation.{end}" for end in ("json", "png", "md"))
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"
FORMS = {"reverse": "reverse KL, whole distributions", "pg": "policy gradient, sampled tokens"}
_PLACES = 5

Curves = dict[str, Any]


@torch.no_grad()
def measured(agent: Agent, seqs: Sequences, rows: int = 4) -> dict[str, float]:
    """KL(policy‖teacher) and KL(teacher‖policy), nats a token, and how often both agree on top.

    Of the first half of the sequences, `rows` at a time.
    """
    if agent.teacher is None:
        raise ValueError("agent must have a teacher, got none")
    sums, n = dict.fromkeys(("kl", "forward", "agree"), 0.0), 0
    for index in torch.arange((len(seqs.mask) + 1) // 2).split(rows):
        part = seqs.rows(index)
        s, t = (
            (tower.logits(part)[0].float() / agent.temperature(tower)).log_softmax(-1)
            for tower in (agent.policy, agent.teacher)
        )
        n += len(s)
        sums["kl"] += float((s.exp() * (s - t)).sum(dtype=torch.float64))
        sums["forward"] += float((t.exp() * (t - s)).sum(dtype=torch.float64))
        sums["agree"] += float((s.argmax(-1) == t.argmax(-1)).sum())
    return {name: total / n for name, total in sums.items()}


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, float]]]:
    """Context in which each batch is measured before its update, an entry an update."""
    score, found = ppo.score, list[dict[str, float]]()

    def scoring(agent: Agent, seqs: Sequences, *rest: Any) -> Scored:
        found.append(measured(agent, seqs))
        return score(agent, seqs, *rest)

    with mock.patch.object(ppo, "score", scoring):
        yield found


def run(config: TrainConfig, say: Callable[[str], None]) -> Curves:
    """Curves of one run, whose folder is thrown away."""
    curves: Curves = {}
    with tempfile.TemporaryDirectory() as folder, watched() as found:
        trainer = load_trainer(dataclasses.replace(config, out=Path(folder)), say)
        for _ in range(trainer.config.updates):
            record = trainer.step()
            told = {name: record[name] for name in ("reward", "entropy", "divergence")}
            told["seconds"] = sum(record["seconds"].values())
            for name, value in (told | found[-1]).items():
                curves.setdefault(name, []).append(round(value, _PLACES))
            say(
                f"seed {config.seed}, {config.distill}, update {record['update']}:"
                f" KL {found[-1]['kl']:.4f}, reward {record['reward']:+.3f}"
            )
        trainer.close()
    return curves


def rewards_of(run_folder: Path) -> list[float]:
    """Rewards by update of the run that made the teacher; none where it left no log."""
    log = run_folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [round(json.loads(line)["reward"], _PLACES) for line in lines]


def table(curves: Curves) -> str:
    """Markdown table of all runs: means of their first and last fifths."""
    lines = [
        "| learnt by | seed | KL to the teacher, first | last | same likeliest token, first"
        " | last | reward, first | last |",
        "|---|---:|" + "---:|" * 6,
    ]
    for form, words in FORMS.items():
        for seed, runs in curves["seeds"].items():
            if form in runs:
                cells = [words, seed]
                for name, style in (("kl", ".3f"), ("agree", ".1%"), ("reward", "+.3f")):
                    cells += [format(x, style) for x in fifths(runs[form][name])]
                lines.append(f"| {' | '.join(cells)} |")
    if curves["teacher"]:
        rewards = [f"{x:+.3f}" for x in fifths(curves["teacher"])]
        cells = ["the teacher's own training (PPO on the reward)", "0", *[""] * 4, *rewards]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(page: str, curves: Curves) -> str:
    """The page with its table written anew."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + table(curves) + END + rest.split(END)[1]


def plot(curves: Curves, path: Path) -> None:
    """KL to the teacher and reward by update: a thin line a seed, a thick one of their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    kl, reward = figure.subplots(1, 2)
    for colour, (form, words) in zip(("tab:blue", "tab:orange"), FORMS.items(), strict=True):
        seeds = [runs[form] for runs in curves["seeds"].values() if form in runs]
        for axes, name in ((kl, "kl"), (reward, "reward")):
            for one in seeds:
                axes.plot(one[name], linewidth=0.6, alpha=0.6, color=colour)
            means = [statistics.mean(x) for x in zip(*(one[name] for one in seeds), strict=True)]
            axes.plot(means, color=colour, label=words)
    reward.plot(
        curves["teacher"], color="black", linewidth=0.8, label="the teacher's own training"
    )
    kl.set(xlabel="update", ylabel="KL(policy‖teacher), nats a token", ylim=(0, None))
    reward.set(xlabel="update", ylabel="reward, which neither form sees")
    kl.legend(fontsize="small")
    reward.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=100)


def kept(path: Path, options: list[str]) -> Curves:
    """The runs that were made before with the same options."""
    found: Curves = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("options") == options else {"options": options, "seeds": {}}


def main() -> None:
    """Train every seed in both forms, write the curves, the figure and the table."""
    from ppo_fast.loop.cli import parse  # tyro is not everywhere that tests are collected

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=Path("runs/default"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--folder", type=Path, default=DOCS, help="of what is written")
    chosen, options = parser.parse_known_args()
    path = chosen.folder / CURVES.name
    curves = kept(path, options)
    curves["teacher"] = rewards_of(chosen.teacher)
    for seed in chosen.seeds:
        for form in chosen.forms:
            made = ["--teacher", str(chosen.teacher), "--distill", form, "--reward-coef", "0"]
            config = parse([*made, *options, "--seed", str(seed)])
            found = run(config, lambda text: print(text, flush=True))
            curves["seeds"].setdefault(str(seed), {})[form] = found
            path.write_text(json.dumps(curves, separators=(",", ":")) + "\n")
    plot(curves, chosen.folder / FIGURE.name)
    page = chosen.folder / PAGE.name
    if page.exists():
        page.write_text(written(page.read_text(), curves))
    print(table(curves))


if __name__ == "__main__":
    main()
