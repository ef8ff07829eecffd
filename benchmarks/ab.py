"""``python -m benchmarks.ab --device cuda --out FILE.json``: variants of the kernels against what is built in, two
optimizers in one process that take turns. Whether their parameters have the same bits in the end is said as well.
A variant is a choice of csrc/gpu/tuning.h, or a library that benchmarks.prebuild compiled in another way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fusedoptim import _native

from .common import arguments
from .common.commit import commit
from .common.files import write_atomically
from .measure import plan
from .measure.contest import Entrant
from .measure.data import Data
from .measure.devices import DEVICES, Device, device_named
from .measure.peers import ours
from .measure.results import Result
from .measure.timing import Budget, Contender, explain, interleaved, quantiles, ratios

BUDGET = Budget(2.0, at_least=9, at_most=41)
Values = dict[str, int]


@dataclass(frozen=True)
class Switch:
    """A variant, and what it may make faster or slower."""

    name: str
    cases: tuple[plan.Key, ...]
    values: Values = field(default_factory=dict)
    library: str = ""


BF16, FP32 = ((("AdamW", dtype, "gpt2-xl", "kept"),) for dtype in ("bf16", "fp32"))
NORMS = (("NormAdaptive", "fp32", "gpt2-small", "kept"), ("NormAdaptive", "fp32", "gpt2-xl", "kept"))
#: A line per variant, most telling first.
SWITCHES = (
    Switch("windows of a sixteenth", NORMS, {"norm_windows": 16}),
    Switch("six-blocks", (*BF16, *FP32), library="six-blocks"),
    Switch("branching", (*BF16, *FP32), library="branching"),
)


def library_of(variant: str) -> Path:
    path = _native.cuda_library()
    return path.with_suffix(f".{variant}.so") if variant else path


def apply(values: Values, library: str) -> Values:
    """Returns the values before. No library: the ordinary one."""
    if library_of(library).exists():  # steps on the CPU need none
        _native.load_cuda(library_of(library))
    return {name: _native.tune(name, value) for name, value in values.items()}


def measure(switch: Switch, key: plan.Key, device: Device) -> Result:
    """How many times as long the variant took as what is built in."""
    row = plan.row(key)
    result: Result = {
        "switch": switch.name,
        "values": switch.values or switch.library,
        "row": " ".join(key[:3]),
        "commit": commit(),
    }
    if switch.library and not library_of(switch.library).exists():
        return {**result, "skipped": f"there is no {library_of(switch.library).name}: benchmarks.prebuild makes it"}
    built_in = apply(switch.values, "")
    try:
        device.release()
        data = Data(row.case, row.work.dtypes.param, device.torch_device, 1)
        entrants: dict[str, Entrant] = {}
        contenders: dict[str, Contender] = {}
        for name, values, library in (("A", built_in, ""), ("B", switch.values, switch.library)):

            def prepare(number: int, name: str = name, values: Values = values, library: str = library) -> None:
                apply(values, library)
                entrants[name].prepare(number)

            apply(values, library)  # tables are made in the first step
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
        apply(built_in, "")


def says(result: Result) -> str:
    for state in ("failed", "skipped"):
        if state in result:
            return f"{result['switch']}, {result['row']}: {state.upper()}: {result[state]}"
    ms, r = result["ms"], result["ratio"]
    bits = "the same bits" if result["same_bits"] else "OTHER BITS"
    return (
        f"{result['switch']}, {result['row']}: {ms['A']:.4g} ms built in, {ms['B']:.4g} ms with {result['values']}: "
        f"{r['median']:.3f} ({r['q20']:.3f} to {r['q80']:.3f}, {r['n']} rounds), {bits}"
    )


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.ab", description=__doc__)
    p.add_argument("--device", default="cuda", help=f"one of {', '.join(DEVICES)} (default: cuda)")
    p.add_argument("--out", type=Path, help="write the results to this JSON file, one by one")
    p.add_argument("--switch", action="append", help=f"of {', '.join(s.name for s in SWITCHES)}")
    p.add_argument("--case", action="append", help="only with these; can be repeated")
    args = p.parse_args(argv)
    device = device_named(args.device)
    chosen = arguments.known("--switch", args.switch, [s.name for s in SWITCHES])
    results: list[Result] = []
    for switch in (s for s in SWITCHES if s.name in chosen):
        for key in (k for k in switch.cases if args.case is None or k[2] in args.case):
            try:
                results.append(measure(switch, key, device))
            except Exception as error:  # of this pair, and nothing to the others
                results.append({"switch": switch.name, "row": " ".join(key[:3]), "failed": explain(error)})
            print(says(results[-1]), flush=True)
            if args.out is not None:
                write_atomically(args.out, lambda f: f.write(json.dumps(results, indent=1).encode()))
    return 1 if any("failed" in r or not r.get("same_bits", True) for r in results) else 0


if __name__ == "__main__":
    arguments.run(main)
