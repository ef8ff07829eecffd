"""Runs the step of one device's parameters on one backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _native, _versions, reference
from ._device_memory import DeviceMemory
from ._dtypes import compute_dtype
from ._members import BoundParam
from ._rule import EMA, Rule
from ._values import numbers

Groups = list[dict[str, Any]]
States = dict[Any, Any]


@dataclass(frozen=True)
class StepSettings:
    """What an optimizer's steps do around the rule, beside what its groups say."""

    #: Two fp64 numbers on the device, which steps write: the norm of all gradients, and how many steps were skipped
    #: because it was not finite.
    norm_stats: Tensor
    skip_nonfinite: bool
    zero_grad: bool


class Runner(Protocol):
    @property
    def reason(self) -> str:
        """Why refresh() returned False."""

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph holds on to its tables, so that it must outlive its use here."""

    def retire(self) -> None:
        """Lets go of everything else. It is not used again."""

    def build(self, groups: Groups, state: States, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        """Prepares to step the members, once, for as long as the dormant parameters have no gradient."""

    def refresh(self, groups: Groups, state: States) -> bool:
        """Looks up gradients and hyper-parameters; False if another runner has to be built. Writes nothing."""

    def run(self) -> None:
        """Steps every member that has a gradient; raises before the first write, or not at all."""

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The same with gradients divided by the scale; changes nothing if found_inf is not 0."""

    # The parts of a step, for whoever has something to do between them, as adding the sums of other processes. run() is
    # all of them, with as few launches as it takes.

    @property
    def sums(self) -> Tensor:
        """An fp64 number per parameter of all groups, on the device. measure() writes them, the others read them."""

    def measure(self, transformed: bool = False, grad_scale: Tensor | None = None) -> None:
        """Writes the sum of squares of every gradient, 0 where there is none: unscaled, or as the rule gets it."""

    def reduce(self) -> None:
        """Makes the norm of all gradients, in the settings' ``norm_stats``, of the sums."""

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Steps every member that has a gradient, with that norm; a rule of norms takes the sums as its own."""


def make_runner(backend: str, rule: Rule, device: torch.device, settings: StepSettings) -> Runner:
    if backend == "cpu":
        return NativeRunner(rule, settings)
    if backend in ("cuda", "triton"):
        return GpuRunner(rule, settings, device, backend)
    assert backend == "reference", backend
    return ReferenceRunner(rule, settings)


class NativeRunner:
    """Keeps a table of addresses in C++ and checks it at every step (csrc/python/plan.h)."""

    device = torch.device("cpu")

    def __init__(
        self, rule: Rule, settings: StepSettings, device: tuple[int, int] = (1, 0), launcher: Any = None
    ) -> None:
        assert _native._C is not None
        self.rule, self.settings = rule, settings  # which the plan has the address of
        hyper = [(h.key, h.index, h.accepts.low, h.accepts.high, h.off_number) for h in rule.row]
        self.plan = _native._C.Plan(
            _native._C.find_rule(rule.name),
            hyper,
            [state.name for state in rule.states],
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

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """In the kernel. On a GPU nothing waits on the host."""
        scale, found = self._on_device(grad_scale), self._on_device(found_inf)
        self.plan.run(self.stream(), _address(scale), _address(found))

    def measure(self, transformed: bool = False, grad_scale: Tensor | None = None) -> None:
        scale = self._on_device(grad_scale)
        self.plan.measure(transformed, self.stream(), _address(scale))

    def reduce(self) -> None:
        self.plan.reduce(self.stream())

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        scale, found = self._on_device(grad_scale), self._on_device(found_inf)
        self.plan.update(self.stream(), _address(scale), _address(found))

    def _on_device(self, t: Tensor | None) -> Tensor | None:
        """A number as a kernel reads it, without waiting. To be kept until the kernel is launched."""
        return None if t is None else t.to(self.device, torch.float32, non_blocking=self.device.type != "cpu")

    def build(self, groups: Groups, state: States, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        tensors: list[Tensor] = []
        # What lacks a state has no gradient yet.
        names = [*(s.name for s in self.rule.states), EMA, "step" if self.rule.has_step else None]
        names.append(self.rule.scalar_state)
        starts = [0, *accumulate(len(group["params"]) for group in groups)]
        bindings: list[int] = []  # flat, because the garbage collector looks at every list
        for m in members:
            bindings += (starts[m.group] + m.index, len(tensors))
            tensors.append(m.param)
            for name in names:
                value = None if name is None else m.states.get(name)
                if value is None:
                    bindings.append(-1)
                else:
                    bindings.append(len(tensors))
                    tensors.append(value)
            bindings.append(m.first)
        counted = None if _versions.find_counters() else tensors
        self.sums = torch.zeros(starts[-1], dtype=torch.float64, device=self.device)
        self.plan.build(groups, state, bindings, list(dormant), counted, self.sums.data_ptr())
        torch.ops.fusedoptim._hand_over(tensors, self.plan.number)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def make_launcher(backend: str, device: torch.device) -> Any:
    """What launches a backend's kernels on a device: see csrc/python/make_executor.h."""
    if backend == "cpu":
        return None
    if backend == "triton":
        from .triton_kernels.device import TritonDevice

        return TritonDevice(device)
    return DeviceMemory(device)


def stream_of(device: torch.device) -> Callable[[], int]:
    """Gives the address of torch's current stream, 0 where kernels are not launched by address."""
    if device.type == "cuda":
        return partial(torch._C._cuda_getCurrentRawStream, device.index)
    return int


