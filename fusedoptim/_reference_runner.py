"""Steps with the functions of fusedoptim.reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _versions, reference
from ._backends import is_own
from ._doubles import doubles
from ._dtensor import aligned, is_dtensor, local
from ._dtypes import compute_dtype
from ._members import BoundParam
from ._random_places import Place
from ._rule import EMA, SQUARES, Rule
from ._runners import Groups, States, StepSettings
from ._storage import PARAM, Stored
from ._values import numbers
from .rule_functions import Call, calling, sum_of_squares, to_fp32


class ReferenceRunner:
    """Steps with the functions of fusedoptim.reference, on any device."""

    reason = "the reference looks at everything anew at each step"
    captured = False

    def __init__(self, rule: Rule, settings: StepSettings) -> None:
        self.rule, self.settings = rule, settings
        self.own = is_own(rule)
        self.fresh = False
        #: Those of what the rule asks for, by which; empty where they are the whole tensors' own.
        self.sums_of_rule: list[Tensor] = []

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
        self.of_function = self.groups
        if self.own:
            keys = {hyper.key for hyper in self.rule.row}
            self.of_function = [{**group, **{key: doubles(group[key]) for key in keys}} for group in self.groups]
        self.state, self.members = state, members
        self.places = [0, *accumulate(len(group["params"]) for group in groups)]
        self.numbers = torch.zeros(self.places[-1] + 1, dtype=torch.float64, device=self.settings.norm_stats.device)
        self.wide = wide
        self.fresh = True

    @torch.no_grad()
    def refresh(self, groups: Groups, state: States) -> bool:
        fresh, self.fresh = self.fresh, False
        self.sums_of_rule = []
        if fresh and not self.own:
            for m in self._active():  # a number that overflows should say so before anything is written
                empty = _copy(local(m.param).new_empty(0), m.param)
                self._update(m, empty, lambda t: t.new_empty(0), Call(0))
        return fresh

    def release(self) -> None:
        pass

    def run(self) -> None:
        self.run_scaled(None, None)

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.settings.skip_nonfinite or any(g["max_grad_norm"] is not None for g in self.groups):
            self.measure(None, grad_scale)
            self.reduce()
        self.update(grad_scale, found_inf)

    @torch.no_grad()
    def measure(self, of_rule: int | None = None, grad_scale: Tensor | None = None) -> None:
        if of_rule is not None:
            self.numbers = torch.zeros_like(self.numbers)
            self.sums_of_rule[of_rule:] = [self.sums]
        self.sums.zero_()
        for m in self._active():
            g = self._gradient(m, grad_scale)
            if of_rule is None:
                self.sums[self._place(m)] = sum_of_squares(g)
                continue
            call = Call(m.param.shape.numel(), self._known_sums(m)[:of_rule])
            self._update(m, reference.clipped(g, self._norm(), self.groups[m.group]), lambda t: t, call)
            if of_rule < len(call.found):
                self.sums[self._place(m)] = call.found[of_rule]

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
            state, bits = self.state.get(m.param, {}), self._random_bits(m, updated.shape, work)
            store(m, PARAM, m.param, updated, state, bits)
            for name, value in work.items():
                store(m, name, state.get(name), value, state, bits)
            decay = self.groups[m.group]["ema_decay"]
            if decay is not None:
                average = state[EMA]
                _write(average, torch.lerp(local(average), load(m, PARAM, m.param, state), 1 - decay))
        if self.settings.zero_grad:
            for m in self._active():
                assert m.param.grad is not None
                _write(m.param.grad, torch.zeros((), device=m.param.device))

    def _random_bits(self, m: BoundParam, shape: torch.Size, work: dict[str, Any]) -> dict[str, Tensor]:
        """By name, 16 bits for each element of what is rounded stochastically."""
        names = [s.name for s in m.stored if s.is_stochastic]
        if not names:
            return {}
        slots = [s.name for s in self.rule.states]
        second = next((k for k, s in enumerate(self.rule.states) if s.kind == SQUARES), -1)
        stream = reference.random_stream(
            int(self.groups[m.group]["rounding_seed"]), m.place.id, int(work["step"].item())
        )
        index, found = _indices(shape, m.place, local(m.param).device), {}
        for name in names:
            half = 0 if name == PARAM else reference.half_of_slot(slots.index(name), second)
            found[name] = reference.random_word(index, stream, half // 2) >> half % 2 * 16 & 0xFFFF
        return found

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
        return (m, *self._update(m, gradient, lambda t: t, Call(m.param.shape.numel(), self._known_sums(m))))

    def _known_sums(self, m: BoundParam) -> list[float]:
        """Those of whole tensors that were measured for the rule so far."""
        return [sums[self._place(m)].item() for sums in self.sums_of_rule]

    def _update(
        self, m: BoundParam, gradient: Tensor, part: Callable[[Tensor], Tensor], call: Call
    ) -> tuple[Tensor, dict[str, Any]]:
        """The new values of the parameter and the states, or of a part of them. Those that are numbers are tensors in
        the result, too."""
        state, group = self.state.get(m.param, {}), self.groups[m.group]
        work: dict[str, Any] = {
            s.name: part(load(m, s.name, state.get(s.name), state)) for s in self.rule.states if s.needed_in(group)
        }
        slots = {*work}
        if m.first:
            work.update({s.name: None for s in self.rule.states if s.starts_absent and s.name in work})
        numbers = [s.name for s in self.rule.numbers if s.needed_in(group)]
        work.update({name: doubles(state[name].item()) for name in numbers})
        counts = self.rule.has_step or any(s.is_stochastic for s in m.stored)
        step = state["step"] + 1 if counts else None
        updated = part(load(m, PARAM, m.param, state))
        t = 0.0 if step is None else step.item()
        with calling(call):
            self.rule.reference(updated, part(gradient), work, doubles(t) if self.own else t, self.of_function[m.group])
        if self.own:
            _check_results(self.rule, updated, work, slots, numbers, call)
        for name in numbers:
            work[name] = torch.tensor(to_fp32(work[name]), dtype=torch.float32, device=updated.device)
        return updated, work if step is None else {**work, "step": step}


def _check_results(
    rule: Rule, updated: Tensor, work: dict[str, Any], states: set[str], numbers: list[str], call: Call
) -> None:
    """Of a user's function. What has another shape would be spread over its state."""
    found = f"the function of rule {rule.name!r}"
    if len(call.found) > rule.sums:
        raise ValueError(
            f"{found} calls norm() or mean_square() {len(call.found)} times: say so with Rule(sums={len(call.found)}); "
            "nothing was updated"
        )
    for name, value in work.items():
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        if name in numbers:
            if not isinstance(value, (int, float)):
                raise ValueError(f"{found} leaves {name!r} as {shown}: it is a number; nothing was updated")
        elif name not in states:
            raise ValueError(f"{found} makes the state {name!r}: name it in Rule(states=...); nothing was updated")
        elif not isinstance(value, Tensor) or value.shape != updated.shape:
            raise ValueError(
                f"{found} leaves the state {name!r} as {shown}, and its parameter has shape {tuple(updated.shape)}; "
                "nothing was updated"
            )


