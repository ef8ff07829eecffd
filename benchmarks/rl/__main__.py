"""``python -m benchmarks.rl``: RMSprop in reinforcement learning.

An advantage actor-critic learns CartPole, on 16 environments with rollouts of 5 steps. Each contender has an agent of
its own for every seed; the agents of a seed take turns, update by update, so that all meet the same machine. One thread
computes. It takes about two minutes.
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
from .agent import Agent, Settings, summary
from .contenders import CONTENDERS, OURS
from .table import table

QUICK = Settings(environments=4, updates=40, width=16, averaged=5, points=10)


def first_difference(losses: list[float], others: list[float]) -> int | None:
    """The update from which on they are not the same to the last bit."""
    return next((i for i, (a, b) in enumerate(zip(losses, others, strict=True)) if a != b), None)


def learned(settings: Settings, seed: int) -> list[Result]:
    """A row per contender."""
    agents = {name: Agent(settings, seed, make) for name, make in CONTENDERS.items()}
    turns = list(agents.values())
    for _ in range(settings.updates):
        for agent in turns:
            agent.update()
        turns = [*turns[1:], turns[0]]
    common = {"seed": seed, "updates": settings.updates}
    return [
        {
            **{"contender": name, **common, **summary(agent)},
            "first_difference": first_difference(agents[OURS].losses, agent.losses),
        }
        for name, agent in agents.items()
    ]


def main(argv: list[str] | None = None) -> int:
    p = arguments.Parser(prog="python -m benchmarks.rl", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="a tiny model, a few updates: to see that it runs")
    p.add_argument("--out", type=Path, help="a results file; its picture is drawn beside it")
    args = p.parse_args(argv)
    if args.seeds < 1:
        raise UsageError(f"--seeds must be at least 1, but is {args.seeds}")
    if args.out is not None:
        check_target(args.out)
    settings = QUICK if args.quick else Settings()
    torch.set_num_threads(1)
    about = {**environment(DEVICES["cpu"]()), "settings": asdict(settings)}
    results = Results(about, args.seeds * len(CONTENDERS), args.out)
    for seed in range(args.seeds):
        results.agents += rounded(learned(settings, seed))
        results.save()
        print(f"seed {seed}:", *(f"{a['contender']}: {a['return']:.0f}" for a in results.agents[-len(CONTENDERS) :]))
    finish(results, table(results.agents))
    if args.out is not None:
        from .picture import draw

        draw(args.out.with_suffix(".png"), results.agents)
    return 0


if __name__ == "__main__":
    arguments.run(main)
