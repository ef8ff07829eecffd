"""Steps within the backward pass, so that the gradients never exist all at once.

Every parameter gets a hook that steps it alone, with a small optimizer of the same class and options. That has one
group, a copy of the owner's but for ``params``, and one state, which it shares with the owner, so that both see
whatever is changed in either. A hook compares identities of what belongs to its own parameter and looks at no other:
the cost of a pass grows with the number of parameters, not with its square.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from . import _torch_compile
from ._base import FusedOptimizer
from ._check_tensors import describe, is_materialised
from ._fakes import is_fake
from ._members import convert, find, keep_apart
from ._rule import Group
from ._stateless import twin
from ._states import Changes

__all__ = ["StepInBackward", "step_in_backward"]


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Steps every parameter in the backward pass, as soon as its gradient is complete, and sets the gradient to None.

    Parameters and states get the bits that ``backward()`` and then ``optimizer.step()`` would give them. States are in
    ``optimizer.state``, hyper-parameters are read from ``optimizer.param_groups`` at every pass, and
    ``load_state_dict`` and ``add_param_group`` work as ever. ``optimizer.step()`` finds no gradients and does nothing,
    so that a training loop may keep it. A parameter that is frozen or not reached by the graph is left alone. One that
    is used in several places waits for the last of them. There is a launch per parameter instead of one per step.

    Every ``backward()`` is a step. So this does not go with what needs gradients after the pass, or several passes:

    - accumulating gradients over several passes, and checkpoints with ``use_reentrant=True``, which are several passes
      in one;
    - ``retain_graph=True`` for a second pass over the same graph, or ``create_graph=True``: torch raises a
      RuntimeError then, because parameters that the graph has saved were changed;
    - clipping by the norm of all gradients (``clip_grad_value`` and ``ema_decay`` work), and inspecting gradients; a
      hook of one parameter's own (``register_post_accumulate_grad_hook``) may change its gradient if it was registered
      earlier;
    - a GradScaler: the gradients would be stepped while they are still scaled. ``GradScaler.step`` finds none, and
      raises an AssertionError ("No inf checks were recorded"), but the parameters have been stepped by then;
    - DistributedDataParallel, which averages gradients after these hooks, so that every process would step with its
      own. It cannot be told from here, hence raises nothing.

    Step post-hooks run where ``optimizer.step()`` is called, after all parameters have been stepped. A value or
    gradient that cannot be stepped raises from ``backward()``, and leaves its own parameter as it was; others may have
    been stepped before.

    Args:
        optimizer: an optimizer of this package.

    Returns:
        A handle: ``remove()`` ends it, as does the end of a ``with`` block. It ends as well when neither the optimizer
        nor the handle is referred to any longer.

    Raises:
        TypeError: for another optimizer.
        ValueError: for what cannot be combined with it: ``max_grad_norm`` in a group, ``skip_nonfinite``,
            ``zero_grad_in_step``, step pre-hooks, ``amp_in_step``, parameters that are stepped in the
            backward pass already; and for parameters and values that cannot be stepped. The optimizer is as it was
            then. Where one of these is set later, ``backward()`` raises it.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"step_in_backward needs an optimizer of fusedoptim, but was given a {type(optimizer).__name__}: "
            f"its step must be one that can be made for one parameter at a time"
        )
    return StepInBackward(optimizer)


class StepInBackward:
    """What :func:`step_in_backward` returns. Use that to make one."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        _check_all(optimizer)
        self.optimizer = optimizer
        self._parts: dict[Tensor, _Part] = {}
        self._count = 0
        self._attaching = threading.Lock()  # a backward pass has a thread per device
        self._attach()
        # Kept by the optimizer, because hooks must not (see _Hook).
        vars(optimizer)["_step_in_backward"] = self
        vars(optimizer)["add_param_group"] = self._add_param_group

    def remove(self) -> None:
        """Ends it: gradients stay after the backward pass, and ``optimizer.step()`` steps again."""
        if vars(self.optimizer).get("_step_in_backward") is self:
            del vars(self.optimizer)["_step_in_backward"], vars(self.optimizer)["add_param_group"]
        for part in self._parts.values():
            part.handle.remove()
        self._parts.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        owner = self.optimizer
        type(owner).add_param_group(owner, param_group)
        try:
            self._attach()
        except ValueError:
            del owner.param_groups[-1]
            _torch_compile.note_params(owner)
            raise

    def _attach(self) -> None:
        """Hooks every parameter that has none yet, and lets go of those that are no longer the optimizer's."""
        with self._attaching:
            self._attach_each()

    def _attach_each(self) -> None:
        groups = self.optimizer.param_groups
        members = [
            (p, index, i)
            for index, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if _can_be_hooked(p)
        ]
        for group in groups:
            _check_combination(self.optimizer, group)
        for p, index, i in members:
            if p not in self._parts and _is_hooked(p):
                raise ValueError(
                    f"{describe(groups[index], index, i)} is stepped in the backward pass already, which leaves"
                    " no gradient for a second time: call remove() on the handle of the first, or use that one"
                )
        for p, index, i in members:
            part = self._parts.get(p)
            if part is None:
                part = self._parts[p] = _Part(self, p)
            part.place(groups[index], index, i)
        owned = {p for p, _, _ in members}
        for p in [p for p in self._parts if p not in owned]:
            self._parts.pop(p).handle.remove()
        self._count = len(groups)


