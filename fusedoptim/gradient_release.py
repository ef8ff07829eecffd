"""Steps within the backward pass, so that the gradients never exist all at once.

Every parameter gets a hook that steps it alone, with a small optimizer of the same class and options. That has one
group, a copy of the owner's but for ``params``, and one state, which it shares with the owner, so that both see
whatever is changed in either. A hook compares identities of what belongs to its own parameter and looks at no other:
the cost of a pass grows with the number of parameters, not with its square.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import _torch_compile
from ._base import FusedOptimizer
from ._check_tensors import describe
from ._exchange import agreement
from ._random_places import ids_of
from ._release_checks import can_be_hooked, check_all, check_combination
from ._release_part import Part, is_hooked

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

__all__ = ["StepInBackward", "step_in_backward"]


def step_in_backward(optimizer: FusedOptimizer, *, ddp: DistributedDataParallel | None = None) -> StepInBackward:
    """Steps every parameter in the backward pass, as soon as its gradient is complete, and sets the gradient to None.
    ``handle = step_in_backward(optimizer)``, and from then on ``loss.backward()`` alone.

    Parameters and states get the bits that ``backward()`` and then ``optimizer.step()`` would give them. States are in
    ``optimizer.state``, hyper-parameters are read from ``optimizer.param_groups`` at every pass, and
    ``load_state_dict`` and ``add_param_group`` work as ever. ``optimizer.step()`` finds no gradients and does nothing,
    so that a training loop may keep it. A parameter that is frozen or not reached by the graph is left alone. One that
    is used in several places waits for the last of them. There is a launch per parameter instead of one per step.

    Every ``backward()`` that completes gradients is a step. So this does not go with what needs gradients after the
    pass, or several passes:

    - accumulating gradients over several passes, and checkpoints with ``use_reentrant=True``, which are several passes
      in one. Passes that exchange no gradients step nothing, hence accumulate: those of FSDP2 after
      ``set_requires_gradient_sync(False)``, and with ``ddp`` those within ``no_sync()``;
    - ``retain_graph=True`` for a second pass over the same graph, or ``create_graph=True``: torch raises a
      RuntimeError then, because parameters that the graph has saved were changed;
    - clipping by the norm of all gradients (``clip_grad_value`` and ``ema_decay`` work), and inspecting gradients; a
      hook of one parameter's own (``register_post_accumulate_grad_hook``) may change its gradient if it was registered
      earlier;
    - a GradScaler: the gradients would be stepped while they are still scaled. ``GradScaler.step`` finds none, and
      raises an AssertionError ("No inf checks were recorded"), but the parameters have been stepped by then.

    DistributedDataParallel averages gradients after the hooks of parameters, so that every process would step with its
    own; that cannot be told from here, hence raises nothing: pass it as ``ddp``. Then a bucket of gradients is averaged
    as DDP would, and its parameters are stepped when the averages are there. Buckets stay, which take the memory of all
    gradients; those beside them are saved, of which there are none with ``gradient_as_bucket_view``. With
    ``find_unused_parameters`` or ``static_graph`` every bucket takes another all-reduce, of an int32 per parameter; on
    a GPU, a process waits for its result if one of the bucket's parameters has no gradient there. ``backward()``
    refuses to step within ``ddp.join()``.

    DTensors, as FSDP2 and tensor parallelism make them, are stepped when their gradients are summed over the processes;
    every process must reach the same parameters. The original parameters of FullyShardedDataParallel keep their
    gradients, for ``optimizer.step()``.

    Step post-hooks run where ``optimizer.step()`` is called, after all parameters have been stepped. A value or
    gradient that cannot be stepped raises from ``backward()``, and leaves its own parameter as it was; others may have
    been stepped before. With ``ddp`` all others are: it raises at the end of the pass, so that no process waits for
    another's buckets. If only one process refuses a step, replicas differ from then on.

    Args:
        optimizer: an optimizer of this package.
        ddp: the DistributedDataParallel that averages the gradients of all of the optimizer's parameters. One may be
            given for several optimizers, and may have parameters of none. It keeps a communication hook, which is not
            for removal: after ``remove()`` that averages as DDP does, and leaves gradients.

    Returns:
        A handle: ``remove()`` ends it, as does the end of a ``with`` block. It ends as well when neither the optimizer
        nor the handle is referred to any longer.

    Raises:
        TypeError: for another optimizer, and for another wrapper as ``ddp``.
        ValueError: for what cannot be combined with it: ``max_grad_norm`` in a group, ``skip_nonfinite``,
            ``zero_grad_in_step``, step pre-hooks, ``amp_in_step``, parameters that are stepped in the
            backward pass already, or that ``ddp`` does not average; flat parameters of FullyShardedDataParallel; a
            ``ddp`` that has a communication hook; and for parameters and values that cannot be stepped. The optimizer
            is as it was then. Where one of these is set later, ``backward()`` raises it.
        RuntimeError: if another rank raised one of these for DTensors that it shares.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"step_in_backward needs an optimizer of fusedoptim, but was given a {type(optimizer).__name__}: "
            f"its step must be one that can be made for one parameter at a time"
        )
    return StepInBackward(optimizer, ddp)


