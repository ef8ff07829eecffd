"""Rules that are compiled later, into libraries of their own, run in the same plans as the built-in ones."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from cases import ALL, assert_same_optimizers, force_grad, parameters, set_gradients
from layouts import LAYOUTS
from own_programs import Programs, compiled, needs_compiler

from fusedoptim import FusedOptimizer, Rule, State, _native
from fusedoptim._native_runner import NativeRunner
from fusedoptim._own_groups import completed
from fusedoptim._runners import StepSettings

pytestmark = needs_compiler
CAPABILITIES = _native._C.cpu_capabilities() if _native._C else []
DEFAULTS = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
#: Of a row: lr, its dtype, the four options of every group, then the rule's own.
BETA1, BETA2, WEIGHT_DECAY = 6, 7, 8
DECAYS = [("column", WEIGHT_DECAY), ("constant", 0.0), ("ne", 0.0)]


def lion(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    beta1, beta2 = h["betas"]
    if h["weight_decay"] != 0:
        p.mul_(1 - h["lr"] * h["weight_decay"])
    p.add_(s["exp_avg"].lerp(g, 1 - beta1).sign(), alpha=-h["lr"])
    s["exp_avg"].lerp_(g, 1 - beta2)


class Lion(FusedOptimizer):
    rule = Rule("lion by hand", lion, states=(State("exp_avg"),), has_step=False)

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, dict(DEFAULTS), options)  # type: ignore[arg-type]


RULE = completed(Lion.rule, DEFAULTS)
BOTH = [[*DECAYS, ("not", 0.0)], DECAYS]


def programs(guards: Any = BOTH) -> Programs:
    return Programs("lion", RULE, guards, states=1)


def two(shapes: Any, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """One that is stepped by programs, and its reference: parameters and optimizers, with a group for the first of
    them."""
    found = []
    for backend in (None, "reference"):
        params = parameters(shapes, dtype)
        groups = [{"params": params[:1], "weight_decay": 0.0, "betas": (0.5, 0.6)}, {"params": params[1:]}]
        found.append((params, Lion(groups, backend=backend, **options)))
    return found[0], found[1]


def steps(one: Any, other: Any, count: int = 4) -> None:
    for step in range(count):
        for params, optimizer in (one, other):
            set_gradients(params, step)
            if step == 2:
                params[-1].grad = None
            optimizer.step()
    assert_same_optimizers(one[1], other[1])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_bits_are_the_references(capability: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups that need different programs, and all that can be around a rule."""
    assert _native._C.set_cpu_capability(capability)
    with programs().in_use(monkeypatch):
        steps(*two([(7, 11), (), (0,), (2000,)], dtype))
        steps(*two([(7, 11), (), (0,), (2000,)], dtype, **ALL))