def _stored(m: BoundParam, name: str) -> Stored | None:
    return next((s for s in m.stored if s.name == name), None)


def load(m: BoundParam, name: str, t: Any, state: dict[str, Any]) -> Tensor:
    """What is stored under this name, in the compute dtype, contiguous."""
    how = _stored(m, name)
    if how is None or how.extra is None:
        return _copy(local(t), m.param)
    elements = t if how.elements is None else state[how.elements]
    return reference.decode(how.storage, local(elements), local(state[how.extra]))


def store(m: BoundParam, name: str, t: Any, value: Tensor, state: dict[str, Any], bits: dict[str, Tensor]) -> None:
    how = _stored(m, name)
    if how is None:
        _write(t, value)
        return
    elements, extra = reference.encode(how.storage, value, bits.get(name))
    _write(t if how.elements is None else state[how.elements], elements)
    if how.extra is not None and extra is not None:
        _write(state[how.extra], extra)


def _indices(shape: torch.Size, place: Place, device: torch.device) -> Tensor:
    """Of the elements, in the whole tensor."""
    found = torch.full((), place.first, dtype=torch.int64, device=device).expand(shape)
    if place.strides is None:
        return found + torch.arange(shape.numel(), device=device).view(shape)
    for d, stride in enumerate(place.strides):
        along = torch.arange(shape[d], device=device) * stride
        found = found + along.view([-1 if k == d else 1 for k in range(len(shape))])
    return found


def _write(t: Tensor, value: Tensor) -> None:
    (local(t) if is_dtensor(t) else t.detach()).copy_(value)
    if is_dtensor(t):  # which has a version counter of its own
        _versions.by_torch([t])


def _copy(t: Tensor, p: Tensor) -> Tensor:
    """In the parameter's compute dtype, contiguous."""
    return t.detach().to(compute_dtype(p), copy=True, memory_format=torch.contiguous_format)
