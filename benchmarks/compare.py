"""``python -m benchmarks.compare OLD.json NEW.json``: prints what got slower beyond the noise, and exits with 1 then.

Machines change from minute to minute. What the other contenders of a row, which are the same code in both files, did in
the mean counts as the machine's doing and is taken out. What remains counts if it exceeds the threshold and if the
middle 60 % of the two runs' times, so corrected, do not overlap.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from .common import arguments
from .common.units import number
from .measure.results import OURS, Result, Results, key_of, load
from .tables import header, line

Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """New over old time: as measured, of the others in the row, and what is left of the first without the second."""

    key: Key
    old: dict[str, float]
    new: dict[str, float]
    machine: float

    @property
    def own(self) -> float:
        return self.new["median"] / self.old["median"] / self.machine

    def beyond(self, threshold: float) -> int:
        """1 if slower, -1 if faster, 0 if neither beyond threshold and noise."""
        if self.own > 1 + threshold and self.new["q20"] / self.machine > self.old["q80"]:
            return 1
        if self.own < 1 / (1 + threshold) and self.new["q80"] / self.machine < self.old["q20"]:
            return -1
        return 0


def rows(results: Results) -> dict[Key, Result]:
    measured: dict[Key, Result] = {key_of(r): r for r in results.rows}
    measured |= {(r["curve"], r["case"]): r for r in results.scaling}
    return {k: r for k, r in measured.items() if "ms" in r.get("contenders", {}).get(OURS, {})}


def changes(old: Results, new: Results) -> list[Change]:
    before, after = rows(old), rows(new)
    out = []
    for key in before.keys() & after.keys():
        a, b = before[key]["contenders"], after[key]["contenders"]
        others = [n for n in a if n != OURS and n in b and "ms" in a[n] and "ms" in b[n]]
        factors = [b[n]["ms"]["median"] / a[n]["ms"]["median"] for n in others]
        out.append(Change(key, a[OURS]["ms"], b[OURS]["ms"], statistics.median(factors) if factors else 1.0))
    return sorted(out, key=lambda c: -c.own)


def table(found: list[Change]) -> str:
    lines = header(["row", "old ms", "new ms", "machine", "change without it"], 1)
    for c in found:
        cells = [number(c.old["median"]), number(c.new["median"]), f"{c.machine:.2f}x", f"{c.own:.2f}x"]
        lines.append(line([" ".join(c.key), *cells]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.compare", description=__doc__)
    p.add_argument("old", type=Path)
    p.add_argument("new", type=Path)
    p.add_argument("--threshold", type=float, default=0.05, help="what counts, as a share (default: 0.05)")
    args = p.parse_args(argv)
    old, new = load(args.old), load(args.new)
    found = changes(old, new)
    slower = [c for c in found if c.beyond(args.threshold) > 0]
    faster = [c for c in found if c.beyond(args.threshold) < 0]
    for key in ("device", "torch", "cpu", "threads", "capability", "gpu", "packages"):
        a, b = old.environment.get(key), new.environment.get(key)
        if a != b:
            print(f"note: {key} was {a} and is {b}")
    missing = rows(old).keys() - rows(new).keys()
    for row in sorted(missing):
        print(f"note: no longer measured: {' '.join(row)}")
    for title, part in (("slower", slower), ("faster", faster)):
        if part:
            print(f"\n{title}:\n\n{table(part)}\n")
    print(f"{len(found)} rows in both, {len(slower)} slower, {len(faster)} faster, {len(missing)} missing")
    return 1 if slower or not found else 0


if __name__ == "__main__":
    arguments.run(main)
