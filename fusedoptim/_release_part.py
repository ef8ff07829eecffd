"""One parameter that is stepped in the backward pass: its hook, and the small optimizer that steps it alone."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any, Protocol

from torch import Tensor

from ._base import FusedOptimizer
from ._check_tensors import describe
from ._random_places import Id
from ._release_checks import check_combination
from ._stateless import twin


class Owner(Protocol):
    """What parts are made for."""

    optimizer: FusedOptimizer
    parts: dict[Tensor, Part]
    #: The number of the optimizer's groups that parts were placed in.
    count: int

    @property
    def waits(self) -> bool:
        """Whether gradients are to be averaged first, so that hooks step nothing."""
        ...

    def attach(self) -> None:
        """Makes a part of every parameter that has none."""
        ...


class Part:
    """One parameter, with the optimizer that steps it alone."""

    def __init__(self, owner: Owner, param: Tensor) -> None:
        self.owner, self.param = owner, param
        self.group: dict[str, Any] = {"params": [param]}
        self.optimizer = twin(owner.optimizer, [self.group], defaultdict(dict))
        self.optimizer._lent = owner.optimizer._lent  # each takes over its own
        self.optimizer._options["norm_group"] = None  # whose processes may have other parameters, in another order
        #: Whether it was seen among what DistributedDataParallel averages.
        self.averaged = False
        frozen = not param.requires_grad
        param.requires_grad_(True)  # torch hooks no frozen parameter, and this one may thaw
        try:
            self.handle = param.register_post_accumulate_grad_hook(Hook(self))  # type: ignore[no-untyped-call]
        finally:
            param.requires_grad_(not frozen)

    def place(self, group: dict[str, Any], index: int, i: int, its_id: Id) -> None:
        """Notes where the owner has the parameter, and what it is there, for random bits."""
        self.theirs, self.index, self.i, self.size = group, index, i, len(group["params"])
        if self.optimizer._ids.get(self.param) != its_id:
            self.optimizer._ids = {self.param: its_id}
            self.optimizer._drop_runners()
        if "param_names" in group:
            self.group["param_names"] = group["param_names"][i : i + 1]

    def in_place(self) -> bool:
        groups = self.owner.optimizer.param_groups
        if len(groups) != self.owner.count:
            return False
        params = self.theirs["params"]
        return groups[self.index] is self.theirs and len(params) == self.size and params[self.i] is self.param

    def name(self) -> str:
        """As the owner knows it."""
        return describe(self.theirs, self.index, self.i)

    def step(self) -> bool:
        """Steps the parameter, and drops its gradient; not if it has left the optimizer."""
        if not self.in_place():
            self.owner.attach()
            if self.param not in self.owner.parts:  # it left the optimizer
                return False
        owner, p, state = self.owner.optimizer, self.param, self.optimizer.state
        check_combination(owner, self.theirs)
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
        return True

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
        message = message.replace(describe(self.group, 0, 0), self.name())
        return message.replace("parameter group 0", f"parameter group {self.index}")


class Hook:
    """A parameter's hook. Python's garbage collector does not look into these, so that it must hold nothing that leads
    back to the parameter: the model would never be freed."""

    def __init__(self, part: Part) -> None:
        self.part = weakref.ref(part)

    def __call__(self, param: Tensor) -> None:
        part = self.part()
        if part is not None and not part.owner.waits:
            part.step()


#: Keys of a group that have an item per parameter.
_OWN = ("params", "param_names")


def is_hooked(p: Tensor) -> bool:
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, Hook) and hook.part() is not None for hook in hooks.values())
