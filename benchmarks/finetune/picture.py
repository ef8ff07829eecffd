"""The picture of fine-tuning: accuracy, memory and the step's share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..measure.results import Result
from ..plot import plt, write_picture
from .table import names, of


def draw(path: Path, runs: Sequence[Result]) -> None:
    """To a PNG, a lane per scheme."""
    lanes = names(runs)
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(11, 0.36 * len(lanes) + 1.2), dpi=110)
    shown = (
        ("accuracy", 100.0, "accuracy on unseen words, %"),
        ("bytes", 1.0, "bytes per parameter, with states"),
        ("share", 100.0, "share of the step in an iteration, %"),
    )
    for ax, (key, factor, label) in zip(axes, shown, strict=True):
        for y, name in enumerate(lanes):
            values = [factor * x for x in of(runs, name, key)]
            colour = "#d94801" if name.startswith(("torch", "bitsandbytes")) else "#2171b5"
            if key == "accuracy":
                ax.scatter(values, [y] * len(values), color=colour, s=26)
            else:
                ax.barh(y, fmean(values), color=colour, height=0.6)
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_title("blue: fusedoptim; orange: others. A dot per seed", loc="left", fontsize=9)
    axes[0].set_yticks(range(len(lanes)), lanes, fontsize=9)
    axes[0].set_ylim(len(lanes) - 0.4, -0.6)
    write_picture(path, figure)
