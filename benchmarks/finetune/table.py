"""Fine-tuning as Markdown tables, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from ..common.units import duration, number
from ..measure.results import Result
from ..tables import header, line


def of(runs: Sequence[Result], scheme: str, key: str) -> list[float]:
    return [float(run[key]) for run in runs if run.get("scheme") == scheme and key in run]


def names(runs: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(run["scheme"] for run in runs if "accuracy" in run))


def _spread(values: Sequence[float], decimals: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.{decimals}f} ± {half:.{decimals}f}"


def table(runs: Sequence[Result]) -> str:
    lines = header(["scheme", "bytes", "loss", "accuracy", "step", "share of an iteration"], 1)
    for name in names(runs):
        per_parameter, share = (fmean(of(runs, name, key)) for key in ("bytes", "share"))
        loss = _spread(of(runs, name, "loss"), 4)
        right = _spread([100 * x for x in of(runs, name, "accuracy")], 1)
        step = duration(1e-3 * median(of(runs, name, "step_ms")))
        lines.append(line([name, number(per_parameter), loss, f"{right} %", step, f"{share:.1%}"]))
    loops = [run for run in runs if "loop" in run]
    if loops:
        lines += ["", *header(["loop", "steps", "losses beside the plain loop's"], 1)]
        lines += [line([run["loop"], str(run["steps"]), "same bits" if run["same"] else "others"]) for run in loops]
    return "\n".join(lines)
