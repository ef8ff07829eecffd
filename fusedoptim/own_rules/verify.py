"""Every compiled program is run against the rule's own function, once, on small random tensors, before it steps any
parameter."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _members, _native
from .._reference_runner import ReferenceRunner
from .._rule import GROUP_OPTIONS, STORAGE, Group, Rule
from .._runners import Runner, StepSettings
from .._states import Changes, move_steps
from .programs import program_of
from .trace import Program

#: By what else was compiled for: the dtype, how states are stored, the device, the CPU's instruction set.
_checked: weakref.WeakKeyDictionary[Program, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()
_busy = threading.local()
SHAPES, STEPS = ((3, 7), (64,), (1,)), 3
Make = Callable[[StepSettings], Runner]


def gives_the_functions_bits(rule: Rule, group: Group, dtype: torch.dtype, device: torch.device, make: Make) -> bool:
    """Whether a runner and the rule's function have the same results. On a GPU numbers in fp64 may differ in their last
    place, and what is computed in it is not checked.

    Args:
        group: with checked values.
        dtype: of parameters and gradients.
        make: makes the runner.
    """
    if getattr(_busy, "checking", False) or (dtype == torch.float64 and device.type != "cpu"):
        return True
    capability = _native._C.cpu_capability() if _native._C is not None and device.type == "cpu" else ""
    key = (dtype, repr([group.get(key) for key in STORAGE]), device, capability)
    checked = _checked.setdefault(program_of(rule, group), {})
    if key not in checked:
        _busy.checking = True
        try:
            mine = _run(rule, group, dtype, device, make)
            theirs = _run(rule, group, dtype, torch.device("cpu"), lambda settings: ReferenceRunner(rule, settings))
            checked[key] = all(map(_equal, mine, theirs))
        except (ArithmeticError, ValueError):  # of Python's own numbers, which math.sqrt and literals are
            checked[key] = True
        finally:
            _busy.checking = False
    return checked[key]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _run(rule: Rule, group: Group, dtype: torch.dtype, device: torch.device, make: Make) -> list[Tensor]:
    """The parameters and states after a few steps."""
    g = torch.Generator("cpu").manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype, device="cpu").to(device)

    params = [torch.nn.Parameter(random(shape)) for shape in SHAPES]
    off = {key: value for key, value in GROUP_OPTIONS.items() if key not in STORAGE}
    values: dict[str, Any] = {**group, **off, "params": params}
    values.pop("param_names", None)
    if isinstance(values["lr"], Tensor):
        values["lr"] = values["lr"].detach().to("cpu", copy=True)
    # What an optimizer has that states and runners are made of.
    made_of: Any = SimpleNamespace(
        rule=rule,
        defaults=values,
        param_groups=[values],
        state=defaultdict(dict),
        _options={"zero_grad_in_step": False},
        _ids={},
    )
    runner: Runner | None = None
    for _ in range(STEPS):
        for p in params:
            p.grad = random(tuple(p.shape))
        if runner is None:
            found, changes = _members.find(made_of), Changes(made_of.state)
            _members.make_states(found, made_of, changes)
            _members.note_storage(found, made_of)
            move_steps([m.states for m in found.ready], device, changes)
            runner = make(StepSettings(torch.zeros(2, dtype=torch.float64, device=device), False, False))
            runner.build(made_of.param_groups, made_of.state, found.ready, [])
        if not runner.refresh(made_of.param_groups, made_of.state):
            for m in found.ready:
                m.first = False  # it has been stepped
            runner.build(made_of.param_groups, made_of.state, found.ready, [])
            runner.refresh(made_of.param_groups, made_of.state)
        runner.run()
    return [t.cpu() for p in params for t in (p.detach(), *made_of.state[p].values())]
