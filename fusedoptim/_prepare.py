"""The step that finds nothing ready: it validates, makes states and runners, and steps, or leaves all as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backends, _members
from ._check_tensors import can_have_states
from ._distributed import sharded_by_fsdp1
from ._fakes import alike
from ._native_runner import GpuRunner, NativeRunner
from ._norms import HasNorms, check_one_device, check_whole_tensors, norm_is_measured
from ._reference_runner import ReferenceRunner
from ._rule import Rule
from ._runners import Runner, StepSettings
from ._states import Changes, HasStates, StateMaker, move_steps


class Scaling(NamedTuple):
    """What a GradScaler leaves to a step: tensors of one number, or None."""

    #: None if the gradients are unscaled already.
    grad_scale: Tensor | None
    found_inf: Tensor | None


def scaling_of(optimizer: object) -> Scaling | None:
    """GradScaler sets both attributes, for the duration of a step."""
    if not hasattr(optimizer, "found_inf"):
        return None
    return Scaling(getattr(optimizer, "grad_scale", None), optimizer.found_inf)


def step_afresh(optimizer: HasNorms) -> list[Runner] | None:
    """Validates everything, makes missing states and runners, and steps; or raises, having changed nothing.

    Returns:
        The runners, for the next steps; None if this one was skipped.
    """
    scaling = scaling_of(optimizer)
    changes = Changes(optimizer.state)
    ran = 0
    try:
        with without_garbage_collection():
            runners = prepare(optimizer, changes)
        for runner in runners:  # one that raises has written nothing
            if scaling is None:
                runner.run()
            else:
                runner.run_scaled(scaling.grad_scale, scaling.found_inf)
            ran += 1
    except BaseException:
        if ran == 0:
            changes.undo()
        raise
    if _was_skipped(optimizer, scaling):
        changes.undo()
        return None
    return runners


def _was_skipped(optimizer: HasNorms, scaling: Scaling | None) -> bool:
    """The one place that waits for the device: no state may stay that a skipped step made."""
    if scaling is not None and scaling.found_inf is not None and scaling.found_inf.item() != 0:
        return True
    return bool(optimizer._options["skip_nonfinite"]) and not optimizer._norms.are_finite()


def prepare(optimizer: HasNorms, changes: Changes) -> list[Runner]:
    """Makes runners that are ready to run, with all that they need. What is changed in the states is noted."""
    groups, rule, options = optimizer.param_groups, optimizer.rule, optimizer._options
    measured = norm_is_measured(options, groups)
    in_parts = sharded_by_fsdp1(p for group in groups for p in group["params"])
    if in_parts:
        check_whole_tensors(rule, type(optimizer).__name__, measured)
    found = _members.find(optimizer)
    _members.convert(found, changes)
    _members.keep_apart(found, optimizer)
    _members.make_states(found, optimizer, changes)
    if measured:
        found.leave_alone_devices_without_gradients()
    members = found.by_device()
    if measured:
        check_one_device(members)
    optimizer._has_no_norm = in_parts or len(members) > 1
    optimizer._norms.make_for(members, measured)
    runners = []
    for device, of_device in members.items():
        backend = _backends.choose(options["backend"], device, rule)
        if rule.has_step and _backends.BACKENDS[backend].steps_on_device:
            move_steps((m.states for m in of_device), device, changes)
        stats = optimizer._norms.by_device[device]
        settings = StepSettings(stats, options["skip_nonfinite"], options["zero_grad_in_step"])
        runner = make_runner(backend, rule, device, settings)
        runner.build(groups, optimizer.state, of_device, found.dormant)
        if not runner.refresh(groups, optimizer.state):
            raise RuntimeError(f"a plan does not fit what it was made from ({runner.reason}): please report this")
        runners.append(runner)
    return runners


def make_runner(backend: str, rule: Rule, device: torch.device, settings: StepSettings) -> Runner:
    if backend == "cpu":
        return NativeRunner(rule, settings)
    if backend in ("cuda", "triton"):
        return GpuRunner(rule, settings, device, backend)
    assert backend == "reference", backend
    return ReferenceRunner(rule, settings)


@torch.no_grad()
def make_early_states(optimizer: HasStates) -> None:
    """Makes all states before the first step, for those parameters that can have any by now."""
    maker = StateMaker.of(optimizer)
    for group in optimizer.param_groups:
        names = optimizer.rule.state_names(group)
        for p in filter(can_have_states, group["params"]):
            with alike(p):
                optimizer.state[p].update(maker.missing(names, p, optimizer.state[p]))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Thousands of new objects would make Python's collector look at every object that there is, several times over,
    which takes longer than all of the rest (0.15 s of 0.25 s for 10,000 parameters)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