@pytest.mark.parametrize(
    ("tiles", "options"),
    [
        (False, {"master": "remainder", "state_dtype": torch.bfloat16, "rounding": "nearest"}),
        (False, {"rounding": {"param": "stochastic"}, "state_dtype": torch.float32, "rounding_seed": 5}),
        (False, {"master": torch.float32, "ema_decay": 0.5}),
        (False, {"master": "remainder8"}),
        (True, {"rounding": {"exp_avg": "stochastic"}}),
        (True, {"master": "remainder8", "state_dtype": "int8", "ema_decay": 0.5}),
    ],
    ids=["remainder", "stochastic", "master", "remainder8", "stochastic state", "8 bits"],
)
def test_storages(tiles: bool, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a loop for exactly those; over tiles for what is in blocks, and for what no mix has."""
    own = programs()
    with own.in_use(monkeypatch):
        steps(*two([(40, 130), (70, 64), (33, 128)], torch.bfloat16, **options))
    assert {needs_tiles for _, _, _, needs_tiles in own.needs} == {tiles}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_layouts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    own, shapes = programs([[]]), [(2, 3, 8, 8)] * len(LAYOUTS)
    with own.in_use(monkeypatch):
        one, other = two(shapes, dtype)
        for params, _ in (one, other):
            for p, layout in zip(params, LAYOUTS.values(), strict=True):
                p.data = layout(p.detach())
        for group in (*one[1].param_groups, *other[1].param_groups):
            group["weight_decay"] = 0.0
        steps(one, other)
    assert {tiles for _, _, _, tiles in own.needs} == {True, False}


def test_all_that_a_plan_lacks_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each need once: which program, whether in fp64, the storages, and whether it takes the loop over tiles."""
    number = _native._C.storages()
    f32, f64, bf16 = number["f32"], number["f64"], number["bf16"]
    own = programs()
    with own.in_use(monkeypatch):
        params = parameters([(5,), (6,), (7,), (3, 4)])
        params += [*parameters([(5,)], torch.float64), *parameters([(6,)], torch.bfloat16)]
        optimizer = Lion([{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}])
        set_gradients(params, 0)
        optimizer.step()
        assert own.needs == [
            (0, False, (f32, f32, f32), False),
            (1, False, (f32, f32, f32), False),
            (1, True, (f64, f64, f64), False),
            (1, False, (bf16, bf16, bf16), False),
        ]
        grads = [p.grad for p in params]
        force_grad(params[1], grads[1].bfloat16())  # a mix of its own
        params[3].grad = grads[3].t().contiguous().t()  # in another memory order than its parameter
        force_grad(params[4], grads[4].float())  # which no loop of fp64 has
        optimizer.step()
        assert own.needs[4:] == [
            (1, False, (f32, bf16, f32), False),
            (1, False, (f32, f32, f32), True),
            (1, True, (f64, f32, f64), True),
        ]
        optimizer.step()
        assert len(own.needs) == 7


def test_what_another_instruction_set_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(CAPABILITIES) < 2:
        pytest.skip("there is one")
    own = programs()
    with own.in_use(monkeypatch):
        one, other = two([(40,), (7,)])
        for step, capability in enumerate((*CAPABILITIES[-2:], CAPABILITIES[-2])):
            assert _native._C.set_cpu_capability(capability)
            for params, optimizer in (one, other):
                set_gradients(params, step)
                optimizer.step()
    assert_same_optimizers(one[1], other[1])


def test_values_without_a_program_are_refused_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    own = programs([BOTH[0]])
    with own.in_use(monkeypatch):
        (params, optimizer), _ = two([(5,), (6,)])
        optimizer.param_groups[1]["weight_decay"] = 0.0
        set_gradients(params, 0)
        optimizer.step()
        before = [p.detach().clone() for p in params]
        (runner,) = optimizer._runners
        optimizer.param_groups[1]["weight_decay"] = 0.5
        assert not runner.refresh(optimizer.param_groups, optimizer.state)
        assert runner.reason == "no program is there for a group's values" and not runner.plan.lacking
        with pytest.raises(ValueError, match="no program is there for a group's values"):
            optimizer.step()
        assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def in_a_mode(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    beta1, beta2, weight_decay = h["three"]
    values = {"lr": h["lr"], "betas": (beta1, beta2), "weight_decay": weight_decay if h["mode"] == "decays" else 0.0}
    lion(p, g, s, t, values)


MODE = {"lr": 0.01, "three": (0.9, 0.99, 0.1), "mode": "plain"}


class InAMode(FusedOptimizer):
    rule = Rule("lion in a mode", in_a_mode, states=(State("exp_avg"),), has_step=False)

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, dict(MODE), options)  # type: ignore[arg-type]


def test_values_that_are_no_numbers_choose_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what they were if they are equal, and each group's are its own. Beside them: three numbers in one."""
    decays = [("constants", 0.0)]
    own = Programs("lion", completed(InAMode.rule, MODE), [[*decays, ("not", 0.0)], decays], states=1)
    own.number_constants = lambda groups: [float(g["mode"] == "decays") for g in groups]
    with own.in_use(monkeypatch):
        found = []
        for backend in (None, "reference"):
            params = parameters([(5,), (6,)])
            groups = [{"params": params[:1], "mode": "decays"}, {"params": params[1:], "three": [0.5, 0.6, 0.7]}]
            found.append((params, InAMode(groups, backend=backend)))
        for step in range(3):
            for params, optimizer in found:
                set_gradients(params, step)
                if step == 2:
                    optimizer.param_groups[0]["mode"], optimizer.param_groups[1]["mode"] = "plain", "decays"
                runners = optimizer._runners
                optimizer.param_groups[0]["mode"] = "".join(list(optimizer.param_groups[0]["mode"]))
                optimizer.step()
                if step == 1 and optimizer is found[0][1]:
                    assert optimizer._runners is runners
        assert_same_optimizers(found[0][1], found[1][1])
        before = [p.detach().clone() for p in params]
        for _, optimizer in found:
            optimizer.param_groups[1]["three"] = (0.5, 0.6)
            with pytest.raises(ValueError, match="must be 3 numbers"):
                optimizer.step()
        assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def handle(**changed: Any) -> Any:
    values = {
        "name": "mine",
        "hyper_names": ["a", "b"],
        "state_names": ["x"],
        "number_names": [],
        "has_step": True,
        "sums": 0,
        "divides": False,
        "second_moment": -1,
        "programs": [([], 1, 2, [])],
    }
    return _native._C.RuleHandle(**{**values, **changed})


@pytest.mark.parametrize(
    ("guard", "holds"),
    [
        ([], True),
        ([("column", 6)], True),
        ([("column", 7)], False),
        ([("column", 6), ("column", 7)], False),  # a conjunction
        ([("column", 6), ("column", 6)], True),
        ([("column", 6), ("constant", 3), ("eq", 0), ("column", 7), ("constant", 1), ("lt", 0), ("and", 0)], True),
        ([("column", 7), ("column", 6), ("or", 0), ("not", 0)], False),
        ([("constant", 7), ("constant", 4), ("sub", 0), ("column", 6), ("ne", 0)], False),
        ([("constant", 2), ("column", 6), ("pow", 0), ("constant", 8), ("ge", 0)], True),
        ([("constant", 3), ("constant", 2), ("div", 0), ("neg", 0), ("abs", 0), ("constant", 1.5), ("le", 0)], True),
        ([("constant", 0.1), ("fp32", 0), ("constant", 0.1), ("gt", 0)], True),
        ([("constant", 9), ("sqrt", 0), ("column", 6), ("mul", 0), ("constant", 9), ("add", 0), ("constant", 18),
          ("eq", 0)], True),
        ([("constants", 0), ("constant", 5), ("eq", 0)], True),
    ],
)  # fmt: skip
def test_guards(guard: Any, holds: bool) -> None:
    row = [0.1, 0.0, -1.0, -1.0, -1.0, 0.0, 3.0, 0.0]
    rule = handle(programs=[(guard, 0, 2, []), ([("column", 7), ("constant", 0), ("eq", 0)], 1, 2, [])])
    assert rule.program_of(row, 5.0) == (0 if holds else 1)
    assert handle(programs=[(guard, 0, 2, [])]).program_of(row, 5.0) == (0 if holds else None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hyper_names": [f"h{k}" for k in range(19)]}, "has 19 hyper-parameters, and a rule may have 18"),
        ({"state_names": ["a", "b", "c", "d"]}, "has 4 states of the parameter's shape, and a rule may have 3"),
        ({"number_names": ["a", "b", "c", "d"]}, "has 4 states that are a number, and a rule may have 3"),
        ({"sums": 3}, "has 3 sums over whole tensors, and a rule may have 2"),
        ({"programs": [([], 1, 2, [])] * 65}, "has 65 programs, and a rule may have 64"),
        ({"programs": [([], 2, 2, [])]}, "uses states that it does not have"),
        ({"programs": [([], 1, 8, [])]}, "uses states that it does not have"),
        ({"programs": [([("column", 8)], 1, 2, [])]}, "looks at columns that its rows do not have"),
        ({"programs": [([("column", -1)], 1, 2, [])]}, "looks at columns that its rows do not have"),
        ({"programs": [([("exp", 1)], 1, 2, [])]}, "a guard has no operation exp"),
        ({"programs": [([("constant", 1), ("add", 0)], 1, 2, [])]}, "operation add has too few operands"),
        ({"programs": [([("constant", 1)] * 65, 1, 2, [])]}, "leaves too much on its stack"),
    ],
)
def test_what_no_rule_can_be(changed: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        handle(**changed)


def test_code_of_another_version_is_refused() -> None:
    """It would be called with tables that it does not know."""
    number = _native._C.storages()["f32"]
    address = compiled("lion", _native._C.cpu_capability(), (0, False, (number,) * 3, False), -1)
    code = (ctypes.c_int32 * 32).from_buffer_copy(ctypes.string_at(address, 128))
    at = ctypes.addressof(code)
    handle(programs=[([], 1, 2, [at])])
    for field in range(4):  # version, sizes of an entry, of what scalars are made from, of what loops are told
        code[field] += 1
        with pytest.raises(
            RuntimeError, match="'mine' was compiled with another version of fusedoptim: compile it again"
        ):
            handle(programs=[([], 1, 2, [at])])
        code[field] -= 1
    with pytest.raises(RuntimeError, match="compile it again"):
        handle(programs=[([], 1, 2, [0])])
    with pytest.raises(RuntimeError, match="was compiled for other states, numbers or sums"):
        handle(programs=[([], 0, 2, [at])])
    with pytest.raises(RuntimeError, match="was compiled for other states, numbers or sums"):
        handle(sums=1, programs=[([], 1, 2, [at])])


def test_a_rule_of_another_name_for_its_values_is_refused() -> None:
    rule = dataclasses.replace(RULE, states=(State("momentum"),))
    settings = StepSettings(torch.zeros(2, dtype=torch.float64), False, False)
    with pytest.raises(ValueError, match=r"rule 'lion by hand' declares .*momentum, but was compiled with .*exp_avg"):
        NativeRunner(rule, settings, handle=programs().handle())