class StepInBackward:
    """What :func:`step_in_backward` returns. Use that to make one."""

    def __init__(self, optimizer: FusedOptimizer, ddp: DistributedDataParallel | None = None) -> None:
        self.optimizer = optimizer
        self.parts: dict[Tensor, Part] = {}
        self.count = 0
        self._attaching = threading.Lock()  # a backward pass has a thread per device
        self._ddp = None if ddp is None else weakref.ref(_release_ddp().check(ddp))
        try:
            with agreement([p for group in optimizer.param_groups for p in group["params"]]):
                check_all(optimizer)
                self.attach()
                if ddp is not None:
                    _release_ddp().buckets_of(ddp).add(self)
        except Exception:
            self.remove()
            raise
        # Kept by the optimizer, because hooks must not (see Hook).
        vars(optimizer)["_step_in_backward"] = self
        vars(optimizer)["add_param_group"] = self._add_param_group

    @property
    def waits(self) -> bool:
        """Whether gradients are averaged first, and parameters' own hooks step nothing."""
        return self._ddp is not None

    def remove(self) -> None:
        """Ends it: gradients stay after the backward pass, and ``optimizer.step()`` steps again."""
        if vars(self.optimizer).get("_step_in_backward") is self:
            del vars(self.optimizer)["_step_in_backward"], vars(self.optimizer)["add_param_group"]
        for part in self.parts.values():
            part.handle.remove()
        self.parts.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        owner = self.optimizer
        type(owner).add_param_group(owner, param_group)
        try:
            self.attach()
        except ValueError:
            del owner.param_groups[-1]
            _torch_compile.note_params(owner)
            raise

    def attach(self) -> None:
        """Hooks every parameter that has none yet, and lets go of those that are no longer the optimizer's."""
        with self._attaching:
            self._attach_each()

    def _attach_each(self) -> None:
        groups = self.optimizer.param_groups
        members = [
            (p, index, i)
            for index, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if can_be_hooked(p)
        ]
        for group in groups:
            check_combination(self.optimizer, group)
        self._check_new([m for m in members if m[0] not in self.parts])
        ids = ids_of(self.optimizer)
        for p, index, i in members:
            part = self.parts.get(p)
            if part is None:
                part = self.parts[p] = Part(self, p)
            part.place(groups[index], index, i, ids[p])
        owned = {p for p, _, _ in members}
        for p in [p for p in self.parts if p not in owned]:
            self.parts.pop(p).handle.remove()
        self.count = len(groups)

    def _check_new(self, members: list[tuple[Tensor, int, int]]) -> None:
        groups, ddp = self.optimizer.param_groups, None if self._ddp is None else self._ddp()
        averaged = None if ddp is None or not members else _release_ddp().averaged_by(ddp)
        for p, index, i in members:
            if is_hooked(p):
                raise ValueError(
                    f"{describe(groups[index], index, i)} is stepped in the backward pass already, which leaves"
                    " no gradient for a second time: call remove() on the handle of the first, or use that one"
                )
            if averaged is not None and p.requires_grad and p not in averaged:
                raise ValueError(
                    f"{describe(groups[index], index, i)} is none that this DistributedDataParallel averages, so that "
                    "every process would step it with a gradient of its own: give it to another optimizer"
                )


def _release_ddp() -> Any:
    """Imported where it is needed: torch may have been built without torch.distributed."""
    from . import _release_ddp

    return _release_ddp