class _Part:
    """One parameter, with the optimizer that steps it alone."""

    def __init__(self, owner: StepInBackward, param: Tensor) -> None:
        self.owner, self.param = owner, param
        self.group: dict[str, Any] = {"params": [param]}
        self.optimizer = twin(owner.optimizer, [self.group], defaultdict(dict))
        self.optimizer._lent = owner.optimizer._lent  # each takes over its own
        frozen = not param.requires_grad
        param.requires_grad_(True)  # torch hooks no frozen parameter, and this one may thaw
        try:
            self.handle = param.register_post_accumulate_grad_hook(_Hook(self))  # type: ignore[no-untyped-call]
        finally:
            param.requires_grad_(not frozen)

    def place(self, group: dict[str, Any], index: int, i: int) -> None:
        """Notes where the owner has the parameter."""
        self.theirs, self.index, self.i, self.size = group, index, i, len(group["params"])
        if "param_names" in group:
            self.group["param_names"] = group["param_names"][i : i + 1]

    def in_place(self) -> bool:
        groups = self.owner.optimizer.param_groups
        if len(groups) != self.owner._count:
            return False
        params = self.theirs["params"]
        return groups[self.index] is self.theirs and len(params) == self.size and params[self.i] is self.param

    def step(self) -> None:
        """Steps the parameter, and drops its gradient."""
        if not self.in_place():
            self.owner._attach()
            if self.param not in self.owner._parts:  # it left the optimizer
                return
        owner, p, state = self.owner.optimizer, self.param, self.optimizer.state
        _check_combination(owner, self.theirs)
        self.follow_group()
        shared = owner.state.get(p)
        if shared is None:
            state.clear()
        elif state.get(p) is not shared:
            state[p] = shared
        self.optimizer._averaging = owner._averaging
        try:
            self.optimizer._step()
        except ValueError as error:
            raise ValueError(self.as_the_owner_says(str(error))) from error
        if shared is None and p in state:
            owner.state[p] = state[p]
        owner._opt_called = True  # torch's schedulers ask for it
        p.grad = None

    def follow_group(self) -> None:
        """Makes the values those of the owner's group. Unchanged ones keep their identity, which keeps the tables."""
        mine, theirs = self.group, self.theirs
        for key, value in theirs.items():
            if key not in _OWN and (key not in mine or mine[key] is not value):
                mine[key] = value
        if len(mine) != len(theirs):
            for key in mine.keys() - theirs.keys():
                del mine[key]

    def as_the_owner_says(self, message: str) -> str:
        mine, theirs = describe(self.group, 0, 0), describe(self.theirs, self.index, self.i)
        return message.replace(mine, theirs).replace("parameter group 0", f"parameter group {self.index}")


class _Hook:
    """A parameter's hook. Python's garbage collector does not look into these, so that it must hold nothing that leads
    back to the parameter: the model would never be freed."""

    def __init__(self, part: _Part) -> None:
        self.part = weakref.ref(part)

    def __call__(self, param: Tensor) -> None:
        part = self.part()
        if part is not None:
            part.step()


#: Keys of a group that have an item per parameter.
_OWN = ("params", "param_names")


def _can_be_hooked(p: Tensor) -> bool:
    """Others never have a gradient."""
    return is_materialised(p) and (p.requires_grad or (p.is_floating_point() and type(p) in (Tensor, Parameter)))


def _is_hooked(p: Tensor) -> bool:
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, _Hook) and hook.part() is not None for hook in hooks.values())


def _check_all(optimizer: FusedOptimizer) -> None:
    """Everything that a first step would check, parameters that share memory among them, which one alone cannot see."""
    for index, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            if p.requires_grad and not is_materialised(p):
                raise ValueError(
                    f"{describe(group, index, i)} has no memory yet, hence cannot be hooked: run the model "
                    "once before, or materialise it with to_empty()"
                )

    def steps(p: Tensor) -> bool:
        return p.requires_grad and is_materialised(p) and not is_fake(p)

    found, changes = find(optimizer, steps), Changes(optimizer.state)
    try:
        convert(found, changes)
        keep_apart(found, optimizer, steps)
    finally:
        changes.undo()


def _check_combination(optimizer: Optimizer, group: Group) -> None:
    """Raises for options that need all gradients at once. They are found at the end of the backward pass only."""
    if group.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={group['max_grad_norm']} cannot be combined with steps in the backward pass: the norm of "
            "all gradients is known only at its end; set it to None, or clip_grad_value, which needs one gradient only"
        )
    if optimizer._options.get("skip_nonfinite"):  # type: ignore[attr-defined]
        raise ValueError(
            "skip_nonfinite=True cannot be combined with steps in the backward pass: whether any gradient is infinite "
            "or NaN is known only at its end, when most have been stepped; build the optimizer without it"
        )
    if optimizer._options.get("zero_grad_in_step"):  # type: ignore[attr-defined]
        raise ValueError(
            "zero_grad_in_step=True cannot be combined with steps in the backward pass, which set gradients to None: "
            "build the optimizer without it"
        )
    if optimizer._step_supports_amp_scaling:  # type: ignore[attr-defined]
        raise ValueError(
            "amp_in_step=True cannot be combined with steps in the backward pass: a GradScaler's scale, "
            "and whether it overflowed, are known only at its end; train in bfloat16, which needs no scaler"
        )
    if optimizer._optimizer_step_pre_hooks:
        raise ValueError(
            "step pre-hooks cannot be combined with steps in the backward pass: they would run in optimizer.step(), "
            "after all parameters have been stepped; remove them, or use register_post_accumulate_grad_hook"
        )
