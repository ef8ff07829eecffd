"""Steps whose norms are those of tensors on several devices, or of tensors of which other processes have parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ._devices import device_guard
from ._exchange import Exchange, RefusedElsewhere
from ._norms import norm_is_measured
from ._rule import Rule
from ._runners import Groups, Runner, States
from .reference import norm_of


class HasSums(Protocol):
    @property
    def numbers(self) -> Tensor:
        """See Runner."""


def combine(parts: Sequence[HasSums], exchange: Exchange | None, of_tensors: bool) -> Tensor:
    """Adds up what was measured on several devices and ranks, and gives all of them the result.

    Returns:
        How many ranks refuse: an fp64 number where the exchange took place.
    """
    if exchange is not None:
        home = next((part.numbers for part in parts if part.numbers.device == exchange.home), None)
        if home is None:
            home = torch.zeros(exchange.size + 1, dtype=torch.float64, device=exchange.home)
    else:
        home = next((part.numbers for part in parts if part.numbers.device.type != "cpu"), parts[0].numbers)
    others = [part.numbers for part in parts if part.numbers is not home]
    for other in others:
        home += other.to(home.device)
    if exchange is not None:
        exchange.add(home, of_tensors)
    for other in others:
        other[:-1].copy_(home[:-1])
    return home[-1]


class JointRunner:
    """Runs the parts of a step on every device, and adds up what they measure in between."""

    def __init__(self, runners: Sequence[Runner], exchange: Exchange | None, rule: Rule, options: Mapping[str, Any]):
        self.runners, self.exchange, self.rule, self.options = runners, exchange, rule, options
        self.notice = Notice()
        #: Whether each tensor's own norm is a sum over ranks.
        self.adds_by_tensor = rule.sums > 0 and exchange is not None and bool(exchange.rounds)
        #: Whether the last step came so far, on any device, before it raised.
        self.has_written = False

    @property
    def reason(self) -> str:
        return ", ".join(filter(None, (runner.reason for runner in self.runners)))

    @property
    def captured(self) -> bool:
        return any(runner.captured for runner in self.runners)

    def retire(self) -> None:
        for runner in self.runners:
            runner.retire()

    def refresh(self, groups: Groups, state: States) -> bool:
        if self.notice.sent:
            self.notice.look()
        self.measures = norm_is_measured(self.options, groups)
        return False not in [runner.refresh(groups, state) for runner in self.runners]

    def run(self) -> None:
        if self.measures or self.adds_by_tensor:
            self.run_scaled(None, None)
            return
        self.has_written = False
        for runner in self.runners:
            runner.run()
            self.has_written = True

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None, norm: Tensor | None = None) -> None:
        """norm: of all gradients, where somebody else has measured it."""
        self.has_written = False
        alone = self.exchange is None and len(self.runners) == 1
        if norm is None and (alone or not (self.measures or self.adds_by_tensor)):
            for runner in self.runners:
                runner.run_scaled(grad_scale, found_inf)
                self.has_written = True
            return
        if norm is not None:
            for runner in self.runners:
                take_norm(runner.settings.norm_stats, norm, self.options)
        elif self.measures:
            found_inf = self._measure(None, grad_scale, found_inf)
            for runner in self.runners:
                runner.reduce()
                if self.exchange is not None and self.exchange.size == 0 and self.exchange.sum is not None:
                    take_norm(runner.settings.norm_stats, norm_of([self.exchange.sum], False), self.options)
        for k in range(self.rule.sums):
            found_inf = self._measure(k, grad_scale, found_inf)
        for runner in self.runners:
            runner.update(grad_scale, found_inf)
            self.has_written = True

    def _measure(self, of_rule: int | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor | None:
        """Returns what says that nothing is to be updated: on a GPU, where nobody waits for it, also that another rank
        refuses.

        Raises:
            RefusedElsewhere: if one does, where that is known by now.
        """
        for runner in self.runners:
            runner.measure(of_rule, grad_scale)
        refusals = combine(self.runners, self.exchange, of_rule is not None)
        if self.exchange is None:
            return found_inf
        if refusals.device.type == "cpu":
            if refusals.item() != 0:
                refusals.zero_()
                for runner in self.runners:
                    runner.release()
                raise RefusedElsewhere
            return found_inf
        self.notice.send(refusals)
        refused = refusals.float() if found_inf is None else refusals.float() + found_inf.to(refusals.device)
        refusals.zero_()  # measure() leaves it
        return refused


def take_norm(stats: Tensor, norm: Tensor, options: Mapping[str, Any]) -> None:
    """As reduce() writes it."""
    stats[0].copy_(norm, non_blocking=True)
    if options["skip_nonfinite"]:
        stats[1] += ~stats[0].isfinite()


class Notice:
    """That another rank refused a step, for the host to find at a later one: it waits for no device."""

    def __init__(self) -> None:
        self.sent: deque[tuple[Tensor, Any]] = deque()  # the host may be several steps ahead

    def send(self, refusals: Tensor) -> None:
        if _is_capturing(refusals.device):  # a graph's replays have nobody to tell
            return
        with device_guard(refusals.device):
            number = torch.empty((), dtype=refusals.dtype, pin_memory=True)
            number.copy_(refusals, non_blocking=True)
            event = torch.get_device_module(refusals.device).Event()
            event.record()
        self.sent.append((number, event))
        self.device = refusals.device

    def arrives(self) -> bool:
        """Whether any rank refused a step that no look() has seen. Waits for the device."""
        return any(number.item() != 0 for number, event in self.sent if not event.synchronize())

    def look(self) -> None:
        """Raises RefusedElsewhere if it has arrived."""
        if not self.sent or _is_capturing(self.device):  # where events may not be asked
            return
        while self.sent and self.sent[0][1].query():
            if self.sent.popleft()[0].item() != 0:
                raise RefusedElsewhere


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is, on the device's current stream."""
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    if capturing is None:
        return False
    with device_guard(device):
        return bool(capturing())
