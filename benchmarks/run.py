"""``python -m benchmarks.run --device cpu --quick``: steps beside torch's own, interleaved in one process.

Every row steps the same case with fusedoptim and with its peers, each on parameters of its own. Ratios are medians over
rounds; above 1 fusedoptim is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import fusedoptim

from .cases import CASES, Case
from .environment import environment
from .measure import Times, interleaved, ratio
from .stream import stream


@dataclass(frozen=True)
class Row:
    optimizer: str
    dtype: torch.dtype
    case: str
    #: The peer to compare with, "fused", "foreach" or "reference", and the ratio that is the goal.
    peer: str
    goal: float
    #: Reads and writes of the step per element, for the plain stream.
    reads_writes: tuple[int, int] | None = None


F32, BF16 = torch.float32, torch.bfloat16
ROWS = [
    *(Row("AdamW", F32, case, "fused", 0.97, (4, 3)) for case in ("64M", "gpt2-small")),
    *(Row("SGD", F32, case, "fused", 0.97, (3, 2)) for case in ("64M", "gpt2-small")),
    *(Row("Adagrad", F32, case, "fused", 0.97, (3, 2)) for case in ("64M", "gpt2-small")),
    *(Row("AdamW", BF16, case, "fused", 2.0, (4, 3)) for case in ("64M", "gpt2-small")),
    *(Row("RMSprop", F32, case, "foreach", 5.0, (3, 2)) for case in ("64M", "gpt2-small")),
    Row("AdamW", F32, "2000x64", "fused", 15.0),
    Row("SGD", F32, "2000x64", "fused", 7.0),
    Row("AdamW", F32, "2000x1024", "fused", 6.0),
    Row("AdamW", F32, "465 groups", "fused", 25.0),
    Row("NormAdaptive", F32, "gpt2-small", "reference", 4.0),
]
OPTIONS: dict[str, dict[str, object]] = {"SGD": {"momentum": 0.9}}


def stepper(row: Row, case: Case, peer: str | None) -> Callable[[], object]:
    """A call that steps the case once: with fusedoptim, or with the peer."""
    groups = case.grouped(case.parameters(row.dtype))
    options = dict(OPTIONS.get(row.optimizer, {}))
    if peer is None:
        return getattr(fusedoptim, row.optimizer)(groups, **options).step
    if peer == "reference":
        return getattr(fusedoptim, row.optimizer)(groups, backend="reference", **options).step
    return getattr(torch.optim, row.optimizer)(groups, **options, **{peer: True}).step


def measure(row: Row, budget: float) -> dict[str, object]:
    case = CASES[row.case]
    calls = {"fusedoptim": stepper(row, case, None), row.peer: stepper(row, case, row.peer)}
    problem = None
    if row.reads_writes is not None:
        try:
            calls["stream"] = stream(case.elements * row.dtype.itemsize // 4, *row.reads_writes)
        except Exception as error:
            problem = f"no plain stream: {error}"
    times = interleaved(calls, budget)
    result: dict[str, object] = {
        "optimizer": row.optimizer,
        "dtype": str(row.dtype).removeprefix("torch."),
        "case": row.case,
        "elements": case.elements,
        "tensors": len(case.shapes),
        "peer": row.peer,
        "ms": {name: _summary(t) for name, t in times.items()},
        "speedup": ratio(times[row.peer], times["fusedoptim"]),
        "goal": row.goal,
    }
    if "stream" in times:
        result["share_of_stream"] = ratio(times["stream"], times["fusedoptim"])
    if problem is not None:
        result["note"] = problem
    return result


def _summary(t: Times) -> dict[str, float]:
    return {"median": t.median * 1e3, "q20": t.quantile(0.2) * 1e3, "q80": t.quantile(0.8) * 1e3, "n": len(t.seconds)}


def table(results: list[dict[str, object]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| optimizer | case | fusedoptim ms | peer | peer ms | speed-up | goal | share of plain stream |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for r in results:
        ms: dict[str, dict[str, float]] = r["ms"]  # type: ignore[assignment]
        share = f"{r['share_of_stream']:.2f}" if "share_of_stream" in r else ""
        torch_or_own = "eager reference" if r["peer"] == "reference" else f"torch {r['peer']}"
        lines.append(
            f"| {r['optimizer']} {r['dtype']} | {r['case']} | {ms['fusedoptim']['median']:.3g} | {torch_or_own} "
            f"| {ms[str(r['peer'])]['median']:.3g} | **{r['speedup']:.2f}x** | {r['goal']:g}x | {share} |"
        )
    return "\n".join(lines)


def save(path: Path, results: list[dict[str, object]]) -> None:
    text = json.dumps({"environment": environment(), "results": results}, indent=1) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as f:
        f.write(text)
    os.replace(f.name, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="1.5 s per row instead of 8")
    parser.add_argument("--optimizer", action="append", choices=sorted({r.optimizer for r in ROWS}))
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--out", type=Path, help="write the results, with the environment, to this JSON file")
    args = parser.parse_args()
    if args.out is not None:
        try:
            save(args.out, [])
        except OSError as error:
            print(f"--out {args.out} cannot be written: {error}", file=sys.stderr)
            return 2
    rows = [r for r in ROWS if not args.optimizer or r.optimizer in args.optimizer]
    rows = [r for r in rows if not args.case or r.case in args.case]
    results: list[dict[str, object]] = []
    for i, row in enumerate(rows):
        print(f"\r[{i + 1}/{len(rows)}] {row.optimizer} {row.case:<12}", end="", file=sys.stderr, flush=True)
        results.append(measure(row, 1.5 if args.quick else 8.0))
        if args.out is not None:
            save(args.out, results)
    print(file=sys.stderr)
    print(table(results))
    e = environment()
    print(f"\n{e['cpu']}, {e['threads']} threads, {e['capability']}, torch {e['torch']}, commit {e['commit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
