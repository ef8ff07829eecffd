"""``torchrun --nproc_per_node 2 -m benchmarks.moe``: a mixture of experts with 5,000 parameter tensors.

Its tensors are sharded by FSDP2 on the CPU. Each token goes to one expert of 275, so most tensors have no gradient in a
step, and other ones in the next. Contenders have models of their own and take turns, step by step.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from ..common import arguments
from ..common.arguments import UsageError
from ..measure.devices import DEVICES
from ..measure.environment import environment
from ..measure.results import Result, Results, check_target, finish, rounded
from ..text import load_text
from ..train import parallel
from .contenders import ALWAYS, CONTENDERS, OURS
from .table import model, table
from .training import Settings, Training, summary

QUICK = Settings(layers=1, width=16, heads=2, experts=12, hidden=4, context=4, batch=2, steps=8, few=1, warmup=2)


def guests_of(settings: Settings) -> dict[int, str]:
    """At which steps, at the start and at the end, those take part that do not take all; no two at the same."""
    names = [name for name in CONTENDERS if name not in ALWAYS for _ in range(settings.few)]
    return dict(enumerate(names)) | dict(enumerate(names, settings.steps - len(names)))


def trained(settings: Settings) -> list[Result]:
    """A row per contender."""
    text = load_text(None, settings.context)
    trainings = {name: Training(settings, make) for name, make in CONTENDERS.items()}
    guests = guests_of(settings)
    for step in range(settings.steps):
        turns = [trainings[name] for name in ALWAYS]
        if step in guests:
            turns.append(guest := trainings[guests[step]])
            if guests.get(step - 1) != guests[step]:
                guest.adopt(trainings[OURS])
        first = step % len(turns)
        for training in turns[first:] + turns[:first]:
            training.step(text, step)
        if step % 10 == 0:
            parallel.say(f"step {step}: loss {trainings[OURS].taken[-1].loss:.3f}", flush=True)
    beside = trainings[OURS]
    return [{"contender": name, **summary(training, beside, text)} for name, training in trainings.items()]


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="torchrun --nproc_per_node 2 -m benchmarks.moe", description=__doc__)
    p.add_argument("--quick", action="store_true", help="a tiny model, a few steps: to see that it runs")
    p.add_argument("--out", type=Path, help="a results file; its picture is drawn beside it")
    args = p.parse_args(argv)
    if not parallel.launched():
        raise UsageError("a model is shared by processes: torchrun --nproc_per_node 2 -m benchmarks.moe starts them")
    settings = QUICK if args.quick else Settings()
    parallel.check(settings.batch)
    if args.out is not None:
        check_target(args.out)
    torch.set_num_threads(1)
    about = {**environment(DEVICES["cpu"]()), "settings": asdict(settings), "processes": parallel.world()}
    about["command"] = about["command"].replace("python", f"torchrun --nproc_per_node {parallel.world()}", 1)
    with parallel.joined():
        found = trained(settings)
    if not parallel.is_first():
        return 0
    results = Results(about, len(CONTENDERS), args.out)
    results.experts = rounded(found)
    finish(results, f"{table(results.experts)}\n\n{model(results.experts)}")
    if args.out is not None:
        from .picture import draw

        draw(args.out.with_suffix(".png"), results.experts)
    return 0


if __name__ == "__main__":
    arguments.run(main)
