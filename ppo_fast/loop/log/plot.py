"""Reward curve of a run."""

from __future__ import annotations

import io
from pathlib import Path

from ppo_fast.loop.files import replace
from ppo_fast.loop.log.history import History, mean


def plot(history: History, path: Path) -> None:
    """Reward and KL per sequence against updates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    updates, rewards = history.column("update"), history.column("reward").tolist()
    smooth = [mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
    top.plot(updates, rewards, ".", alpha=0.5, label="mean of the batch")
    top.plot(updates, smooth, label="mean of the last five")
    top.set_ylabel("reward")
    top.legend(loc="lower right")
    bottom.plot(updates, history.column("kl"))
    bottom.set_ylabel("KL to the reference\n(nats per sequence)")
    bottom.set_xlabel("update")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    replace(path, drawn.getvalue())
