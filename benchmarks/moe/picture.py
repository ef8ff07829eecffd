"""The picture of the mixture's trainings: losses, and the time of clipping and stepping, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.units import duration
from ..measure.results import Result
from ..plot import plt, write_picture
from .contenders import FOREACH, FUSED, LOOP, OURS, WITNESS

COLOURS = {OURS: "#2171b5", LOOP: "#756bb1", FOREACH: "#d94801", FUSED: "#238b45", WITNESS: "#fdae6b"}


def draw(path: Path, experts: Sequence[Result]) -> None:
    """To a PNG. Who took a few steps has a mark for each."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110)
    most = max(row["steps"] for row in experts)
    for row in experts:
        name = row["contender"]
        marks = {"linestyle": "none", "marker": "x", "markersize": 6}
        style = {"linewidth": 1.4} if row["steps"] == most else marks
        wide = {"linewidth": 4} if name == WITNESS else {}  # below fusedoptim's, which has the same numbers
        for axes, key, more in ((left, "losses", wide), (right, "ms", {})):
            order = 1 if name == WITNESS else 2
            axes.plot(*zip(*row[key], strict=True), color=COLOURS[name], label=name, zorder=order, **style | more)
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="A mixture of experts, AdamW, FSDP2")
    right.set(xlabel="step", yscale="log", title="Clip + step")
    right.yaxis.set_major_formatter(lambda ms, _: duration(ms * 1e-3))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    write_picture(path, figure)
