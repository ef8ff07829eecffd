"""The picture of all schemes: distance and loss, a mark per seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..common.units import number
from ..measure.results import Result
from ..plot import plt, write_picture
from .schemes import EXACT
from .table import of, schemes

PLAIN, BURST = "#2171b5", "#d94801"
#: Of the axes: logarithmic but for a stretch around 0.
DISTANCES, LOSSES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0), (-0.01, -0.001, 0.0, 0.001, 0.01, 0.1, 1.0)


def draw(path: Path, runs: Sequence[Result]) -> None:
    """To a PNG: a lane per scheme with its bytes per parameter, the most exact ones on top."""
    names = sorted(schemes(runs), key=lambda name: sum(of(runs, name, "distance")))
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 0.34 * len(names) + 1.9), dpi=110)
    for axes, key, ticks in ((left, "distance", DISTANCES), (right, "loss_above_exact", LOSSES)):
        reached = []
        for burst, colour, mark in ((False, PLAIN, "o"), (True, BURST, "x")):
            says = "one gradient of 2048 10,000 times too large, once" if burst else "fine-tuning"
            lanes = [(x, y + 0.24 * burst) for y, name in enumerate(names) for x in of(runs, name, key, burst)]
            places = [(x, y) for x, y in lanes if math.isfinite(x)]
            if places:
                axes.scatter(*zip(*places, strict=True), color=colour, marker=mark, s=26, label=says)
            reached += [x for x, _ in places]
        axes.set_xscale("symlog", linthresh=abs(ticks[1]))
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set_xticks([], minor=True)
        straight = abs(ticks[1])
        axes.set_xlim(1.3 * min([*reached, 0.0]) - 0.1 * straight, 1.5 * max([*reached, straight]))
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    at_end = of(runs, EXACT.name, "distance_if_rounded")
    if at_end:
        says = "the exact run, rounded to bf16 at its end"
        left.axvline(sum(at_end) / len(at_end), color="#555555", linestyle="--", linewidth=1, label=says)
    right.axvline(0, color="black", linewidth=1)
    sizes = {name: next(run["bytes"] for run in runs if run["scheme"] == name) for name in names}
    left.set_yticks(range(len(names)), [f"{name}: {number(sizes[name])} bytes" for name in names], fontsize=9)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_xlabel("distance from the exact run, over the way that this went")
    right.set_xlabel("validation loss above the exact run's")
    left.legend(frameon=False, fontsize=8, ncols=1, loc="lower left", bbox_to_anchor=(0, 1))
    write_picture(path, figure)
