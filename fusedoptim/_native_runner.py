"""Steps with compiled kernels, from tables in C++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _dtensor, _native, _versions
from ._blocks import row_of
from ._device_memory import DeviceMemory
from ._devices import current_index_of, device_guard, stream_of
from ._members import BoundParam, has_gradient
from ._rule import EMA, STORAGE, Group, Rule
from ._runners import Groups, States, StepSettings
from ._storage import PARAM, Stored

#: In place of the name of a number that a group does without: no state is called so.
NEEDLESS = ""


class NativeRunner:
    """Keeps a table of addresses in C++ and checks it at every step (csrc/python/plan.h).

    Args:
        handle: what is compiled of the rule; by default the package's own of that name.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        rule: Rule,
        settings: StepSettings,
        device: tuple[int, int] = (1, 0),
        launcher: Any = None,
        handle: Any = None,
    ) -> None:
        assert _native._C is not None
        self.rule, self.settings = rule, settings  # which the plan has the address of
        #: Of each group, what stands for the values of ``rule.constants`` in guards (csrc/core/guard.h); empty without.
        self.constants: list[float] = []
        hyper = [
            (h.key, h.index, h.count, h.accepts.low, h.accepts.high, h.accepts.whole, h.off_number) for h in rule.row
        ]
        self.plan = _native._C.Plan(
            handle or _native._C.find_rule(rule.name),
            hyper,
            [state.name for state in rule.states],
            rule.number_names,
            _versions.by_torch,
            device,
            launcher,
            (settings.norm_stats.data_ptr(), settings.skip_nonfinite, settings.zero_grad),
        )
        self.stream = stream_of(self.device)
        # The two calls of every step, without a Python frame of their own.
        self.refresh: Callable[[Groups, States], bool] = self.plan.refresh
        self.run: Callable[[], None] = self.plan.run

    @property
    def reason(self) -> str:
        return str(self.plan.reason)

    @property
    def captured(self) -> bool:
        return bool(self.plan.captured)

    def retire(self) -> None:
        self.plan.retire()

    def release(self) -> None:
        self.plan.release()

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """In the kernel. On a GPU nothing waits on the host."""
        scale, found = self._on_device(grad_scale), self._on_device(found_inf)
        self.plan.run(self.stream(), _address(scale), _address(found))

    def measure(self, of_rule: int | None = None, grad_scale: Tensor | None = None) -> None:
        scale = self._on_device(grad_scale)
        self.plan.measure(of_rule, self.stream(), _address(scale))
        self.numbers = self._rows[of_rule or 0]

    def reduce(self) -> None:
        self.plan.reduce(self.stream())

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        scale, found = self._on_device(grad_scale), self._on_device(found_inf)
        self.plan.update(self.stream(), _address(scale), _address(found))

    def _on_device(self, t: Tensor | None) -> Tensor | None:
        """A number as a kernel reads it, without waiting. To be kept until the kernel is launched."""
        return None if t is None else t.to(self.device, torch.float32, non_blocking=self.device.type != "cpu")

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
        tensors: list[Tensor] = []
        # What lacks a state has no gradient yet.
        of_plain = [self._names((), group) for group in groups]
        starts = [0, *accumulate(len(group["params"]) for group in groups)]
        stored: list[Any] = []
        bindings: list[int] = []  # flat, because the garbage collector looks at every list
        for m in members:
            bindings += (starts[m.group] + m.index, len(tensors))
            tensors.append(m.param)
            for name in self._names(m.stored, groups[m.group]) if m.stored else of_plain[m.group]:
                value = None if name is None else m.states.get(name)
                if value is None:
                    bindings.append(-2 if name == NEEDLESS else -1)
                else:
                    bindings.append(len(tensors))
                    tensors.append(value)
            bindings.append(m.first)
            if m.stored:
                stored.append(self._storages(m, starts[m.group] + m.index, tensors))
        shards = None
        if any(_dtensor.is_dtensor(m.param) for m in members):
            dtensors = [t if _dtensor.is_dtensor(t) else None for t in tensors]
            shards = (_dtensor.dtensor_class(), _dtensor.aligned, dtensors)
            tensors = [_dtensor.local(t) for t in tensors]
        counted = None if _versions.find_counters() else tensors
        size = (max(self.rule.sums, 1), starts[-1] + 1)
        sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        self._rows = sums.unbind()
        self.numbers = self._rows[0]
        watched = [*STORAGE, *self.rule.constants]
        plan, dormant = self.plan, list(dormant)
        plan.build(groups, state, bindings, dormant, counted, sums, wide, shards, stored, watched, self.constants)
        torch.ops.fusedoptim._hand_over(tensors, self.plan.number)

    def _names(self, stored: tuple[Stored, ...], group: Group) -> list[str | None]:
        """The states of a parameter that a plan takes, in its order; None for what it has not."""
        elements = {s.name: s.elements for s in stored if s.elements}
        counts = self.rule.has_step or any(s.is_stochastic for s in stored)
        slots = [elements.get(s.name, s.name) for s in self.rule.states]
        numbers = [s.name if s.needed_in(group) else NEEDLESS for s in self.rule.numbers]
        return [*slots, EMA, "step" if counts else None, *numbers]

    def _storages(self, m: BoundParam, at: int, tensors: list[Tensor]) -> tuple[Any, ...]:
        """As a plan takes them; what is kept beside an operand joins the tensors."""
        assert _native._C is not None
        numbers, operands = _native._C.storages(), []
        names = [PARAM, "", *(s.name for s in self.rule.states)]  # the gradient is second
        for s in m.stored:
            extra = -1
            if s.extra is not None and m.states.get(s.extra) is None:
                extra = -2  # to come, with the first gradient
            elif s.extra is not None:
                extra = len(tensors)
                tensors.append(m.states[s.extra])
            operands.append((names.index(s.name), numbers[s.storage], extra))
        in_blocks = any(s.elements is not None for s in m.stored)
        return (at, operands, row_of(_dtensor.local(m.param)) if in_blocks else 0, *m.place)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class GpuRunner(NativeRunner):
    """The same with the tables in a GPU's memory (csrc/gpu/executor.h), on torch's current stream.

    Args:
        launcher: what launches kernels there (csrc/python/make_executor.h).
    """

    def __init__(
        self, rule: Rule, settings: StepSettings, device: torch.device, launcher: DeviceMemory, handle: Any = None
    ) -> None:
        self.device = device
        super().__init__(rule, settings, torch.empty(0, device=device).__dlpack_device__(), launcher, handle)
        if device.type == "cpu":
            return
        current_device, run, stream = current_index_of(device), self.plan.run, self.stream

        def run_on_device() -> None:
            if current_device() == device.index:
                run(stream())
                return
            with device_guard(device):
                run(stream())

        self.run = run_on_device

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        with device_guard(self.device):
            super().run_scaled(grad_scale, found_inf)

    def build(
        self,
        groups: Groups,
        state: States,
        members: Sequence[BoundParam],
        dormant: Sequence[Tensor],
        wide: bool = False,
    ) -> None:
        super().build(groups, state, members, dormant, wide)
        self._may_be_idle = not any(has_gradient(m.param) for m in members)

    def measure(self, of_rule: int | None = None, grad_scale: Tensor | None = None) -> None:
        if self._may_be_idle:  # where no tensor has its states so far, nothing is launched that would write sums
            self._rows[of_rule or 0].zero_()
        with device_guard(self.device):
            super().measure(of_rule, grad_scale)

    def reduce(self) -> None:
        with device_guard(self.device):
            super().reduce()

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        with device_guard(self.device):
            super().update(grad_scale, found_inf)
