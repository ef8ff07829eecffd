"""Training beside torch.optim, for ``--compare``."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

import fusedoptim

from .. import witness
from ..text import Text
from . import choices, sharding
from .gpt import GPT, GPTConfig
from .learner import Learner, limit_of


class Comparison:
    """The same training with torch.optim's witness. Beside it, fusedoptim and the fastest that torch has are
    timed, each on a copy of the parameters: the model's own lie in the cache after a backward pass."""

    def __init__(self, config: GPTConfig, args: argparse.Namespace, beside: Learner) -> None:
        name, lr = args.optimizer, args.lr
        self.learner = Learner(GPT(config, args.seed), lambda params: choices.make_witness(name, params, lr), args)
        self.params = params = sharding.stepped(beside.optimizer)
        ours, theirs = ([torch.nn.Parameter(p.detach().clone()) for p in params] for _ in range(2))
        name, fastest = choices.make_fastest(args.optimizer, theirs, args.lr)
        self.timed = [("fusedoptim", choices.make(args.optimizer, ours, args.lr), ours), (name, fastest, theirs)]
        self.seconds: dict[str, list[float]] = {"fusedoptim": [], name: []}
        self.first_difference: int | None = None

    def step(self, text: Text, step: int, loss: float) -> None:
        self.check(step, loss, self.learner.gradients(text, step))
        args, optimizer = self.learner.args, self.learner.optimizer
        norm: Any = sharding.norm_options(args.shard)
        fusedoptim.clip_grad_norm_(sharding.stepped(optimizer), limit_of(args), **norm)
        witness.witness_step(optimizer)
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
