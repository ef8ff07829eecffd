"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plot import plt, write_picture


def _smooth(values: list[float], factor: float = 0.9) -> list[float]:
    out, average, weight = [], 0.0, 0.0
    for v in values:
        average, weight = factor * average + (1 - factor) * v, factor * weight + (1 - factor)
        out.append(average / weight)
    return out


def plot_training(path: Path, optimizer: str, progress: dict[str, Any], entropy: float) -> None:
    """Training and validation loss over steps, with the unigram entropy as a line, to a PNG."""
    losses = [t["loss"] for t in progress["train"]]
    steps = range(1, len(losses) + 1)
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.7, label="training, each batch")
    axes.plot(steps, _smooth(losses), color="#2171b5", linewidth=1.6, label="training, smoothed")
    validation = progress["validation"]
    xs, ys = [v["step"] for v in validation], [v["loss"] for v in validation]
    axes.plot(xs, ys, "o-", color="#d94801", markersize=4, linewidth=1.2, label="validation")
    axes.axhline(entropy, color="#555555", linestyle="--", linewidth=1, label=f"unigram entropy {entropy:.2f}")
    beside = {"textcoords": "offset points", "xytext": (6, 0), "va": "center"}  # where no curve comes
    axes.annotate(f"{ys[-1]:.2f}", (xs[-1], ys[-1]), color="#d94801", **beside)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=f"A small GPT, {optimizer}")
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_picture(path, figure)
