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
State = dict[Any, Any]


@dataclass(frozen=True)
class Around:
    """What a step does around the rule, beside what its groups say."""

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

    def build(self, groups: Groups, state: State, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        """Prepares to step the members, once, for as long as the dormant parameters have no gradient."""

    def refresh(self, groups: Groups, state: State) -> bool:
        """Looks up gradients and hyper-parameters; False if another runner has to be built. Writes nothing."""

    def run(self) -> None:
        """Steps every member that has a gradient; raises before the first write, or not at all."""

    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The same with gradients divided by the scale; changes nothing if found_inf is not 0."""


def make_runner(backend: str, rule: Rule, device: torch.device, around: Around) -> Runner:
    if backend == "cpu":
        return CompiledRunner(rule, around)
    if backend in ("cuda", "triton"):
        return GpuRunner(rule, around, device, backend)
    assert backend == "reference", backend
    return ReferenceRunner(rule, around)


class CompiledRunner:
    """Keeps a table of addresses in C++ and checks it at every step (csrc/python/plan.h)."""

    device = torch.device("cpu")

    def __init__(self, rule: Rule, around: Around, device: tuple[int, int] = (1, 0), launcher: Any = None) -> None:
        assert _native._C is not None
        self.rule, self.around = rule, around  # which the plan has the address of
        settings = (around.norm_stats.data_ptr(), around.skip_nonfinite, around.zero_grad)
        hyper = [(h.key, h.index, h.accepts.low, h.accepts.high, h.off_number) for h in rule.row]
        self.plan = _native._C.Plan(rule.name, hyper, _versions.by_torch, device, launcher, settings)
        self.stream = stream_of(self.device)
        # The two calls of every step, without a Python frame of their own.
        self.refresh: Callable[[Groups, State], bool] = self.plan.refresh
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
        scalars = [
            None if t is None else t.to(self.device, torch.float32, non_blocking=self.device.type != "cpu")
            for t in (grad_scale, found_inf)
        ]
        self.plan.run(self.stream(), *(0 if t is None else t.data_ptr() for t in scalars))

    def build(self, groups: Groups, state: State, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        tensors: list[Tensor] = []
        # What lacks a state has no gradient yet.
        names = [*(slot.name for slot in self.rule.slots), EMA, "step" if self.rule.has_step else None]
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
        self.plan.build(groups, state, bindings, list(dormant), None if _versions.find_counters() else tensors)
        torch.ops.fusedoptim._hand_over(tensors, self.plan.number)


def make_launcher(backend: str, device: torch.device) -> Any:
    """What launches a backend's kernels on a device: see csrc/python/make_executor.h."""
    if backend == "cpu":
        return None
    if backend == "triton":
        from .triton_kernels.launcher import TritonLauncher

        return TritonLauncher(device)
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


class GpuRunner(CompiledRunner):
    """The same with the tables in a GPU's memory (csrc/cuda/executor.h), on torch's current stream."""

    def __init__(self, rule: Rule, around: Around, device: torch.device, backend: str) -> None:
        self.device = device
        launcher = make_launcher(backend, device)
        super().__init__(rule, around, torch.empty(0, device=device).__dlpack_device__(), launcher)
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


class ReferenceRunner:
    """Steps with the functions of fusedoptim.reference, on any device."""

    reason = "the reference looks at everything anew at each step"
    captured = False

    def __init__(self, rule: Rule, around: Around) -> None:
        self.rule, self.around = rule, around
        self.fresh = False

    def retire(self) -> None:
        pass

    def build(self, groups: Groups, state: State, members: Sequence[BoundParam], dormant: Sequence[Tensor]) -> None:
        self.groups = [numbers(group, self.rule) for group in groups]
        self.state, self.members = state, members
        self.fresh = True

    @torch.no_grad()
    def refresh(self, groups: Groups, state: State) -> bool:
        fresh, self.fresh = self.fresh, False
        if fresh:
            for m in self._active():  # a number that overflows should say so before anything is written
                self._update(m, _copy(m.param.new_empty(0), m.param), lambda t: t.new_empty(0))
        return fresh

    def run(self) -> None:
        self.run_scaled(None, None)

    @torch.no_grad()
    def run_scaled(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        skip = found_inf is not None and found_inf.item() != 0
        unscale = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().item()
        norm = None
        if self.around.skip_nonfinite or any(g["max_grad_norm"] is not None for g in self.groups):
            norm = reference.global_norm([self._gradient(m, unscale) for m in self._active()])
            self.around.norm_stats[0] = norm
            if self.around.skip_nonfinite and not norm.isfinite():
                self.around.norm_stats[1] += 1
                skip = True
        for m in [] if skip else self._active():
            gradient = reference.clipped(self._gradient(m, unscale), norm, self.groups[m.group])
            updated, work = self._update(m, gradient, lambda t: t)
            m.param.detach().copy_(updated)
            for name, value in work.items():
                self.state[m.param][name].copy_(value)
            decay = self.groups[m.group]["ema_decay"]
            if decay is not None:
                self.state[m.param][EMA].lerp_(m.param.detach().to(compute_dtype(m.param)), 1 - decay)
        if self.around.zero_grad:
            for m in self._active():
                assert m.param.grad is not None
                m.param.grad.detach().zero_()

    def _active(self) -> list[BoundParam]:
        return [m for m in self.members if m.param.grad is not None]

    def _gradient(self, m: BoundParam, unscale: float) -> Tensor:
        """A copy in the compute dtype, in logical order."""
        assert m.param.grad is not None
        return _copy(m.param.grad, m.param).mul_(unscale)

    def _update(
        self, m: BoundParam, gradient: Tensor, part: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The new values of the parameter and the states, or of a part of them."""
        state, group = self.state.get(m.param, {}), self.groups[m.group]
        work: dict[str, Any] = {
            s.name: _copy(part(state[s.name]), m.param) for s in self.rule.slots if s.needed_in(group)
        }
        if m.first:
            work.update({s.name: None for s in self.rule.slots if s.starts_absent and s.name in work})
        if self.rule.scalar_state:
            work[self.rule.scalar_state] = state[self.rule.scalar_state].clone()
        step = state["step"] + 1 if self.rule.has_step else None
        updated = _copy(part(m.param), m.param)
        self.rule.reference(updated, part(gradient), work, 0.0 if step is None else step.item(), group)
        return updated, work if step is None else {**work, "step": step}


def _copy(t: Tensor, p: Tensor) -> Tensor:
    """In the parameter's compute dtype, contiguous."""
    return t.detach().to(compute_dtype(p), copy=True, memory_format=torch.contiguous_format)
