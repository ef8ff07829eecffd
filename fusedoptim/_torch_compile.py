"""A step inside of torch.compile: one opaque operator, which makes an ordinary step when the compiled code runs.

What is traced touches parameters and gradients only. Hyper-parameters, states and tables are looked up when the
operator runs, so that no change of theirs compiles anything anew; only another set of parameters with gradients does.
The parameters are declared to be written to. States and hyper-parameters belong to the optimizer: code in the
same compiled function may read a state as it was before or after the step, and what it assigns to a group takes effect
after it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import _versions
from ._dtensor import alike, is_dtensor, local, same_layout
from ._norms import HasNorms


class Traceable(HasNorms, Protocol):
    """What an optimizer has whose steps are operators."""

    #: What the operators' numbers stand for, one for each set of parameters with gradients, however often it is
    #: compiled.
    _traced_steps: dict[Hashable, Traced]
    #: By which traced code finds it: a text, because a compiler might take a number for one that varies.
    _name: str
    #: The parameters that a compiler may look at, as of the last look at the groups, which traced code must not touch.
    _all_params: list[Tensor]
    #: Which of these are DTensors.
    _sharded: list[bool]
    #: How many others there are.
    _unseen: int

    def _step(self, in_operator: bool = False) -> None: ...

    def __getstate__(self) -> dict[str, Any]: ...

    def __setstate__(self, state: dict[str, Any]) -> None: ...


class Traced:
    """What an operator's number stands for: the step of an optimizer, for those of its parameters that had gradients.

    The number is good for as long as this lives. It is never given again, so that code which outlives the optimizer
    finds nothing, rather than another's step.
    """

    def __init__(self, optimizer: Traceable, active: tuple[int, ...]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.active = active
        self.number = next(_numbers)
        _traced[self.number] = self

    @property
    def optimizer(self) -> Traceable:
        found = self._optimizer()
        assert found is not None  # see find()
        return found


_numbers = itertools.count()
_traced: weakref.WeakValueDictionary[int, Traced] = weakref.WeakValueDictionary()
_optimizers: weakref.WeakValueDictionary[str, Traceable] = weakref.WeakValueDictionary()


def register(optimizer: Traceable) -> None:
    """Makes a new optimizer known to traced code."""
    optimizer._name = f"{type(optimizer).__name__}-{next(_numbers)}"
    _optimizers[optimizer._name] = optimizer
    optimizer._traced_steps = {}
    optimizer._all_params, optimizer._sharded, optimizer._unseen = [], [], 0


def keep_first(optimizer: Traceable, key: Hashable, new: Traced) -> Traced:
    """Of those given for a key it returns the first, which lives as long as its optimizer."""
    return optimizer._traced_steps.setdefault(key, new)


def find(number: int) -> Traced:
    found = _traced.get(number)
    if found is None or found._optimizer() is None:
        raise RuntimeError(
            f"the optimizer of this compiled step (number {number}) is gone: keep it as long as the compiled code"
        )
    return found


_library = torch.library.Library("fusedoptim", "FRAGMENT")  # type: ignore[no-untyped-call]
#: For the parameters that have gradients. The second is for steps that leave zeros in them.
OPERATORS = {
    "step_": "(int traced, Tensor(a!)[] params, Tensor[] grads) -> ()",
    "step_and_zero_": "(int traced, Tensor(a!)[] params, Tensor(b!)[] grads) -> ()",
}


def traceable(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters that a compiler may look at, whether or not they have gradients: it knows no frozen ones that are
    sparse, quantised or of a subclass. Should one of these get a gradient, the step finds it when it runs."""
    return [p for group in groups for p in group["params"] if p.requires_grad or _is_plain(p)]


def _is_plain(p: Tensor) -> bool:
    return type(p) in (Tensor, torch.nn.Parameter) and p.layout == torch.strided and not p.is_quantized


def note_params(optimizer: Traceable) -> None:
    """For steps that will be traced."""
    optimizer._all_params = traceable(optimizer.param_groups)
    optimizer._sharded = [is_dtensor(p) for p in optimizer._all_params]
    optimizer._unseen = sum(len(group["params"]) for group in optimizer.param_groups) - len(optimizer._all_params)