def current_index_of(device: torch.device) -> Callable[[], int]:
    """Gives the index of the current device of that type. torch.cuda.current_device also asks whether CUDA was started,
    which tensors on a GPU answer."""
    if device.type == "cuda":
        return torch._C._cuda_getDevice
    current: Callable[[], int] = torch.get_device_module(device).current_device
    return current


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":  # also kernels that run on the host, for tests
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return guard


class GpuRunner(NativeRunner):
    """The same with the tables in a GPU's memory (csrc/gpu/executor.h), on torch's current stream."""

    def __init__(self, rule: Rule, settings: StepSettings, device: torch.device, backend: str) -> None:
        self.device = device
        launcher = make_launcher(backend, device)
        super().__init__(rule, settings, torch.empty(0, device=device).__dlpack_device__(), launcher)
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

    def measure(self, transformed: bool = False, grad_scale: Tensor | None = None) -> None:
        with device_guard(self.device):
            super().measure(transformed, grad_scale)

    def reduce(self) -> None:
        with device_guard(self.device):
            super().reduce()

    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        with device_guard(self.device):
            super().update(grad_scale, found_inf)


class ReferenceRunner:
    """Steps with the functions of fusedoptim.reference, on any device."""

    reason = "the reference looks at everything anew at each step"
    captured = False

    def __init__(self, rule: Rule, settings: StepSettings) -> None:
        self.rule, self.settings = rule, settings
        self.fresh = False

    def retire(self) -> None:
        pass

    def build(self, groups: Groups, state: States, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        self.groups = [numbers(group, self.rule) for group in groups]
        self.state, self.members = state, members
        self.places = [0, *accumulate(len(group["params"]) for group in groups)]
        self.sums = torch.zeros(self.places[-1], dtype=torch.float64, device=self.settings.norm_stats.device)
        self.fresh = True

    @torch.no_grad()
    def refresh(self, groups: Groups, state: States) -> bool:
        fresh, self.fresh = self.fresh, False
        if fresh:
            for m in self._active():  # a number that overflows should say so before anything is written
                self._update(m, _copy(m.param.new_empty(0), m.param), lambda t: t.new_empty(0))
        return fresh

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
        for m in self._active():
            g = self._gradient(m, grad_scale)
            if transformed:
                g = reference.clipped(g, self._norm(), self.groups[m.group])
            self.sums[self._place(m)] = reference.sum_of_squares(g)

    @torch.no_grad()
    def reduce(self) -> None:
        norm = reference.norm_of([self.sums[self._place(m)] for m in self._active()], self._wide())
        self.settings.norm_stats[0] = norm
        if self.settings.skip_nonfinite and not norm.isfinite():
            self.settings.norm_stats[1] += 1

    @torch.no_grad()
    def update(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """A rule of norms works them out itself, from whole gradients, and not from the sums."""
        norm = self._norm()
        skip = found_inf is not None and found_inf.item() != 0
        skip = skip or (self.settings.skip_nonfinite and not norm.isfinite())
        for m in [] if skip else self._active():
            gradient = reference.clipped(self._gradient(m, grad_scale), norm, self.groups[m.group])
            updated, work = self._update(m, gradient, lambda t: t)
            m.param.detach().copy_(updated)
            for name, value in work.items():
                self.state[m.param][name].copy_(value)
            decay = self.groups[m.group]["ema_decay"]
            if decay is not None:
                self.state[m.param][EMA].lerp_(m.param.detach().to(compute_dtype(m.param)), 1 - decay)
        if self.settings.zero_grad:
            for m in self._active():
                assert m.param.grad is not None
                m.param.grad.detach().zero_()

    def _active(self) -> list[BoundParam]:
        return [m for m in self.members if m.param.grad is not None]

    def _place(self, m: BoundParam) -> int:
        """In the sums."""
        return self.places[m.group] + m.index

    def _wide(self) -> bool:
        return any(compute_dtype(m.param) == torch.float64 for m in self._active())

    def _norm(self) -> Tensor:
        """Of all gradients, as reduce() left it."""
        return self.settings.norm_stats[0].to(torch.float64 if self._wide() else torch.float32)

    def _gradient(self, m: BoundParam, grad_scale: Tensor | None) -> Tensor:
        """A copy in the compute dtype, in logical order."""
        assert m.param.grad is not None
        unscale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().item()
        return _copy(m.param.grad, m.param).mul_(unscale)

    def _update(
        self, m: BoundParam, gradient: Tensor, part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The new values of the parameter and the states, or of a part of them."""
        state, group = self.state.get(m.param, {}), self.groups[m.group]
        work: dict[str, Any] = {
            s.name: _copy(part(state[s.name]), m.param) for s in self.rule.states if s.needed_in(group)
        }
        if m.first:
            work.update({s.name: None for s in self.rule.states if s.starts_absent and s.name in work})
        if self.rule.scalar_state:
            work[self.rule.scalar_state] = state[self.rule.scalar_state].clone()
        step = state["step"] + 1 if self.rule.has_step else None
        updated = _copy(part(m.param), m.param)
        self.rule.reference(updated, part(gradient), work, 0.0 if step is None else step.item(), group)
        return updated, work if step is None else {**work, "step": step}


def _copy(t: Tensor, p: Tensor) -> Tensor:
    """In the parameter's compute dtype, contiguous."""
    return t.detach().to(compute_dtype(p), copy=True, memory_format=torch.contiguous_format)
