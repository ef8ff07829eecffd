"""What is trained: a model, its optimizer and its schedule."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fusedoptim

from ..common.arguments import UsageError
from ..text import Text
from . import parallel, sharding, whole
from .gpt import GPT


def limit_of(args: argparse.Namespace) -> float:
    """Of the gradients' norm; without one it is measured all the same."""
    return args.max_grad_norm if args.max_grad_norm > 0 else math.inf


class Learner:
    """A model, its optimizer and its schedule."""

    def __init__(self, model: GPT, make: sharding.MakeOptimizer, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        forward = sharding.shard(model, model.blocks, args.shard)
        optimizer = sharding.optimizer(model.parameters(), make, args.shard, args.lr)
        self.optimizer: Any = optimizer  # of either package
        self.forward: Callable[..., Tensor] = torch.compile(forward) if args.compile else forward
        self.step: Callable[[], Any] = torch.compile(optimizer.step) if args.compile else optimizer.step
        # A run that ends within the warm-up never comes to the cosine, which must begin later.
        total = max(args.steps, args.warmup + 1)
        self.schedule = fusedoptim.warmup_cosine(optimizer, args.warmup, total, args.lr / 10)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.args.amp == "bf16"):
            return self.forward(x, y)

    def gradients(self, text: Text, step: int) -> float:
        """The loss."""
        args, total = self.args, 0.0
        self.optimizer.zero_grad()
        for micro in range(args.accumulate):
            x, y = text.batch(args.seed, step * args.accumulate + micro, args.batch, args.context)
            loss = self.loss(parallel.part(x), parallel.part(y)) / args.accumulate
            loss.backward()
            total += loss.item()
        return parallel.mean(total)

    def states(self) -> dict[str, Any]:
        """What a checkpoint keeps, by part. All processes take part."""
        return {**whole.states(self.model, self.optimizer), "schedule": self.schedule.state_dict()}

    def load(self, states: dict[str, Any]) -> None:
        whole.load(states, self.model, self.optimizer)
        self.schedule.load_state_dict(states["schedule"])

    @torch.no_grad()
    def validate(self, text: Text) -> float:
        batches = text.validation_batches(self.args.batch, self.args.context, 8)
        return statistics.fmean(self.loss(x, y).item() for x, y in batches)


def check_compiler() -> None:
    """Compiles something small, because torch says only then what it lacks: a C++ compiler, Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8))
    except Exception as error:  # what goes wrong inside of a compiler can be anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UsageError(
            f"--compile: torch.compile does not work here ({lines[0]}): it needs a C++ compiler that works, which the "
            "environment variable CXX can name, and Python's headers. Mend that, or leave out --compile"
        ) from error
