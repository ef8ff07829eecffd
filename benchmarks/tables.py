"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from .common.units import duration, number
from .measure.environment import machine, source
from .measure.goals import GOALS, Goal, key
from .measure.load import DISTURBING
from .measure.results import COPY, OURS, STREAM, Result, Results, ratio_of
from .measure.scaling import slopes

#: A peer counts as faster from here on; below, the order changes from run to run.
FASTER = 0.97
#: Those with a column of their own in a narrow table.
COLUMNS = (
    "torch foreach",
    "torch fused",
    "DeepSpeedCPUAdam",
    "DeepSpeed FusedAdam",
    "apex",
    "eager reference",
    "Triton backend",
)


def time_of(row: Result, name: str) -> float | None:
    times = row.get("contenders", {}).get(name, {}).get("ms")
    return None if times is None else float(times["median"])


def fastest(row: Result) -> str | None:
    """The peer that is faster than fusedoptim, if there is one, with its ratio."""
    ratios = {n: r for n in row.get("contenders", {}) if (r := ratio_of(row, n)) is not None}
    best = min(ratios, key=lambda n: ratios[n], default=None)
    return best if best is not None and ratios[best] < FASTER else None


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def header(names: Sequence[str], left: int) -> list[str]:
    return [line(names), "|" + "".join("---|" if i < left else "---:|" for i in range(len(names)))]


def _label(row: Result) -> str:
    return f"{row['optimizer']} {row['dtype']}"


def _case(row: Result) -> str:
    extra = {"kept": "", "recreated": ", new gradients", "warm": ", in cache"}[row["condition"]]
    return f"{row['case']}{extra}"


def _share(row: Result, limit: str) -> str:
    share = row.get("contenders", {}).get(OURS, {}).get(f"share_of_{limit}")
    return "" if share is None else f"{share:.2f}"


def _ratio_cells(row: Result, peers: Sequence[str]) -> list[str]:
    """How many times as long each took; the one that beats fusedoptim in bold."""
    winner, cells = fastest(row), []
    for name in peers:
        ratio = ratio_of(row, name)
        text = "" if ratio is None else f"{ratio:.2f}x"
        cells.append(f"**{text}**" if name == winner else text)
    return cells


def _best_of(row: Result, peers: Sequence[str]) -> str:
    """The fastest of these peers, in bold if it beats fusedoptim."""
    ratios = [(r, n) for n in peers if (r := ratio_of(row, n)) is not None]
    if not ratios:
        return ""
    ratio, name = min(ratios)
    text = f"{name} {ratio:.2f}x"
    return f"**{text}**" if name == fastest(row) else text


def _goal(goal: Goal, row: Result) -> str:
    """Nothing where it was not measured."""
    reached = goal.reached_in(row)
    return "" if reached is None else f"{goal}{'' if reached else ' (missed)'}"


def peers_of(rows: Sequence[Result]) -> list[str]:
    """Those that were measured anywhere, in the order of the registry."""
    names = dict.fromkeys(n for r in rows for n in r.get("contenders", {}))
    return [n for n in names if n not in (OURS, COPY, STREAM) and any(ratio_of(r, n) is not None for r in rows)]


def comparison(results: Results, rows: Sequence[Result], narrow: bool = False) -> str:
    """One line per row: fusedoptim's time and bandwidth, the peers' ratios, the goal. In a narrow table only the
    fastest of the lesser known peers appears."""
    goals = GOALS[str(results.environment["device"])]
    measured = peers_of(rows)
    peers = [p for p in measured if p in COLUMNS] if narrow else measured
    rest = [p for p in measured if p not in peers]
    names = ["optimizer", "case", "ms", "GB/s", "of copy", "of stream", *peers]
    names += ["fastest of the others"] if rest else []
    names += ["goal", "faster peer"]
    lines = header(names, 2)
    for row in rows:
        if "contenders" not in row:
            reason = row.get("skipped") or row["failed"]
            lines.append(line([_label(row), _case(row), f"not measured: {reason}", *[""] * (len(names) - 3)]))
            continue
        mine = row["contenders"][OURS]
        if "ms" not in mine:
            lines.append(line([_label(row), _case(row), f"failed: {mine['failed']}", *[""] * (len(names) - 3)]))
            continue
        text = "; ".join(filter(None, (_goal(g, row) for g in goals.get(key(row), ()))))
        cells = [number(mine["ms"]["median"]), number(mine["gb_s"]), _share(row, COPY), _share(row, STREAM)]
        cells += [*_ratio_cells(row, peers), *([_best_of(row, rest)] if rest else [])]
        lines.append(line([_label(row), _case(row), *cells, text, fastest(row) or "none"]))
    return "\n".join(lines)


def summary(rows: Sequence[Result]) -> str:
    """A narrow table: fusedoptim's time, the fastest of torch's own optimizers, the fastest of all others."""
    peers = peers_of(rows)
    of_torch = [p for p in peers if p.startswith("torch ")]
    others = [p for p in peers if p not in of_torch]
    lines = header(["optimizer", "case", "ms", "fastest of torch", "fastest of the others"], 2)
    for row in rows:
        ms = time_of(row, OURS)
        if ms is not None:
            best = [_best_of(row, names) or "none" for names in (of_torch, others)]
            lines.append(line([_label(row), _case(row), number(ms), *best]))
    return "\n".join(lines)


