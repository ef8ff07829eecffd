"""How the cost of a step grows: with the number of tensors at a fixed total, and with the total at a fixed number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import Case, evenly
from .optimizers import DTYPES, SETTINGS, Work
from .plan import CONDITIONS, Row
from .results import COPY, STREAM, Result

#: More would take long and say nothing new.
PEERS = ("torch for-loop", "torch foreach", "torch fused", "DeepSpeedCPUAdam", "DeepSpeed FusedAdam")


@dataclass(frozen=True)
class Curve:
    name: str
    says: str
    #: The number in a row that the time is set against.
    over: str
    cases: tuple[Case, ...]

    def labels(self) -> Result:
        return {"curve": self.name, "says": self.says, "over": self.over}

    def rows(self) -> list[Row]:
        return [Row(Work(SETTINGS["AdamW"], DTYPES["fp32"]), case, CONDITIONS["kept"]) for case in self.cases]


TOTAL = {"cpu": 1 << 23, "cuda": 1 << 27}
LARGEST = {"cpu": 1 << 26, "cuda": 1 << 30}
TENSORS = 64


def curves(device: str) -> list[Curve]:
    total, largest = TOTAL[device], LARGEST[device]
    return [
        Curve(
            "tensors",
            f"number of tensors, {total >> 20} M elements in all",
            "tensors",
            tuple(evenly(1 << k, total) for k in range(0, 15, 2)),
        ),
        Curve(
            "elements",
            f"elements in all, {TENSORS} tensors",
            "elements",
            tuple(evenly(TENSORS, largest >> k) for k in range(10, -1, -2)),
        ),
    ]


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the line through points (x, ms) with the least squares of relative errors, so that every magnitude counts
    alike. None for fewer than three points."""
    if len(points) < 3:
        return None
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    rise = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True))
    return rise / sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))


def points(rows: Sequence[Result], curve: str, contender: str) -> list[tuple[float, float]]:
    """(tensors or elements, ms) of a contender, where it was measured."""
    found = [r for r in rows if r["curve"] == curve and "ms" in r.get("contenders", {}).get(contender, {})]
    return sorted((r[r["over"]], r["contenders"][contender]["ms"]["median"]) for r in found)


def slopes(rows: Sequence[Result]) -> list[tuple[str, str, str, float]]:
    """(curve, contender, what, seconds per one of it) for every contender that has a slope."""
    out = []
    for curve in dict.fromkeys(r["curve"] for r in rows):
        of_curve = [r for r in rows if r["curve"] == curve]
        what = of_curve[0]["over"].removesuffix("s")
        for name in dict.fromkeys(n for r in of_curve for n in r.get("contenders", {})):
            value = slope(points(rows, curve, name)) if name not in (COPY, STREAM) else None
            if value is not None:
                out.append((curve, name, what, value * 1e-3))
    return out
