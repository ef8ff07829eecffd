"""The step that finds nothing ready: it validates, makes states and runners, and steps, or leaves all as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import _backends, _members
from ._check_tensors import can_have_states
from ._device_memory import DeviceMemory
from ._distributed import sharded_by_fsdp1
from ._dtensor import hides_shard
from ._exchange import Exchange, RankError, RefusedElsewhere
from ._fakes import alike
from ._joint_runner import JointRunner
from ._masters import warn_of_loss
from ._native_runner import GpuRunner, NativeRunner
from ._norms import HasNorms, check_whole_tensors, norm_is_measured
from ._reference_runner import ReferenceRunner
from ._rule import Rule
from ._runners import CannotCompile, Runner, Steps, StepSettings
from ._states import Changes, HasStates, StateMaker, move_steps
from ._storage import rounds_stochastically


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


def step_afresh(optimizer: HasNorms, grad_norm: Tensor | None = None) -> list[Steps] | None:
    """Validates everything, makes missing states and runners, and steps; or raises, having changed nothing.

    Args:
        grad_norm: of all gradients, if it is not to be measured.

    Returns:
        The runners, for the next steps; None if this one was skipped.
    """
    scaling = scaling_of(optimizer)
    changes = Changes(optimizer.state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    exchange = Exchange(params, optimizer._options["norm_group"] or ())
    try:
        with without_garbage_collection():
            runners = prepare(optimizer, changes, exchange, grad_norm is not None)
    except BaseException as error:
        changes.undo()
        if isinstance(error, Exception):
            _refuse(optimizer, exchange, params, error, grad_norm is not None)
        raise
    try:
        run(runners, optimizer, grad_norm)
    except BaseException:
        if not any(isinstance(one, JointRunner) and one.has_written for one in runners):
            changes.undo()
        raise
    if any(isinstance(one, JointRunner) and one.notice.arrives() for one in runners):
        changes.undo()
        raise RefusedElsewhere
    if _was_skipped(optimizer, scaling):
        changes.undo()
        return None
    warn_of_loss(changes.losses)
    return runners


def run(steps: Sequence[Steps], optimizer: HasNorms, grad_norm: Tensor | None = None) -> None:
    """Runs what is ready.

    Args:
        grad_norm: of all gradients, if it is not to be measured.
    """
    grad_scale, found_inf = scaling_of(optimizer) or (None, None)
    for one in steps:
        if grad_norm is None:
            one.run_scaled(grad_scale, found_inf)
            continue
        if not isinstance(one, JointRunner):
            one = JointRunner([cast(Runner, one)], None, optimizer.rule, optimizer._options)
        one.run_scaled(grad_scale, found_inf, grad_norm)


def _refuse(
    optimizer: HasNorms, exchange: Exchange, params: list[Tensor], error: Exception, norm_is_given: bool
) -> None:
    """Takes part, with a refusal, in what the other ranks do in this step, so that they raise and none waits."""
    if isinstance(error, RankError):  # which they know of
        return
    if not optimizer._agreed:
        exchange.agree(True)
        return
    measured = norm_is_measured(optimizer._options, optimizer.param_groups) and not norm_is_given
    by_tensor = optimizer.rule.sums * bool(exchange.rounds)
    exchange.refuse(params, [False] * (exchange.adds and measured) + [True] * by_tensor)


def _was_skipped(optimizer: HasNorms, scaling: Scaling | None) -> bool:
    """The one place that waits for the device: no state may stay that a skipped step made."""
    if scaling is not None and scaling.found_inf is not None and scaling.found_inf.item() != 0:
        return True
    return bool(optimizer._options["skip_nonfinite"]) and not optimizer._norms.are_finite()


def prepare(optimizer: HasNorms, changes: Changes, exchange: Exchange, norm_is_given: bool = False) -> list[Steps]:
    """Makes runners that are ready to run, with all that they need. What is changed in the states is noted."""
    groups, rule, options = optimizer.param_groups, optimizer.rule, optimizer._options
    measured = norm_is_measured(options, groups)
    in_parts = sharded_by_fsdp1(p for group in groups for p in group["params"])
    if in_parts:
        alone = measured and not norm_is_given and not options["norm_group"]
        check_whole_tensors(rule, type(optimizer).__name__, alone)
    found = _members.find(optimizer)
    if not optimizer._agreed:
        if exchange.agree(False):
            raise RefusedElsewhere
        optimizer._agreed = True
    _members.convert(found, changes)
    _members.keep_apart(found, optimizer)
    _members.make_states(found, optimizer, changes)
    _members.note_storage(found, optimizer)
    members = found.by_device()
    if not members and exchange.adds:  # this rank has nothing to step, and takes part where a norm is measured
        members = {next((p.device for group in groups for p in group["params"]), torch.device("cpu")): []}
    optimizer._has_no_norm = in_parts and not options["norm_group"]
    optimizer._norms.make_for(members, measured)
    wide = (exchange.adds or len(members) > 1) and any(
        p.dtype == torch.float64 for group in groups for p in group["params"]
    )
    runners: list[Runner] = []
    for device, of_device in members.items():
        backend = _backends.choose(options["backend"], device, rule)
        if any(hides_shard(m.param) for m in of_device):
            backend = _backends.for_hidden_shards(backend, options["backend"])
        if _backends.BACKENDS[backend].steps_on_device:
            counted = [m.states for m in of_device if rule.has_step or rounds_stochastically(groups[m.group], rule)]
            move_steps(counted, device, changes)
        stats = optimizer._norms.by_device[device]
        settings = StepSettings(stats, options["skip_nonfinite"], options["zero_grad_in_step"])
        made_from = (groups, optimizer.state, of_device, found.dormant, wide)
        runner = make_runner(backend, rule, device, settings)
        try:
            runner.build(*made_from)
        except CannotCompile as error:
            if options["backend"] is not None:
                raise
            _backends.warn_own(rule, str(error))
            runner = ReferenceRunner(rule, settings)
            runner.build(*made_from)
        runners.append(runner)
    steps: list[Steps] = [*runners]
    if len(runners) > 1 or exchange.adds:
        steps = [JointRunner(runners, exchange if exchange.adds else None, rule, options)]
    for one in steps:
        if not one.refresh(groups, optimizer.state):
            raise RuntimeError(f"a plan does not fit what it was made from ({one.reason}): please report this")
    return steps


def make_runner(backend: str, rule: Rule, device: torch.device, settings: StepSettings) -> Runner:
    if backend == "triton":
        from .own_rules.runner import TritonRunner

        return TritonRunner(rule, settings, device)
    if backend == "cuda":
        return GpuRunner(rule, settings, device, DeviceMemory(device))
    if backend == "cpu" and _backends.is_own(rule):
        from .own_rules.runner import OwnCpuRunner

        return OwnCpuRunner(rule, settings)
    if backend == "cpu":
        return NativeRunner(rule, settings)
    assert backend == "reference", backend
    return ReferenceRunner(rule, settings)


@torch.no_grad()
def make_early_states(optimizer: HasStates) -> None:
    """Makes all states before the first step, for those parameters that can have any by now."""
    maker = StateMaker.of(optimizer)
    for group in optimizer.param_groups:
        for p in filter(can_have_states, group["params"]):
            with alike(p):
                optimizer.state[p].update(maker.missing(group, p, optimizer.state[p]))


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
