"""The picture of all agents: returns over frames, and what part of an update's time is the optimizer's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..common.units import duration
from ..measure.results import Result
from ..plot import plt, write_picture
from .contenders import INSIDE, OURS, TORCH, WITNESS
from .table import contenders, of

COLOURS = {INSIDE: "#238b45", OURS: "#2171b5", TORCH: "#d94801"}


def draw(path: Path, agents: Sequence[Result]) -> None:
    """To a PNG: a thin line per seed, a thick one for their mean."""
    names = [name for name in contenders(agents) if name != WITNESS]  # it has the curves of fusedoptim's
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110, width_ratios=(2, 1))
    for name in names:
        curves = [agent["curve"] for agent in of(agents, name)]
        for curve in curves:
            left.plot(*zip(*curve, strict=True), color=COLOURS[name], linewidth=0.6, alpha=0.5)
        known = [dict(map(tuple, curve)) for curve in curves]
        frames = sorted(set.intersection(*map(set, known)))
        means = [statistics.fmean(returns[x] for returns in known) for x in frames]
        left.plot(frames, means, color=COLOURS[name], linewidth=2, label=name)
    left.set(xlabel="frames", ylabel="return, mean of 100 episodes", ylim=(0, 520), title="A2C on CartPole, RMSprop")
    left.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9, loc="lower right")
    for place, name in enumerate(names):
        found = of(agents, name)
        optimizer, update = (statistics.median(a[key] for a in found) * 1e-6 for key in ("optimizer_us", "update_us"))
        right.barh(place, update * 1e3, color="#cccccc")
        right.barh(place, optimizer * 1e3, color=COLOURS[name])
        says = f"{duration(optimizer)} of {duration(update)}"
        right.annotate(says, (update * 1e3, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    right.set_yticks([])
    right.set_xlim(0, 1.75 * right.get_xlim()[1])  # for what stands beside the bars
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set(xlabel="ms per update, of them clip + step in colour", title="Time")
    right.spines[["top", "right"]].set_visible(False)
    write_picture(path, figure)
