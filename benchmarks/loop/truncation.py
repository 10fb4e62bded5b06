"""Samples of top-p scored over the ids they were drawn from, and over the whole vocabulary.

    python -m benchmarks.loop.truncation --seeds 0 1 2

trains every seed twice: `support` scores, learns and takes the reference over each token's kept
ids, `whole` forgets the ids once the sampler is done. The first batch of both is the same, which
is checked; before every update a run is scored both ways. Options it does not know go to
`ppo-fast train`. The curves go into docs/support.json, the figure into docs/support.png, the
tables between the markers of docs/support.md.
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
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ppo_fast.loop import TrainConfig, ppo
from ppo_fast.loop.data.experience import Scored
from ppo_fast.loop.data.sequences import Rollout, Sequences
from ppo_fast.loop.log.history import fifths
from ppo_fast.loop.model.first_batch import FirstBatch
from ppo_fast.loop.run import Trainer, load_trainer
from ppo_fast.loop.sampling.sampler import Sampler

DOCS = Path(__file__).resolve().parents[2] / "docs"
CURVES, FIGURE, PAGE = (DOCS / f"support.{end}" for end in ("json", "png", "md"))
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"
SUPPORT, WHOLE = WAYS = ("support", "whole")
WORDS = {SUPPORT: "the kept ids", WHOLE: "the whole vocabulary"}
LOW, HIGH = 0.8, 1.2  # the clip range of a ratio
_PLACES = 5

Curves = dict[str, Any]


class Scorings(NamedTuple):
    """One batch before its update: what the sampler drew, and its scores by each way."""

    drawn: Rollout
    seqs: Sequences  # with the mask that is learnt from
    scored: dict[str, Scored]

    def gaps(self, way: str) -> Tensor:
        """Old log-prob less the sampler's, (B, R) fp64, 0 where masked."""
        gap = self.scored[way].old.double() - self.drawn.logprobs.double()
        return torch.where(self.seqs.mask, gap, 0.0)

    def numbers(self, way: str) -> dict[str, float]:
        """Mean gap in nats, shares of ratios outside of [0.8, 1.2], and KL to the reference.

        A completion's ratio is the product of its tokens'. The KL is k1's, in nats a completion.
        """
        gaps, mask, scored = self.gaps(way), self.seqs.mask, self.scored[way]
        kl = torch.where(mask, (scored.old - scored.ref).double(), 0.0).sum(1)
        return {
            "gap": float(gaps[mask].mean()),
            "outside": _outside(gaps[mask]),
            "outside_completions": _outside(gaps.sum(1)[mask.any(1)]),
            "kl": float(kl.mean()),
        }

    def drawing(self) -> dict[str, float]:
        """Mean kept ids and mass cut of a token, and its surprisal: the entropy that is drawn."""
        mask, drawn = self.seqs.mask, self.drawn
        support = drawn.seqs._replace(mask=mask).flat_support()
        if support is None or drawn.cut is None:
            raise ValueError("top_p must be below 1, or top_k or min_p given: nothing was cut")
        return {
            "size": float(support.counts.double().mean()),
            "cut": float(drawn.cut.mass[mask].mean()),
            "surprisal": -float(drawn.logprobs[mask].double().mean()),
        }


def _outside(log_ratios: Tensor) -> float:
    ratios = log_ratios.exp()
    return float(((ratios < LOW) | (ratios > HIGH)).double().mean())


class _Recording(Sampler):
    """The run's sampler, which remembers what it drew last, and may not tell the kept ids."""

    last: Rollout
    forgets = False

    def rollout(self, *args: Any, **options: Any) -> Rollout:
        self.last = super().rollout(*args, **options)
        if not self.forgets:
            return self.last
        return self.last._replace(seqs=self.last.seqs._replace(support=None))


class _Unchecked(FirstBatch):
    """First-batch checks but that of the gap to the sampler, which would stop a `whole` run."""

    def check_gap(self, gaps: Tensor) -> None:
        pass


