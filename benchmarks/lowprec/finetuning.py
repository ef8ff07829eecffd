"""One checkpoint, and fine-tuning from it under a scheme."""

from __future__ import annotations

import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fusedoptim

from ..common.arguments import UsageError
from ..text import Text, load_text
from ..train.gpt import GPT, GPTConfig
from .schemes import Scheme, bytes_of, number, rounded

#: In a burst, of every so many gradients one is so many times as large, in one step.
BURST_EVERY, BURST = 2048, 1e4


@dataclass(frozen=True)
class Settings:
    layers: int = 2
    width: int = 128
    batch: int = 4
    context: int = 64
    pretraining: int = 1_500
    steps: int = 200
    lr: float = 1e-4

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.layers, self.width, 4, self.context)


QUICK = Settings(layers=1, width=64, batch=2, context=16, pretraining=5, steps=6)


@dataclass(frozen=True)
class Outcome:
    #: That the parameters stand for, as one fp32 vector.
    numbers: Tensor
    #: Of validation, before and after, with the weights that the model sees.
    loss_before: float
    loss: float
    bytes_per_parameter: float
    #: The least time of a step.
    seconds: float


def texts(context: int) -> tuple[Text, Text]:
    """To train on first: Python's sources; then: the prose of Python's own manual."""
    manual = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    if not manual.exists():
        raise UsageError(f"{manual}, on which the model is fine-tuned, is missing: install all of Python")
    return load_text(None, context), load_text(manual, context)


def pretrained(settings: Settings, text: Text) -> dict[str, Tensor]:
    """The checkpoint, rounded to bf16, so that all schemes start at the same numbers."""
    model = GPT(settings.config, seed=0)
    optimizer = fusedoptim.AdamW(model.named_parameters(), lr=2e-3, weight_decay=0.1, max_grad_norm=1.0)
    schedule = fusedoptim.warmup_cosine(optimizer, 20, max(settings.pretraining, 21), 2e-4)
    for step in range(settings.pretraining):
        _gradients(model, text, settings, 0, step)
        optimizer.step()
        schedule.step()
    return {name: rounded(p).float() for name, p in model.named_parameters()}


def _gradients(model: GPT, text: Text, settings: Settings, seed: int, step: int) -> None:
    model.zero_grad()
    model(*text.batch(seed, step, settings.batch, settings.context)).backward()


def finetuned(
    start: dict[str, Tensor], scheme: Scheme, text: Text, settings: Settings, seed: int, burst: bool
) -> Outcome:
    """The model computes in fp32 whatever the scheme: weights and gradients are rounded on the way from and to the
    optimizer, and nothing else is."""
    model = GPT(settings.config, seed=0)
    named = [(name, nn.Parameter(x.to(scheme.dtype, copy=True))) for name, x in start.items()]
    params = [p for _, p in named]
    optimizer = scheme.make(named, settings.lr, seed)
    loss_before, seconds = _validate(model, scheme, params, text, settings), []
    for step in range(settings.steps):
        _show(model, scheme, params)
        _gradients(model, text, settings, seed + 1, step)
        for w, p in zip(model.parameters(), params, strict=True):
            assert w.grad is not None
            if burst and step == settings.steps // 3:
                w.grad.view(-1)[BURST_EVERY // 2 :: BURST_EVERY] *= BURST
            p.grad = (w.grad.bfloat16() if scheme.half else w.grad).to(p.dtype)
        begin = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    loss = _validate(model, scheme, params, text, settings)
    numbers = torch.cat([number(p, optimizer.state[p]).flatten() for p in params])
    return Outcome(numbers, loss_before, loss, bytes_of(optimizer) / len(numbers), min(seconds))


@torch.no_grad()
def _show(model: GPT, scheme: Scheme, params: list[nn.Parameter]) -> None:
    """Gives the model the weights."""
    for w, p in zip(model.parameters(), params, strict=True):
        w.copy_(scheme.seen(p))


@torch.no_grad()
def _validate(model: GPT, scheme: Scheme, params: list[nn.Parameter], text: Text, settings: Settings) -> float:
    _show(model, scheme, params)
    batches = text.validation_batches(16, settings.context, 8)
    return statistics.fmean(model(x, y).item() for x, y in batches)


def distance(x: Tensor, exact: Tensor, start: Tensor) -> float:
    """From the exact run, as a part of the way that it went."""
    return float((x.double() - exact.double()).norm() / (exact.double() - start.double()).norm())
