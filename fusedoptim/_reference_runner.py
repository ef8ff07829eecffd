"""Steps with the functions of fusedoptim.reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _versions, reference
from ._backends import is_own
from ._dtensor import aligned, is_dtensor, local
from ._dtypes import compute_dtype
from ._members import BoundParam
from ._rule import EMA, Rule
from ._runners import Groups, States, StepSettings
from ._values import numbers


class ReferenceRunner:
    """Steps with the functions of fusedoptim.reference, on any device."""

    reason = "the reference looks at everything anew at each step"
    captured = False

    def __init__(self, rule: Rule, settings: StepSettings) -> None:
        self.rule, self.settings = rule, settings
        self.own = is_own(rule)
        self.fresh = False
        #: Whether the sums are those of what the rule gets.
        self.sums_given = False

    def retire(self) -> None:
        pass

    @property
    def sums(self) -> Tensor:
        return self.numbers[:-1]

    def build(
        self,
        groups: Groups,
        state: States,
        members: Sequence[BoundParam],
        dormant: Sequence[Tensor],
        wide: bool = False,
    ) -> None:
        self.groups = [numbers(group, self.rule) for group in groups]
        self.state, self.members = state, members
        self.places = [0, *accumulate(len(group["params"]) for group in groups)]
        self.numbers = torch.zeros(self.places[-1] + 1, dtype=torch.float64, device=self.settings.norm_stats.device)
        self.wide = wide
        self.fresh = True

    @torch.no_grad()
    def refresh(self, groups: Groups, state: States) -> bool:
        fresh, self.fresh = self.fresh, False
        self.sums_given = False
        if fresh and not self.own:
            for m in self._active():  # a number that overflows should say so before anything is written
                self._update(m, _copy(local(m.param).new_empty(0), m.param), lambda t: t.new_empty(0))
        return fresh

    def release(self) -> None:
        pass

    def run(self) -> None:
        self.run_scaled(None, None)

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.settings.skip_nonfinite or any(g["max_grad_norm"] is not None for g in self.groups):
            self.measure(False, grad_scale)
            self.reduce()
        self.update(grad_scale, found_inf)

    @torch.no_grad()
    def measure(self, transformed: bool = False, grad_scale: Tensor | None = None) -> None:
        self.sums.zero_()
        self.sums_given = transformed
        for m in self._active():
            g = self._gradient(m, grad_scale)
            if transformed:
                g = reference.clipped(g, self._norm(), self.groups[m.group])
            self.sums[self._place(m)] = reference.sum_of_squares(g)

    @torch.no_grad()
    def reduce(self) -> None:
        norm = reference.norm_of(list(self.sums), self._wide())
        self.settings.norm_stats[0] = norm
        if self.settings.skip_nonfinite and not norm.isfinite():
            self.settings.norm_stats[1] += 1

    @torch.no_grad()
    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        norm = self._norm()
        skip = found_inf is not None and found_inf.item() != 0
        skip = skip or (self.settings.skip_nonfinite and not norm.isfinite())
        results = (self._result(m, norm, grad_scale) for m in ([] if skip else self._active()))
        # A user's function may raise. All results come before the first write then: it takes a copy of everything.
        for m, updated, work in list(results) if self.own else results:
            _write(m.param, updated)
            for name, value in work.items():
                _write(self.state[m.param][name], value)
            decay = self.groups[m.group]["ema_decay"]
            if decay is not None:
                average = self.state[m.param][EMA]
                _write(average, torch.lerp(local(average), local(m.param).to(compute_dtype(m.param)), 1 - decay))
        if self.settings.zero_grad:
            for m in self._active():
                assert m.param.grad is not None
                _write(m.param.grad, torch.zeros((), device=m.param.device))

    def _active(self) -> list[BoundParam]:
        return [m for m in self.members if m.param.grad is not None]

    def _place(self, m: BoundParam) -> int:
        """In the sums."""
        return self.places[m.group] + m.index

    def _wide(self) -> bool:
        return self.wide or any(compute_dtype(m.param) == torch.float64 for m in self._active())

    def _norm(self) -> Tensor:
        """Of all gradients, as reduce() left it."""
        return self.settings.norm_stats[0].to(torch.float64 if self._wide() else torch.float32)

    def _gradient(self, m: BoundParam, grad_scale: Tensor | None) -> Tensor:
        """A copy in the compute dtype, in logical order."""
        assert m.param.grad is not None
        unscale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().item()
        if is_dtensor(m.param):
            m.param.grad = aligned(m.param, m.param.grad)
        return _copy(local(m.param.grad), m.param).mul_(unscale)

    def _result(
        self, m: BoundParam, norm: Tensor, grad_scale: Tensor | None
    ) -> tuple[BoundParam, Tensor, dict[str, Any]]:
        gradient = reference.clipped(self._gradient(m, grad_scale), norm, self.groups[m.group])
        return (m, *self._update(m, gradient, lambda t: t))

    def _update(
        self, m: BoundParam, gradient: Tensor, part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The new values of the parameter and the states, or of a part of them."""
        state, group = self.state.get(m.param, {}), self.groups[m.group]
        work: dict[str, Any] = {
            s.name: _copy(part(local(state[s.name])), m.param) for s in self.rule.states if s.needed_in(group)
        }
        if m.first:
            work.update({s.name: None for s in self.rule.states if s.starts_absent and s.name in work})
        if self.rule.scalar_state:
            work[self.rule.scalar_state] = state[self.rule.scalar_state].clone()
        step = state["step"] + 1 if self.rule.has_step else None
        if self.sums_given:
            group = {**group, reference.SUM_OF_SQUARES: self.sums[self._place(m)]}
        updated = _copy(part(local(m.param)), m.param)
        self.rule.reference(updated, part(gradient), work, 0.0 if step is None else step.item(), group)
        return updated, work if step is None else {**work, "step": step}


def _write(t: Tensor, value: Tensor) -> None:
    (local(t) if is_dtensor(t) else t.detach()).copy_(value)
    if is_dtensor(t):  # which has a version counter of its own
        _versions.by_torch([t])


def _copy(t: Tensor, p: Tensor) -> Tensor:
    """In the parameter's compute dtype, contiguous."""
    return t.detach().to(compute_dtype(p), copy=True, memory_format=torch.contiguous_format)
