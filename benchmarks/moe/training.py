"""The mixture's training, by one contender."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusedoptim
from fusedoptim._dtensor import local

from ..text import Text
from ..train import parallel, sharding
from .contenders import OPTIONS, Make
from .mixture import Mixture, MixtureConfig


@dataclass(frozen=True)
class Settings:
    layers: int = 6
    width: int = 32
    heads: int = 4
    experts: int = 275
    hidden: int = 16
    context: int = 32
    batch: int = 4
    steps: int = 120
    #: That a contender takes which does not take all, at the start and at the end.
    few: int = 2
    warmup: int = 10
    seed: int = 0

    @property
    def config(self) -> MixtureConfig:
        return MixtureConfig(
            self.layers, self.width, self.heads, self.context, experts=self.experts, hidden=self.hidden
        )


@dataclass(frozen=True)
class Taken:
    """A step, as this process saw it."""

    step: int
    #: The mean over the processes.
    loss: float
    #: Of clipping and the optimizer's step, and in all.
    optimizer_s: float
    iteration_s: float
    #: Tensors without a gradient, and those that got their first one.
    without: int
    new: int


@dataclass
class Training:
    """A model in shards, and an optimizer of its own."""

    settings: Settings
    make: Make
    taken: list[Taken] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = Mixture(self.settings.config, self.settings.seed)
        self.model = sharding.shard(model, model.blocks, "fsdp2")
        self.params = list(self.model.parameters())
        self.optimizer, self._step = self.make(self.params)
        total = max(self.settings.steps, self.settings.warmup + 1)
        self._schedule = fusedoptim.warmup_cosine(self.optimizer, self.settings.warmup, total, OPTIONS["lr"] / 10)
        self._had_gradient: set[int] = set()

    def step(self, text: Text, step: int) -> None:
        settings, begin = self.settings, time.perf_counter()
        self.optimizer.zero_grad()
        x, y = text.batch(settings.seed, step, settings.batch, settings.context)
        loss, cross_entropy = self.model(parallel.part(x), parallel.part(y))
        loss.backward()
        dist.barrier()  # what is waited for the other process is no optimizer's time
        middle = time.perf_counter()
        self._step()
        end = time.perf_counter()
        self._schedule.step()
        have = {i for i, p in enumerate(self.params) if p.grad is not None}
        without, new = len(self.params) - len(have), len(have - self._had_gradient)
        self._had_gradient |= have
        mean = parallel.mean(cross_entropy.item())
        self.taken.append(Taken(step, mean, end - middle, end - begin, without, new))

    @torch.no_grad()
    def adopt(self, other: Training) -> None:
        """Goes on from where another one stands."""
        for p, q in zip(self.params, other.params, strict=True):
            local(p).copy_(local(q))
            self.optimizer.state[p] = {name: x.clone() for name, x in other.optimizer.state.get(q, {}).items()}
        self._schedule.load_state_dict(other._schedule.state_dict())
        for group, theirs in zip(self.optimizer.param_groups, other.optimizer.param_groups, strict=True):
            group["lr"] = theirs["lr"]
        self._had_gradient |= other._had_gradient

    @torch.no_grad()
    def validate(self, text: Text, count: int = 8) -> float:
        batches = text.validation_batches(self.settings.batch, self.settings.context, count)
        found = [self.model(parallel.part(x), parallel.part(y))[1].item() for x, y in batches]
        return parallel.mean(statistics.fmean(found))

    def with_gradients(self) -> int:
        """How many tensors have had a gradient."""
        return len(self._had_gradient)

    def with_states(self) -> int:
        return sum(bool(self.optimizer.state.get(p)) for p in self.params)

    def state_bytes(self) -> int:
        """In this process."""
        values = [x for of in self.optimizer.state.values() for x in of.values()]
        return sum(local(x).nbytes for x in values if isinstance(x, Tensor))

    def numbers(self) -> list[Tensor]:
        """Of this process: its shards of the parameters, then of their states."""
        states = [x for p in self.params for _, x in sorted(self.optimizer.state.get(p, {}).items())]
        return [local(x) for x in (*self.params, *states)]


def same_numbers(a: Training, b: Training) -> bool:
    """Whether parameters and states have the same bits, in all processes."""
    ours, theirs = a.numbers(), b.numbers()
    same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return parallel.mean(float(same)) == 1.0


def _median_ms(seconds: list[float]) -> float | None:
    return statistics.median(seconds) * 1e3 if seconds else None


def summary(training: Training, beside: Training, text: Text) -> dict[str, Any]:
    """What a results file keeps, and how it differs from another one's training at the steps that it took. Bytes are
    those of the states of this process. All processes take part."""
    taken, losses = training.taken, {t.step: t.loss for t in beside.taken}
    first, later = ([t for t in taken if bool(t.new) == new] for new in (True, False))
    sizes = [p.numel() for p in training.params]
    return {
        "tensors": len(sizes),
        "elements": sum(sizes),
        "steps": len(taken),
        "validation": training.validate(text),
        #: Of steps in which tensors got their first gradient, and of all others.
        "first_ms": _median_ms([t.optimizer_s for t in first]),
        "first_steps": len(first),
        "later_ms": _median_ms([t.optimizer_s for t in later]),
        "later_iteration_ms": _median_ms([t.iteration_s for t in later]),
        "share": sum(t.optimizer_s for t in taken) / sum(t.iteration_s for t in taken),
        "without_gradient": statistics.fmean(t.without for t in taken),
        "with_gradients": training.with_gradients(),
        "with_states": training.with_states(),
        "state_bytes": training.state_bytes(),
        "first_difference": next((t.step for t in taken if t.loss != losses[t.step]), None),
        "difference": max(abs(t.loss - losses[t.step]) / losses[t.step] for t in taken),
        "same_numbers": same_numbers(training, beside),
        "losses": [[t.step, t.loss] for t in taken],
        "ms": [[t.step, t.optimizer_s * 1e3] for t in taken],
    }