@contextlib.contextmanager
def both_ways(trainer: Trainer, way: str) -> Iterator[list[Scorings]]:
    """`trainer` made to learn one way; each batch is scored both ways, an entry an update."""
    sampler = _Recording(trainer.agent, trainer.tokenizer, trainer.config, trainer.device)
    trainer.sampler = trainer.collector.sampler = sampler
    if way == WHOLE:
        sampler.forgets, trainer.first_batch = True, _Unchecked(trainer.agent)
    score, found = ppo.score, list[Scorings]()

    def scoring(agent: Any, seqs: Sequences, parts: Any, backend: str, *rest: Any) -> Scored:
        supports = {SUPPORT: sampler.last.seqs.support, WHOLE: None}
        (other,) = (name for name in WAYS if name != way)
        scored = {other: score(agent, seqs._replace(support=supports[other]), parts, backend)}
        scored[way] = score(agent, seqs, parts, backend, *rest)  # may leave its last forward
        found.append(Scorings(sampler.last, seqs, scored))
        return scored[way]

    with mock.patch.object(ppo, "score", scoring):
        yield found


def run(config: TrainConfig, way: str, say: Callable[[str], None]) -> tuple[Curves, Scorings]:
    """Curves of one run, and the scorings of its first batch; its folder is thrown away."""
    curves: Curves = {"scored": {name: {} for name in WAYS}}
    with tempfile.TemporaryDirectory() as folder:
        trainer = load_trainer(dataclasses.replace(config, out=Path(folder)), say)
        with both_ways(trainer, way) as found:
            for _ in range(trainer.config.updates):
                record = trainer.step()
                told = {name: record[name] for name in ("reward", "entropy", "clip_frac")}
                _append(curves, told | found[-1].drawing())
                for name in WAYS:
                    _append(curves["scored"][name], found[-1].numbers(name))
                say(f"seed {config.seed}, {way}: {record['update']} {record['reward']:+.3f}")
        trainer.close()
    return curves, found[0]


