"""``python -m benchmarks.lowprec``: does a model learn the same with parameters and states in fewer bits?

A small GPT is trained in fp32 on Python's sources. From this one checkpoint, it is fine-tuned on the prose of Python's
manual under each scheme, and exactly: with fp32 numbers for what the scheme stores. All schemes see the same batches,
weights in bf16 and gradients in bf16 (but for fp32 parameters); the model computes in fp32. Each run is repeated with
other batches and random bits, and once more with a burst: in one step, one gradient of 2048 is 10,000 times too large.

One thread computes, so the numbers, but for the times, do not depend on the machine's cores. ``--out`` gets a line
after every run; ``--resume`` goes on after the last one.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..common import arguments
from ..common.arguments import UsageError, known
from ..measure.devices import DEVICES
from ..measure.environment import environment
from ..measure.results import Result, Results, finish, load
from .finetuning import QUICK, Outcome, Settings, distance, finetuned, pretrained, texts
from .schemes import EXACT, SCHEMES, Scheme, rounded
from .table import schemes as schemes_of
from .table import table

Key = tuple[str, int, bool]


def row(scheme: Scheme, seed: int, burst: bool, found: Outcome, exact: Outcome, start: torch.Tensor) -> Result:
    return {
        "scheme": scheme.name,
        "options": scheme.options,
        "seed": seed,
        "burst": burst,
        "bytes": found.bytes_per_parameter,
        "loss": found.loss,
        "loss_above_exact": found.loss - exact.loss,
        "distance": distance(found.numbers, exact.numbers, start),
        "step_us": found.seconds * 1e6,
    }


def row_of_exact(seed: int, burst: bool, exact: Outcome, start: torch.Tensor) -> Result:
    at_end = distance(rounded(exact.numbers), exact.numbers, start)
    losses = {"loss_before": exact.loss_before, "loss": exact.loss}
    return {"scheme": EXACT.name, "seed": seed, "burst": burst, **losses, "distance_if_rounded": at_end}


def run(results: Results, settings: Settings, names: list[str], seeds: int) -> None:
    """What the results lack; saved after every run."""
    done: set[Key] = {(r["scheme"], r["seed"], r["burst"]) for r in results.runs}
    first, second = texts(settings.context)
    start = pretrained(settings, first)
    flat = torch.cat([x.flatten() for x in start.values()])
    for seed in range(seeds):
        for burst in (False, True):
            left = [name for name in names if (name, seed, burst) not in done]
            if not left:
                continue
            exact = finetuned(start, EXACT, second, settings, seed, burst)
            if (EXACT.name, seed, burst) not in done:
                results.runs.append(row_of_exact(seed, burst, exact, flat))
            for name in left:
                found = finetuned(start, SCHEMES[name], second, settings, seed, burst)
                results.runs.append(row(SCHEMES[name], seed, burst, found, exact, flat))
                results.save()
                says = {key: results.runs[-1][key] for key in ("distance", "loss_above_exact")}
                print(f"seed {seed}, {'burst, ' if burst else ''}{name}: {says}", flush=True)
    results.runs.sort(key=lambda r: [EXACT.name, *SCHEMES].index(r["scheme"]))


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.lowprec", description=__doc__)
    p.add_argument("--scheme", action="append", help="one of the table's names; can be repeated (default: all)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="a tiny model, a few steps: to see that it runs")
    p.add_argument("--out", type=Path, help="a results file; its picture is drawn beside it")
    p.add_argument("--resume", action="store_true", help="keep the runs that --out has, and make the others")
    args = p.parse_args(argv)
    names = known("--scheme", args.scheme, SCHEMES)
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, but is {args.seeds}")
    if args.resume and args.out is None:
        raise UsageError("--resume needs --out")
    missing = {name: why for name in names if (why := SCHEMES[name].missing())}
    for name, why in missing.items():
        print(f"left out: {name}: {why}")
    names = [name for name in names if name not in missing]
    settings = QUICK if args.quick else Settings()
    torch.set_num_threads(1)
    about = {**environment(DEVICES["cpu"]()), "settings": asdict(settings)}
    results = Results(about, (1 + len(names)) * args.seeds * 2, args.out)
    if args.resume and args.out.exists():
        before = load(args.out)
        for key in ("settings", "commit", "torch", "capability"):
            if before.environment.get(key) != about[key]:
                raise UsageError(f"--resume: {args.out} has {key} {before.environment.get(key)}, this run {about[key]}")
        results.runs = before.runs
    run(results, settings, names, args.seeds)
    finish(results, table(results.runs))
    if args.out is not None and schemes_of(results.runs):
        from .picture import draw

        draw(args.out.with_suffix(".png"), results.runs)
    return 0


if __name__ == "__main__":
    arguments.run(main)
