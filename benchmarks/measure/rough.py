"""A rough look at a machine: what ``python -m benchmarks.run --quick`` measures, in less than a minute unless others
keep the machine busy, and what it leaves out of a full run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from . import plan, scaling
from .optimizers import SETTINGS
from .peers import PEERS, Peer
from .results import Results
from .timing import Budget

#: For a row, and for a point of a curve. A slow or busy machine gets fewer peers and rounds.
BUDGET = Budget(0.5, at_most=31, row_seconds=3.0)
#: No row begins later. One that has begun may still take its ``row_seconds``, and what surrounds them.
SECONDS = 45.0
TIME_IS_UP = f"{SECONDS:g} s, the time of a rough look, were up"
#: torch's own codes and what is closest to them. Others compile for seconds in every row, or take as long as all of
#: these together. The fastest are first, in case that there is no time for more.
CHOSEN_PEERS = (*reversed(scaling.PEERS), "eager reference")


def chosen() -> list[plan.Key]:
    """Rows of a full run. First one for every optimizer, of a model whose tensors exceed the caches by little more than
    they have to."""
    keys: list[plan.Key] = [(optimizer, "fp32", plan.MEDIUM, "kept") for optimizer in SETTINGS]
    keys += [("AdamW", "fp32", case, "kept") for case in (*plan.SMALL, plan.LARGE)]
    keys += [("SGD", "fp32", plan.SMALL[0], "kept"), ("AdamW", "bf16", plan.LARGE, "kept")]
    return list(dict.fromkeys(keys))


def curves(device: str) -> list[scaling.Curve]:
    """Every other point of the curves."""
    return [dataclasses.replace(c, cases=c.cases[::2]) for c in scaling.curves(device)]


def says(results: Results, peers: Sequence[Peer]) -> str:
    """What a run with these results and peers is, and what a full one has that it has nothing of."""
    device, full = str(results.environment["device"]), plan.chosen()
    rows, points = ([r for r in part if "contenders" in r] for part in (results.rows, results.scaling))
    all_points = sum(len(c.cases) for c in scaling.curves(device))
    left = {}
    for i, kind in enumerate(("optimizer", "dtype", "case", "condition")):
        has = {row[kind] for row in rows}
        left[f"{kind}s"] = [name for name in dict.fromkeys(key[i] for key in full) if name not in has]
    left["peers"] = [p.name for p in PEERS.values() if device in p.devices and p not in peers]
    return "\n".join(
        [
            f"A rough look: {len(rows)} of the {len(full)} rows of a full run and {len(points)} of its {all_points} "
            f"points of curves, {BUDGET.seconds:g} s and up to {BUDGET.at_most} steps for each. Left out:",
            *(f"- {kind}: {', '.join(names)}" for kind, names in left.items() if names),
            "Without --quick they take part; --optimizer, --case, --dtype, --condition and --peer choose some of them.",
        ]
    )
