"""Fine-tuning as Markdown tables, over seeds, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.units import number
from ..measure.results import Result


def of(runs: Sequence[Result], scheme: str, key: str) -> list[float]:
    return [float(run[key]) for run in runs if run.get("scheme") == scheme and key in run]


def names(runs: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(run["scheme"] for run in runs if "accuracy" in run))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], decimals: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{_mean(values):.{decimals}f} ± {half:.{decimals}f}"


def table(runs: Sequence[Result]) -> str:
    lines = ["| scheme | bytes | loss | accuracy | share of the step |", "|---|---:|---:|---:|---:|"]
    for name in names(runs):
        per_parameter, share = _mean(of(runs, name, "bytes")), 100 * _mean(of(runs, name, "share"))
        loss = _spread(of(runs, name, "loss"), 4)
        right = _spread([100 * x for x in of(runs, name, "accuracy")], 1)
        lines.append(f"| {name} | {number(per_parameter)} | {loss} | {right} % | {share:.1f} % |")
    loops = [run for run in runs if "loop" in run]
    if loops:
        lines += ["", "| loop | steps | losses as in the plain loop |", "|---|---:|---|"]
        for run in loops:
            same = "the same bits" if run["same"] else "others"
            lines.append(f"| {run['loop']} | {run['steps']} | {same} |")
    return "\n".join(lines)


def draw(path: Path, runs: Sequence[Result]) -> None:
    """To a PNG: accuracy, memory and the step's share, a lane per scheme."""
    from ..plot import plt, write_picture

    lanes = names(runs)
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(11, 0.36 * len(lanes) + 1.2), dpi=110)
    shown = (
        ("accuracy", 100.0, "accuracy on unseen words, %"),
        ("bytes", 1.0, "bytes per parameter, with states"),
        ("share", 100.0, "share of the optimizer's step in an iteration, %"),
    )
    for ax, (key, factor, label) in zip(axes, shown, strict=True):
        for y, name in enumerate(lanes):
            values = [factor * x for x in of(runs, name, key)]
            colour = "#d94801" if name.startswith(("torch", "bitsandbytes")) else "#2171b5"
            if key == "accuracy":
                ax.scatter(values, [y] * len(values), color=colour, s=26)
            else:
                ax.barh(y, _mean(values), color=colour, height=0.6)
        ax.set_xlabel(label)
        ax.grid(axis="x", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(lanes)), lanes, fontsize=9)
    axes[0].set_ylim(len(lanes) - 0.4, -0.6)
    write_picture(path, figure)