def trace(optimizer: Traceable) -> None:
    """Puts the operator into the graph that is being traced."""
    params, active = [], []
    grads: list[Tensor | None] = []
    with torch.no_grad():
        for i, p in enumerate(optimizer._all_params):
            if p.grad is None:
                continue
            active.append(i)
            if optimizer._sharded[i]:
                params.append(_shard(p))
                grads.append(_shard(_aligned(p, p.grad)))
            else:
                params.append(p)
                grads.append(p.grad)
    if active:
        call(optimizer, _remember(optimizer._name, tuple(active)), params, grads)
    elif optimizer._unseen:  # no operator would be there to find a gradient of theirs
        raise RuntimeError(
            "no parameter has a gradient, but for frozen ones that a compiler cannot look at: step outside of the "
            "compiled function"
        )


def _shard(t: Any) -> Tensor:
    """As _dtensor.local, for traced code: what to_local() gives is not traced where shards are uneven."""
    shard: Tensor | None = getattr(t, "_local_tensor", None)
    return t.to_local() if shard is None else shard


def _aligned(p: Any, g: Any) -> Any:
    """As _dtensor.aligned, for traced code."""
    return g if g.placements == p.placements else g.redistribute(p.device_mesh, p.placements)


def call(optimizer: Traceable, number: int, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """Calls the operator.

    Args:
        params: those that have gradients: others may be of any kind, which no compiler takes. Of DTensors the shards:
            an operator of DTensors would need a rule for each of its placements.
        grads: likewise, placed as the parameters are.
    """
    with torch.no_grad():
        if optimizer._options["zero_grad_in_step"]:
            torch.ops.fusedoptim.step_and_zero_(number, params, grads)
        else:
            torch.ops.fusedoptim.step_(number, params, grads)


def _remember(name: str, active: tuple[int, ...]) -> int:
    optimizer = _optimizers[name]
    return keep_first(optimizer, active, Traced(optimizer, active)).number


# As torch.compiler.assume_constant_result does, without importing the compiler, which takes a second: it is called
# while a step is traced, and its result becomes a constant of the graph.
_remember._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _step(number: int, params: list[Tensor], grads: list[Tensor]) -> None:
    traced = find(number)
    optimizer = traced.optimizer
    every = traceable(optimizer.param_groups)
    if list(map(id, every)) != list(map(id, optimizer._all_params)):
        note_params(optimizer)
        raise RuntimeError(
            "the optimizer's parameters changed since its step was compiled, and nothing was stepped: call it again, "
            "which compiles it for them, or, if one of a subclass thawed, step outside of the compiled function. "
            "add_param_group() makes such changes known at once"
        )
    own = [local(every[i]) for i in traced.active]
    given = {i: _gradient(every[i], g) for i, g in zip(traced.active, grads, strict=True)}
    before = [p.grad for p in every]
    # A compiler may hand over copies, to be written to in the parameters' stead.
    copies = [(p, q, p.detach().clone()) for p, q in zip(own, params, strict=True) if p is not q and not _same(p, q)]
    try:
        for p, q, _ in copies:
            p.data.copy_(q)
        for i, p in enumerate(every):
            if p.grad is not given.get(i):
                p.grad = given.get(i)
        optimizer._step(in_operator=True)
        if optimizer._options["zero_grad_in_step"]:
            _zero([b for b, p in zip(before, every, strict=True) if b is not None and b is not p.grad])
    finally:
        for p, grad in zip(every, before, strict=True):
            if p.grad is not grad:
                p.grad = grad
        for p, q, old in copies:
            q.copy_(p.detach())
            p.data.copy_(old)


def _zero(grads: list[Tensor]) -> None:
    """Of gradients that were placed in another way than their parameters: the step has zeroed what took their place."""
    for g in filter(is_dtensor, grads):
        local(g).zero_()
        _versions.by_torch([g])


def _gradient(p: Tensor, g: Tensor) -> Tensor:
    """Of the operator's shard of it, if the parameter is a DTensor."""
    if not is_dtensor(p):
        return g
    there = p.grad
    if is_dtensor(there) and same_layout(p, there) and _same(local(there), g):  # type: ignore[arg-type]
        return there  # type: ignore[return-value]
    placed: Tensor = alike(p, g)
    return placed


def _same(p: Tensor, q: Tensor) -> bool:
    return p.data_ptr() == q.data_ptr() and p.shape == q.shape and p.stride() == q.stride()


def define(name: str, schema: str, kernel: object) -> None:
    # A CUDA graph would hold on to the hyper-parameters of the step that it recorded.
    _library.define(  # type: ignore[no-untyped-call]
        name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    )
    _library.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fusedoptim::{name}", lambda *_: None, lib=_library)


for _operator, _schema in OPERATORS.items():
    define(_operator, _schema, _step)
