"""``python -m benchmarks.ab --device cuda --out FILE.json``: variants of the kernels against what is built in, two
optimizers in one process that take turns. Whether their parameters have the same bits in the end is said as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fusedoptim import _native

from . import arguments, plan
from .commit import commit
from .data import Data
from .devices import DEVICES, Device
from .files import write_atomically
from .measure import Budget, Contender, explain, interleaved, quantiles, ratios
from .peers import ours
from .results import Result
from .rows import Entrant
from .run import device_named

BUDGET = Budget(2.0, at_least=9, at_most=41)


@dataclass(frozen=True)
class Switch:
    """A variant: tunables of the CUDA library with other values, and what it may make faster or slower."""

    name: str
    values: dict[str, int]
    cases: tuple[plan.Key, ...]


BF16, FP32 = (("AdamW", dtype, "gpt2-xl", "kept") for dtype in ("bf16", "fp32"))
NORMS = (("NormAdaptive", "fp32", "1G", "kept"), ("NormAdaptive", "fp32", "gpt2-xl", "kept"))
#: A line per variant, most telling first. The names of tunables are those of the CUDA library.
SWITCHES: tuple[Switch, ...] = ()


def tune() -> Callable[[str, int], int] | None:
    """Sets a tunable and returns its value before; None if the library has no switches."""
    found: Callable[[str, int], int] | None = getattr(_native, "tune", None)
    return found


def apply(values: dict[str, int]) -> dict[str, int]:
    """Returns the values before."""
    setter = tune()
    assert setter is not None
    return {name: setter(name, value) for name, value in values.items()}


def measure(switch: Switch, key: plan.Key, device: Device) -> Result:
    """How many times as long the variant took as what is built in."""
    row = plan.row(key)
    result = {"switch": switch.name, "values": switch.values, "row": " ".join(key[:3]), "commit": commit()}
    built_in = apply(switch.values)
    try:
        device.release()
        data = Data(row.case, row.work.dtypes.param, device.torch_device, 1)
        entrants: dict[str, Entrant] = {}
        contenders: dict[str, Contender] = {}
        for name, values in (("A", built_in), ("B", switch.values)):

            def prepare(number: int, name: str = name, values: dict[str, int] = values) -> None:
                apply(values)
                entrants[name].prepare(number)

            apply(values)  # tables are made in the first step
            entrants[name] = Entrant(row, data, ours)
            contenders[name] = Contender(entrants[name].step, prepare, throughout=True)
        times = interleaved(contenders, device, BUDGET)
        for t in times.values():
            if t.error is not None:
                return {**result, "failed": t.error}
        same = all(map(torch.equal, *(e.params for e in entrants.values())))
        milliseconds = {name: quantiles(t.seconds)["median"] * 1e3 for name, t in times.items()}
        return {**result, "ms": milliseconds, "ratio": quantiles(ratios(times["B"], times["A"])), "same_bits": same}
    finally:
        apply(built_in)


def says(result: Result) -> str:
    if "failed" in result:
        return f"{result['switch']}, {result['row']}: FAILED: {result['failed']}"
    ms, r = result["ms"], result["ratio"]
    bits = "the same bits" if result["same_bits"] else "OTHER BITS"
    return (
        f"{result['switch']}, {result['row']}: {ms['A']:.4g} ms built in, {ms['B']:.4g} ms with {result['values']}: "
        f"{r['median']:.3f} ({r['q20']:.3f} to {r['q80']:.3f}, {r['n']} rounds), {bits}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = arguments.Parser(prog="python -m benchmarks.ab", description=__doc__)
    p.add_argument("--device", default="cuda", help=f"one of {', '.join(DEVICES)} (default: cuda)")
    p.add_argument("--out", type=Path, help="write the results to this JSON file, one by one")
    p.add_argument("--switch", action="append", help=f"of {', '.join(s.name for s in SWITCHES) or 'none so far'}")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = device_named(arguments.known("--device", [args.device], DEVICES)[0])
    chosen = arguments.known("--switch", args.switch, [s.name for s in SWITCHES])
    results: list[Result] = []
    if tune() is None or not SWITCHES:
        print("no switches: the library has none, or none are listed here")
        return 0
    for switch in (s for s in SWITCHES if s.name in chosen):
        for key in switch.cases:
            try:
                results.append(measure(switch, key, device))
            except Exception as error:  # of this pair, and nothing to the others
                results.append({"switch": switch.name, "row": " ".join(key[:3]), "failed": explain(error)})
            print(says(results[-1]), flush=True)
            if args.out is not None:
                write_atomically(args.out, lambda f: f.write(json.dumps(results, indent=1).encode()))
    return 1 if any("failed" in r or not r["same_bits"] for r in results) else 0


if __name__ == "__main__":
    arguments.run(main)
