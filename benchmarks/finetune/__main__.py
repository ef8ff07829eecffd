"""``python -m benchmarks.finetune``: a pretrained model is fine-tuned with AdamW, in 32, 16 and 8 bits, by fusedoptim
and by others: what it learns, what memory that takes, and what part of the time the optimizer has.

Schemes take turns, each seed beginning with another one. Then the same fine-tuning runs in other people's loops, which
should change no bit.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import fusedoptim

from ..common import arguments
from ..common.arguments import UsageError, known
from ..lowprec.schemes import ADAMW, SCHEMES, Scheme, bytes_of
from ..measure.devices import DEVICES
from ..measure.environment import environment
from ..measure.results import Result, Results, check_target, finish
from .loops import LOOPS, plain, timed
from .table import table
from .task import accuracy, make_model, make_task, missing


def _torch(name: str, dtype: torch.dtype) -> Scheme:
    def make(params: Any, lr: float, seed: int) -> Any:
        return torch.optim.AdamW([p for _, p in params], lr=lr, fused=True, **ADAMW)

    return Scheme(name, "", make, dtype)


def _int8(params: Any, lr: float, seed: int) -> Any:
    return fusedoptim.AdamW(params, lr=lr, state_dtype="int8", **ADAMW)


#: By name; those of benchmarks.lowprec are its own.
CHOSEN = {
    "fp32": SCHEMES["fp32"],
    "torch fused, fp32": _torch("torch fused, fp32", torch.float32),
    "fp32, 8 bits": Scheme("fp32, 8 bits", "", _int8, torch.float32),
    **{name: SCHEMES[name] for name in ("torchao, fp32, 8 bits", "bitsandbytes, fp32, 8 bits", "bf16")},
    "torch fused, bf16": _torch("torch fused, bf16", torch.bfloat16),
    **{
        name: SCHEMES[name]
        for name in ("stochastic", "remainder, fp32 moments", "remainder", "remainder, 8 bits", "torchao, bf16, 8 bits",
                     "bitsandbytes, bf16, 8 bits")
    },
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    batch: int = 64
    epochs: int = 1
    lr: float = 1e-4
    #: Of training and of testing at most; None for all.
    batches: int | None = None
    loop_steps: int = 20


QUICK = Settings(batch=8, epochs=1, batches=3, loop_steps=2)


def optimizer_and_schedule(scheme: Scheme, model: torch.nn.Module, settings: Settings, seed: int, steps: int) -> Any:
    optimizer = scheme.make(list(model.named_parameters()), settings.lr, seed)
    warmup = steps // 10
    return optimizer, fusedoptim.warmup_cosine(optimizer, warmup_steps=warmup, total_steps=steps)


def run(scheme: Scheme, settings: Settings, seed: int) -> Result:
    task, model = make_task(seed, settings.batch, settings.batches), make_model(seed, scheme.dtype)
    batches = task.training * settings.epochs
    optimizer, schedule = optimizer_and_schedule(scheme, model, settings, seed, len(batches))
    losses, times = timed(model, optimizer, schedule, batches)
    elements = sum(p.numel() for p in model.parameters())
    last = losses[-max(1, len(losses) // 5) :]
    return {
        "scheme": scheme.name,
        "seed": seed,
        "loss": fmean(last),
        "accuracy": accuracy(model, task.test),
        "bytes": bytes_of(optimizer) / elements,
        "step_ms": median(step for step, _ in times) * 1e3,
        "iteration_ms": median(all_of_it for _, all_of_it in times) * 1e3,
        "share": median(step / all_of_it for step, all_of_it in times),
    }


def compare_loops(settings: Settings) -> list[Result]:
    batches = make_task(0, settings.batch, settings.loop_steps).training
    found: dict[str, list[float]] = {}
    for name, loop in LOOPS.items():
        model = make_model(0, torch.float32)
        found[name] = loop(model, *optimizer_and_schedule(CHOSEN["fp32"], model, settings, 0, len(batches)), batches)
    own = found[next(name for name, loop in LOOPS.items() if loop is plain)]
    return [{"loop": name, "steps": len(losses), "same": losses == own} for name, losses in found.items()]


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.finetune", description=__doc__)
    p.add_argument("--scheme", action="append", help="one of the table's names; can be repeated (default: all)")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="a few steps: to see that it runs")
    p.add_argument("--out", type=Path, help="a results file; its picture is drawn beside it")
    args = p.parse_args(argv)
    names = known("--scheme", args.scheme, CHOSEN)
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, but is {args.seeds}")
    if args.out is not None:
        check_target(args.out)
    if missing():
        raise UsageError(f"install what this trains on: pip install {' '.join(missing())}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in [name for name in names if CHOSEN[name].missing()]:
        print(f"left out: {name}: {CHOSEN[name].missing()}")
        names.remove(name)
    settings = QUICK if args.quick else Settings()
    about = {**environment(DEVICES["cpu"]()), "settings": asdict(settings)}
    results = Results(about, len(names) * args.seeds + len(LOOPS), args.out)
    for seed in range(args.seeds):
        begin = seed * len(names) // args.seeds
        for name in names[begin:] + names[:begin]:
            found = run(CHOSEN[name], settings, seed)
            results.finetuning.append(found)
            results.save()
            print(f"seed {seed}, {name}: loss {found['loss']:.4f}, accuracy {found['accuracy']:.3f}", flush=True)
    results.finetuning.sort(key=lambda row: (names.index(row["scheme"]), row["seed"]))
    results.finetuning += compare_loops(settings)
    finish(results, table(results.finetuning))
    if args.out is not None:
        from .picture import draw

        draw(args.out.with_suffix(".png"), results.finetuning)
    return 0


if __name__ == "__main__":
    arguments.run(main)
