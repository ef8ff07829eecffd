"""``python -m benchmarks.run --device cpu --out FILE.json``: optimizer steps, beside their peers and the machine's
limits, interleaved in one process.

Without a selection it runs a choice of rows, and how time grows with the number and size of tensors; with one, all
combinations of what is selected. An option that takes names can be repeated. ``--quick`` without a selection is a rough
look, over in less than a minute unless others keep the machine busy, which says what it leaves out.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from fusedoptim import _backends

from .common import arguments
from .common.arguments import UsageError
from .measure import plan, rough, scaling
from .measure.cases import CASES
from .measure.devices import DEVICES, device_named
from .measure.environment import environment
from .measure.goals import FOREACH, FUSED, GOALS
from .measure.optimizers import DTYPES, GALLERY, SETTINGS, chosen_settings
from .measure.peers import PEERS, Peer
from .measure.plan import CONDITIONS, Row
from .measure.progress import progress
from .measure.results import OURS, Results, check_target
from .measure.rows import measure
from .measure.timing import Budget
from .tables import everything

FULL, QUICK = Budget(7.0, without_slow=15), Budget(1.0, at_most=31)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = arguments.Parser(prog="python -m benchmarks.run", description=__doc__)
    p.add_argument("--device", default="cpu", help=f"one of {', '.join(DEVICES)} (default: cpu)")
    p.add_argument(
        "--quick", action="store_true", help="a second for a row instead of seven; without a selection, few rows"
    )
    p.add_argument("--optimizer", action="append", help=f"of {', '.join([*SETTINGS, *GALLERY])}, or module:Class")
    p.add_argument("--case", action="append", help=f"of {', '.join(CASES)}")
    p.add_argument("--dtype", action="append", help=f"parameters, or parameters+states, of {', '.join(DTYPES)}")
    p.add_argument("--condition", action="append", help=f"between steps, of {', '.join(CONDITIONS)} (default: kept)")
    p.add_argument("--peer", action="append", help=f"of {', '.join(PEERS)}, or none")
    p.add_argument(
        "--goals", action="store_true", help="only rows that have a goal; and of torch only its fastest code"
    )
    p.add_argument("--reverse", action="store_true", help="the last rows first")
    p.add_argument("--scaling", action="store_true", help="the curves as well, with a selection of rows")
    p.add_argument("--no-scaling", action="store_true", help="leave the curves out")
    p.add_argument("--out", type=Path, help="write the results, with the environment, to this JSON file, row by row")
    return p.parse_args(argv)


def _selection(args: argparse.Namespace) -> bool:
    return bool(args.optimizer or args.case or args.dtype or args.condition)


def _rough(args: argparse.Namespace) -> bool:
    return args.quick and not args.goals and not _selection(args)


def selected_rows(args: argparse.Namespace) -> list[Row]:
    with_goals = list(dict.fromkeys(optimizer for optimizer, _, _ in GOALS[args.device]))
    optimizers = chosen_settings(args.optimizer or (with_goals if args.goals else None))
    cases = arguments.known("--case", args.case, CASES)
    dtypes = arguments.known("--dtype", args.dtype, DTYPES)
    conditions = arguments.known("--condition", args.condition or ["kept"], CONDITIONS)
    if args.goals:
        if args.condition:
            raise UsageError("--goals are for gradients that are kept: leave out --condition")
        wanted = set(plan.combinations(optimizers, dtypes, cases, conditions))
        keys = [key for goal in GOALS[args.device] if (key := (*goal, "kept")) in wanted]
    elif _selection(args):
        keys = plan.combinations(optimizers, dtypes, cases, conditions)
    else:
        keys = rough.chosen() if _rough(args) else plan.chosen()
    return plan.rows(reversed(keys) if args.reverse else keys)


def selected_peers(args: argparse.Namespace) -> list[Peer]:
    if args.peer == ["none"]:
        return []
    asked = args.peer or (rough.CHOSEN_PEERS if _rough(args) else None)
    found = [PEERS[name] for name in arguments.known("--peer", asked, PEERS)]
    return [peer for peer in found if asked or not peer.asked_only]


def beside(row: Row, peers: list[Peer], args: argparse.Namespace) -> list[Peer]:
    """Those for a row. With --goals, torch's foreach code takes part where torch has no fused code, which is faster."""
    fused = PEERS[FUSED]
    if not args.goals or fused not in peers or fused.problem(row.work, row.case, args.device) is not None:
        return peers
    return [p for p in peers if p.name != FOREACH]


def selected_curves(args: argparse.Namespace) -> list[scaling.Curve]:
    if args.no_scaling or ((_selection(args) or args.goals) and not args.scaling):
        return []
    return rough.curves(args.device) if args.quick else scaling.curves(args.device)


@dataclass(frozen=True)
class Item:
    """A row, or a point of a curve, to measure beside peers."""

    row: Row
    peers: list[Peer]
    budget: Budget
    curve: scaling.Curve | None = None

    def __str__(self) -> str:
        return " ".join(self.row.key) if self.curve is None else f"{self.curve.name} {self.row.case.name}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.device = arguments.known("--device", [args.device], DEVICES)[0]
    rows, peers, curves = selected_rows(args), selected_peers(args), selected_curves(args)
    device = device_named(args.device)
    if args.out is not None:
        check_target(args.out)
    few = [p for p in peers if p.name in scaling.PEERS]
    budget, per_point = (rough.BUDGET,) * 2 if _rough(args) else (QUICK if args.quick else FULL, QUICK)
    work = [Item(row, beside(row, peers, args), budget) for row in rows]
    work += [Item(row, few, per_point, curve) for curve in curves for row in curve.rows()]
    results = Results(environment(device), len(work), args.out)
    results.environment["backend"] = _backends.choose(None, device.torch_device)
    results.save()
    end = time.monotonic() + (rough.SECONDS if _rough(args) else math.inf)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' own
            for item in progress(work, str):
                late = time.monotonic() > end
                skipped = {**item.row.describe(), "skipped": rough.TIME_IS_UP}
                found = skipped if late else measure(item.row, device, item.peers, item.budget)
                if item.curve is None:
                    results.rows.append(found)
                else:
                    results.scaling.append({**item.curve.labels(), **found})
                results.save()
        results.environment |= device.describe()  # peers and limits may have loaded another OpenMP runtime
        results.finished = True
        results.save()
    except KeyboardInterrupt:
        where = f"the finished rows are in {args.out}" if args.out else "with --out FILE.json, finished rows are kept"
        print(f"\ninterrupted; {where}", file=sys.stderr)
    print(everything(results))
    if _rough(args):
        print(f"\n{rough.says(results, peers)}\n")
    print(f"{sum('contenders' in r for r in results.rows)} of {len(rows)} rows measured")
    if not results.finished:
        return 130
    return 1 if any("failed" in r or "failed" in r.get("contenders", {}).get(OURS, {}) for r in results.rows) else 0


if __name__ == "__main__":
    gc.freeze()  # what imports have left need not be looked through before every row
    arguments.run(main)