def _append(curves: Curves, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        curves.setdefault(name, []).append(round(value, _PLACES))


def pair(config: TrainConfig, say: Callable[[str], None]) -> Curves:
    """Both runs of a seed, and the ratios that each way gives the samples of their first batch.

    Raises RuntimeError unless both drew the same samples, and both scored them alike.
    """
    runs = {way: run(config, way, say) for way in WAYS}
    one, other = (runs[way][1] for way in WAYS)
    same = [(one.seqs.tokens, other.seqs.tokens), (one.drawn.logprobs, other.drawn.logprobs)]
    same += [(one.scored[way].old, other.scored[way].old) for way in WAYS]
    if not all(torch.equal(a, b) for a, b in same):
        raise RuntimeError(f"seed {config.seed}: the first batches of both runs must be the same")
    mask = one.seqs.mask
    first = {
        way: {
            "tokens": _ratios(one.gaps(way)[mask]),
            "completions": _ratios(one.gaps(way).sum(1)[mask.any(1)]),
        }
        for way in WAYS
    }
    return {"first": first} | {way: curves for way, (curves, _) in runs.items()}


def _ratios(log_ratios: Tensor) -> list[float]:
    return [round(x, _PLACES) for x in log_ratios.exp().tolist()]


def tables(curves: Curves) -> str:
    """Markdown tables: the same samples scored both ways, and the runs, over all seeds."""
    return "\n".join([*_first_table(curves), "", *_run_table(curves)]) + "\n"


def _seeds(curves: Curves) -> list[Curves]:
    return list(curves["seeds"].values())


def _first_table(curves: Curves) -> Iterator[str]:
    """Of the first batches: the ratios of tokens and of completions to the sampler."""
    yield "| first batch, scored over | ratios | least | median | largest | outside [0.8, 1.2] |"
    yield "|---|---|---:|---:|---:|---:|"
    for way in WAYS:
        for of in ("tokens", "completions"):
            ratios = [x for seed in _seeds(curves) for x in seed["first"][way][of]]
            numbers = (min(ratios), statistics.median(ratios), max(ratios))
            out = sum(not LOW <= x <= HIGH for x in ratios) / len(ratios)
            cells = [WORDS[way], f"{len(ratios)} {of}", *(f"{x:.3f}" for x in numbers)]
            yield f"| {' | '.join([*cells, f'{out:.1%}'])} |"


def _run_table(curves: Curves) -> Iterator[str]:
    """Of the runs: means of the outer fifths over the seeds; the KL of both is over all ids."""
    yield (
        "| trained over | seeds | updates | reward, first | last | gain | spread |"
        " KL | surprisal, first | last | ids | cut |"
    )
    yield "|---|" + "---:|" * 11
    for way in WAYS:
        seeds = [seed[way] for seed in _seeds(curves)]
        first, last = zip(*(fifths(seed["reward"]) for seed in seeds), strict=True)
        a, b = statistics.mean(first), statistics.mean(last)
        spread = max(max(first) - min(first), max(last) - min(last))
        kl = statistics.mean(fifths(seed["scored"][WHOLE]["kl"])[1] for seed in seeds)
        drawn = zip(*(fifths(seed["surprisal"]) for seed in seeds), strict=True)
        size, cut = (
            statistics.mean(x for seed in seeds for x in seed[name]) for name in ("size", "cut")
        )
        cells = [WORDS[way], str(len(seeds)), str(len(seeds[0]["reward"]))]
        cells += [f"{a:+.3f}", f"{b:+.3f}", f"{b - a:+.3f}", f"{spread:.3f}", f"{kl:.2f}"]
        cells += [f"{statistics.mean(x):.2f}" for x in drawn]
        yield f"| {' | '.join([*cells, f'{size:.0f}', f'{cut:.1%}'])} |"


def written(page: str, curves: Curves) -> str:
    """The page with its tables written anew."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + tables(curves) + END + rest.split(END)[1]


def plot(curves: Curves, path: Path) -> None:
    """Reward, the first batches' ratios, KL to the reference and surprisal of what is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    (reward, ratios), (kl, drawn) = figure.subplots(2, 2)
    colours = dict(zip(WAYS, ("tab:blue", "tab:orange"), strict=True))
    for way in WAYS:
        style: dict[str, Any] = {"color": colours[way]}
        label = f"trained over {WORDS[way]}"
        seeds = [seed[way] for seed in _seeds(curves)]
        _lines(reward, [seed["reward"] for seed in seeds], label, style)
        _lines(drawn, [seed["surprisal"] for seed in seeds], label, style)
        _lines(kl, [seed["scored"][WHOLE]["kl"] for seed in seeds], label, style)
        first = [x for seed in _seeds(curves) for x in seed["first"][way]["completions"]]
        ratios.hist(first, bins=40, range=(0, 1.25), label=f"over {WORDS[way]}", **style)
    for bound in (LOW, HIGH):
        ratios.axvline(bound, color="black", linewidth=0.8, linestyle=":")
    ratios.set(xlabel="ratio to the sampler, first batches", ylabel="completions")
    reward.set(xlabel="update", ylabel="reward, mean of five updates")
    drawn.set(xlabel="update", ylabel="nats a token", title="surprisal of what is drawn")
    kl.set(xlabel="update", ylabel="nats a completion", title="KL to the reference, over all ids")
    reward.legend(fontsize="small", loc="lower right")
    ratios.legend(fontsize="small", loc="center left")
    figure.savefig(path, dpi=100)


def _lines(axes: Any, series: list[list[float]], label: str, style: dict[str, Any]) -> None:
    """A thin line a seed and a thick one of their mean, each the mean of five updates."""
    smooth = [[statistics.mean(x[max(0, i - 4) : i + 1]) for i in range(len(x))] for x in series]
    for line in smooth:
        axes.plot(line, linewidth=0.6, alpha=0.6, **style)
    axes.plot([statistics.mean(x) for x in zip(*smooth, strict=True)], label=label, **style)


def kept(path: Path, options: list[str]) -> Curves:
    """The seeds that were run before with the same options."""
    found: Curves = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("options") == options else {"options": options, "seeds": {}}


def main() -> None:
    """Train every seed both ways, write the curves, the figure and the tables."""
    from ppo_fast.loop.cli import parse  # tyro is not everywhere that tests are collected

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--folder", type=Path, default=DOCS, help="of what is written")
    chosen, options = parser.parse_known_args()
    options += ["--top-p", str(chosen.top_p)]
    path = chosen.folder / CURVES.name
    curves = kept(path, options)
    for seed in chosen.seeds:
        config = parse([*options, "--seed", str(seed)])
        curves["seeds"][str(seed)] = pair(config, lambda text: print(text, flush=True))
        path.write_text(json.dumps(curves, separators=(",", ":")) + "\n")
    plot(curves, chosen.folder / FIGURE.name)
    page = chosen.folder / PAGE.name
    if page.exists():
        page.write_text(written(page.read_text(), curves))
    print(tables(curves))


if __name__ == "__main__":
    main()