def device_details(rows: Sequence[Result]) -> str:
    """What only a GPU has: launches, host time, time as a graph, memory."""
    lines = header(["optimizer", "case", "", "launches", "copies", "host ms", "graph ms", "extra MiB"], 3)
    for row in rows:
        for name, c in row.get("contenders", {}).items():
            if "launches" in c:
                graph = number(c["graph_ms"]) if "graph_ms" in c else ""
                memory = number(c["peak_extra_bytes"] / 2**20)
                cells = [str(c["launches"]), str(c["copies"]), number(c["host_ms"]), graph, memory]
                lines.append(line([_label(row), _case(row), name, *cells]))
    return "\n".join(lines) if len(lines) > 2 else ""


def disturbed(rows: Sequence[Result]) -> str:
    """Which rows other processes disturbed."""
    found = [f"{_label(r)} {_case(r)}" for r in rows if (r.get("others_cores") or 0.0) > DISTURBING]
    if not found:
        return ""
    return f"Other processes kept more than {DISTURBING} cores busy during: {'; '.join(found)}."


def reasons(rows: Sequence[Result]) -> str:
    """Why peers were left out or failed, once each."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, c in row.get("contenders", {}).items():
            for kind in ("skipped", "failed"):
                if kind in c:
                    key = (name, c[kind] if kind == "skipped" else f"FAILED: {c[kind]}")
                    found[key] = found.get(key, 0) + 1
    return "\n".join(f"- {name} {why} ({n} row{'s' * (n > 1)})" for (name, why), n in found.items())


def flat(rows: Sequence[Result]) -> str:
    """Rows of names and values, whatever these are."""
    names = list(dict.fromkeys(n for r in rows for n in r))
    cells = [[number(v) if isinstance(v := r.get(n, ""), float) else str(v) for n in names] for r in rows]
    return "\n".join([*header(names, 1), *map(line, cells)]) if rows else ""


def unmeasured(device: str, rows: Sequence[Result] = ()) -> str:
    """The goals that no row has anything to set against."""
    by_key = {key(r): r for r in rows if r["condition"] == "kept"}
    lines = header(["optimizer", "case", "goal", "measured"], 3)
    for (optimizer, dtype, case), goals in GOALS[device].items():
        row = by_key.get((optimizer, dtype, case), {})
        left = [goal for goal in goals if goal.found_in(row) is None]
        lines += [line([f"{optimizer} {dtype}", case, str(goal), "not measured"]) for goal in left]
    return "\n".join(lines) if len(lines) > 2 else ""


def other_commits(results: Results, rows: Sequence[Result]) -> str:
    """Which rows were measured at another commit than the file's."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.get("commit", results.environment["commit"]) != results.environment["commit"]:
            found.setdefault(row["commit"], []).append(f"{_label(row)} {_case(row)}")
    return "\n\n".join(f"Measured at commit {name}: {'; '.join(of)}." for name, of in found.items())


def scaling(results: Results) -> str:
    lines = header(["AdamW fp32", "slope"], 1)
    says = {r["curve"]: r["says"] for r in results.scaling}
    for curve, name, what, seconds in slopes(results.scaling):
        lines.append(line([f"{name}: {says[curve]}", f"{duration(seconds)} per {what}"]))
    return "\n".join(lines) if len(lines) > 2 else ""


def storages(found: Sequence[Results]) -> str:
    """How long steps take per 10^9 parameters, and over plain fp32's, on each machine."""
    names, sources = ["storage", "bytes"], []
    rows = {row["storage"]: row for results in found for row in results.storages if row["storage"] != COPY}
    cells = {name: [name, number(float(row["bytes"]))] for name, row in rows.items()}
    for results in found:
        e = results.environment
        names += [str(e["gpu"] if e["device"] == "cuda" else e["cpu"]), "over fp32's"]
        here = {row["storage"]: row for row in results.storages}
        for name, of in cells.items():
            ms = here[name]["ms"] / here[name]["elements"] * 1e9 if name in here else None
            of += ["", ""] if ms is None else [f"{number(ms)} ms", f"{here[name]['over_fp32']:.2f}"]
        commits = dict.fromkeys(row.get("commit", e["commit"]) for row in results.storages)
        sources.append(f"{machine(e)}; torch {e['torch']}; commit {', '.join(commits)}.")
    table = "\n".join([*header(names, 1), *map(line, cells.values())])
    return "\n\n".join([table, " ".join(sources) + " `python -m benchmarks.storages`"])


def everything(results: Results) -> str:
    """All that a run has found, for its end."""
    rows = results.rows
    parts = [
        comparison(results, rows),
        disturbed(rows),
        device_details(rows),
        scaling(results),
        reasons([*rows, *results.scaling]),
    ]
    unfinished = f"interrupted: {len(rows) + len(results.scaling)} of {results.planned} rows are finished"
    parts += [] if results.finished else [unfinished]
    return "\n\n".join([p for p in parts if p] + [source(results.environment)])
