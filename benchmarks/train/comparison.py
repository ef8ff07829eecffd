"""Training beside torch.optim, for ``--compare``."""

from __future__ import annotations

import argparse
import time

import torch

import fusedoptim

from .. import witness
from ..text import Text
from . import choices
from .gpt import GPT, GPTConfig
from .learner import Learner, limit_of


class Comparison:
    """The same training with torch.optim's witness. Beside it, fusedoptim and the fastest that torch has are
    timed, each on a copy of the parameters: the model's own lie in the cache after a backward pass."""

    def __init__(self, config: GPTConfig, args: argparse.Namespace, params: list[torch.nn.Parameter]) -> None:
        model = GPT(config, args.seed)
        self.learner = Learner(model, choices.make_witness(args.optimizer, model.parameters(), args.lr), args)
        self.params = params
        ours, theirs = ([torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
        name, fastest = choices.make_fastest(args.optimizer, theirs, args.lr)
        self.timed = [("fusedoptim", choices.make(args.optimizer, ours, args.lr), ours), (name, fastest, theirs)]
        self.seconds: dict[str, list[float]] = {"fusedoptim": [], name: []}
        self.first_difference: int | None = None

    def step(self, text: Text, step: int, loss: float) -> None:
        self.check(step, loss, self.learner.gradients(text, step))
        fusedoptim.clip_grad_norm_(self.learner.model.parameters(), limit_of(self.learner.args))
        witness.witness_step(self.learner.optimizer)
        self.learner.schedule.step()

    def check(self, step: int, loss: float, other: float) -> None:
        if other != loss and self.first_difference is None:
            self.first_difference = step

    def time_steps(self, step: int) -> None:
        for i in (0, 1) if step % 2 else (1, 0):  # whoever comes second finds warm gradients
            name, optimizer, copies = self.timed[i]
            for p, q in zip(self.params, copies, strict=True):
                q.grad = p.grad
            start = time.perf_counter()
            optimizer.step()
            self.seconds[name].append(time.perf_counter() - start)
