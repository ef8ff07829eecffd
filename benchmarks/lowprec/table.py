"""Runs as a Markdown table: a line per scheme, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..common.units import number
from ..measure.results import Result
from .schemes import EXACT, FP32


def of(runs: Sequence[Result], scheme: str, key: str, burst: bool = False) -> list[float]:
    """Over seeds. What is not finite is in a results file as text."""
    found = [run for run in runs if run["scheme"] == scheme and run["burst"] == burst and key in run]
    return [float(run[key]) for run in sorted(found, key=lambda run: run["seed"])]


def schemes(runs: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(run["scheme"] for run in runs if run["scheme"] != EXACT.name))


def spread(values: Sequence[float]) -> str:
    """The mean, of three digits that count, and half the range over seeds where that shows in them."""
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    text = number(mean) if math.isfinite(mean) else str(mean)
    decimals = len(text.partition(".")[2])
    range_of = f"{half:.{decimals}f}"
    return f"{text} ± {range_of}" if float(range_of) > 0 else text


def _loss(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return ""
    range_of = f"{(max(values) - min(values)) / 2:.4f}"
    return f"{sum(values) / len(values):{sign}.4f}" + (f" ± {range_of}" if float(range_of) else "")


def table(runs: Sequence[Result]) -> str:
    names = ("scheme", "options", "bytes", "loss", "distance", "after a burst", "time")
    lines = [_line(names), "|---|---|" + "---:|" * (len(names) - 2)]
    before = _loss(of(runs, EXACT.name, "loss_before"))
    lines.append(_line([EXACT.name, f"loss before: {before}", "", _loss(of(runs, EXACT.name, "loss")), "0", "0", ""]))
    at_end = [spread(of(runs, EXACT.name, "distance_if_rounded", burst)) for burst in (False, True)]
    lines.append(_line(["exact, rounded to bf16 at its end", "", "", "", *at_end, ""]))
    for name in schemes(runs):
        [first, *_] = [run for run in runs if run["scheme"] == name]
        cells = [name, f"`{first['options']}`" if first["options"] else "", number(first["bytes"])]
        cells += [_loss(of(runs, name, "loss_above_exact"), "+")]
        cells += [spread(of(runs, name, "distance", burst)) for burst in (False, True)]
        lines.append(_line([*cells, _time(runs, name)]))
    return "\n".join(lines)


def _time(runs: Sequence[Result], name: str) -> str:
    own, fp32 = (of(runs, scheme, "step_us") + of(runs, scheme, "step_us", True) for scheme in (name, FP32))
    return f"{min(own) / min(fp32):.2f}" if own and fp32 else ""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
