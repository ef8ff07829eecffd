"""Fine-tuning as Markdown tables, over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.units import number
from ..measure.results import Result


def of(runs: Sequence[Result], scheme: str, key: str) -> list[float]:
    return [float(run[key]) for run in runs if run.get("scheme") == scheme and key in run]


def names(runs: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(run["scheme"] for run in runs if "accuracy" in run))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float], decimals: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{mean(values):.{decimals}f} ± {half:.{decimals}f}"


def table(runs: Sequence[Result]) -> str:
    lines = ["| scheme | bytes | loss | accuracy | share of the step |", "|---|---:|---:|---:|---:|"]
    for name in names(runs):
        per_parameter, share = mean(of(runs, name, "bytes")), 100 * mean(of(runs, name, "share"))
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
