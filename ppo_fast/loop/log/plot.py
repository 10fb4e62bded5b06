"""Reward curve of a run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ppo_fast.loop.files import replace
from ppo_fast.loop.log.history import History, mean


def plot(history: History, path: Path) -> None:
    """Reward (with evaluations, where there are some), KL and response length by update."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    updates, rewards = history.column("update"), history.column("reward").tolist()
    smooth = [mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    top.plot(updates, rewards, ".", alpha=0.5, label="mean of the batch")
    top.plot(updates, smooth, label="mean of the last five")
    evaluations = history.column("eval_reward")
    if (there := np.isfinite(evaluations)).any():
        top.plot(updates[there], evaluations[there], "s-", markersize=4, label="evaluation")
    top.set_ylabel("reward")
    top.legend(loc="lower right")
    middle.plot(updates, history.column("kl"))
    middle.set_ylabel("KL to the reference\n(nats per sequence)")
    bottom.plot(updates, history.column("response_length"))
    bottom.set_ylabel("response length\n(tokens)")
    bottom.set_xlabel("update")
    for axes in (top, middle, bottom):
        axes.grid(alpha=0.25)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    replace(path, drawn.getvalue())
