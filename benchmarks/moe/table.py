"""Trainings of the mixture as a Markdown table: a line per contender."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..common.units import duration, number
from ..measure.results import Result
from ..tables import header, line


def _time(ms: float | None) -> str:
    return "" if ms is None else duration(ms * 1e-3)


def _same(row: Result) -> str:
    if row["first_difference"] is None:
        numbers = ", parameters and states too" if row["same_numbers"] else ""
        return f"all {row['steps']}{numbers}"
    return f"differ by {float(row['difference']):.0e}"


def table(experts: Sequence[Result]) -> str:
    names = ["AdamW", "steps", "clip + step, first gradients", "later", "mean", "fusedoptim there", "share", "states"]
    lines, ours = header([*names, "same losses"], 1), dict(experts[0]["ms"])
    for i, row in enumerate(experts):
        cells = [row["contender"], str(row["steps"]), _time(row["first_ms"]), _time(row["later_ms"])]
        cells += [_time(fmean(of[step] for step, _ in row["ms"])) for of in (dict(row["ms"]), ours)]
        cells += [f"{row['share']:.1%}", f"{number(row['state_bytes'] / 1e6)} MB"]
        lines.append(line([*cells, _same(row) if i else ""]))
    return "\n".join(lines)


def model(experts: Sequence[Result]) -> str:
    """What was trained, in a sentence."""
    row = experts[0]
    return (
        f"{row['tensors']} tensors, {row['elements'] / 1e6:.2f} M parameters. In a step, {row['without_gradient']:.0f} "
        f"tensors had no gradient, on average; after {row['steps']} steps, {row['with_gradients']} had had one, and "
        f"{row['with_states']} had states. Validation loss at the end: {row['validation']:.3f}."
    )
