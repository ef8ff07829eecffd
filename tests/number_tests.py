"""What every backend makes of a group's numbers, and of the default device. A test module that imports this one's names
defines the fixture ``kernels`` (device_tests.py); results are compared with the CPU's kernels, bit for bit."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import ALL, FULL, Case, assert_same_bits, assert_same_optimizers, gradient, parameters, set_gradients
from device import Kernels, assert_unchanged, pair

import fusedoptim
from fusedoptim._rule import AT_LEAST_0, BELOW_1, FP32, LARGEST, NUMBER, Hyper

#: Objects that stand for a number, none of them a float.
KINDS: dict[str, Callable[[float], Any]] = {
    "float32": lambda x: torch.tensor(x).numpy()[()],  # without NumPy's warning of what becomes infinity
    "float64": np.float64,
    "Decimal": lambda x: Decimal(repr(x)),
    "Fraction": lambda x: Fraction(repr(x)),
    "fp32 tensor": torch.tensor,
    "fp64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "fp16 tensor of one element": lambda x: torch.tensor([x], dtype=torch.float16),
}


def of_kind(kind: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(of_kind(kind, x) for x in value)
    return np.bool_(value) if isinstance(value, bool) else KINDS[kind](float(value))


def as_floats(options: dict[str, Any]) -> dict[str, Any]:
    """But for a learning rate that is a tensor, which has torch's arithmetic of tensors."""

    def as_float(key: str, value: Any) -> Any:
        if key == "lr" and isinstance(value, torch.Tensor):
            return value
        return tuple(map(float, value)) if isinstance(value, tuple) else float(value)

    return {key: as_float(key, value) for key, value in options.items()}


def hypers() -> list[Any]:
    """Every number of every rule, with a case for it."""
    return [pytest.param(c, h, id=f"{c}-{h.key}{h.index}") for c in FULL for h in c.cls.rule.row]


def put(optimizer: torch.optim.Optimizer, hyper: Hyper, value: Any) -> Any:
    """Sets a hyper-parameter, one of two if it is. Returns the group's value before."""
    group = optimizer.param_groups[0]
    before = group.get(hyper.key, hyper.off)
    group[hyper.key] = value
    if hyper.index >= 0:
        group[hyper.key] = (*before[: hyper.index], value, *before[hyper.index + 1 :])
    return before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_numbers_of_any_kind(kernels: Kernels, case: Case, kind: str) -> None:
    """Given to the constructor, then set in the group: they have the bits of the floats that they are equal to."""
    if kernels.slow and kind != "Decimal":
        pytest.skip("takes too long where programs take milliseconds")
    own = case.make(parameters([(1,)])).defaults
    first = {h.key: own[h.key] for h in case.cls.rule.row if h.key in inspect.signature(case.cls).parameters}
    first |= {"max_grad_norm": 0.7, "clip_grad_value": 0.011, "ema_decay": 0.9}
    betas = (0.8, 0.9, 0.99)[: len(own.get("betas", ()))]
    later = {"lr": 0.003, "weight_decay": 0.07, "betas": betas, "beta": 0.7, "momentum": 0.3, "ema_decay": 0.8}
    given = [{key: of_kind(kind, value) for key, value in options.items()} for options in (first, later)]
    dtypes = [torch.float32, torch.bfloat16] + [torch.float64] * (kernels.backend == "reference")
    dtypes = dtypes[:1] if case.own else dtypes
    optimizers = []
    for backend, as_given in ((kernels.backend, True), ("cpu", True), ("cpu", False)):
        at_first, then = given if as_given else map(as_floats, given)
        params = [p for dtype in dtypes for p in parameters([(33,), (5,)], dtype)]
        optimizers.append(case.make(params, backend=backend, **at_first))
        for step in range(3):
            set_gradients(params, step)
            optimizers[-1].step()
            group = optimizers[-1].param_groups[0]
            group.update({key: value for key, value in then.items() if key in group})
    assert_same_optimizers(optimizers[0], optimizers[1])
    assert_same_optimizers(optimizers[0], optimizers[2])


def beyond(hyper: Hyper) -> list[Any]:
    """Numbers that a step must refuse."""
    values: list[Any] = [math.nan, -math.inf, -1e39, np.float64("nan"), Decimal("nan"), torch.tensor(math.nan), 10**400]
    if hyper.optional and hyper.key != "ema_decay":
        return [*values, 0.0, -1.0, np.float32(0)]
    if hyper.accepts is BELOW_1:
        return [*values, 1.0, 1, True, -1e-3, np.float32(1), Decimal(1), Fraction(1), torch.tensor(1.0), 1e30]
    if hyper.accepts is AT_LEAST_0:
        values += [-1e-3, Decimal("-0.001"), torch.tensor(-1e-3)]
    values += [math.inf, 1e39, np.float32("inf"), Decimal("1e40"), 10**300]
    return values if hyper.accepts is FP32 else [*values, 1.1e18, torch.tensor(2e18)]


@pytest.mark.parametrize(("case", "hyper"), hypers())
def test_numbers_that_no_step_can_mean(kernels: Kernels, case: Case, hyper: Hyper) -> None:
    """Set in a group between steps: they raise, and nothing has changed."""
    mine, theirs, a, b = pair(kernels, case, [(5,)], torch.float32)
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    a.step()
    b.step()
    before = [t.detach().clone() for p in mine for t in (p, *a.state[p].values()) if t is not None]
    name = f"'{hyper.key}'" + (f"[{hyper.index}]" if hyper.index >= 0 else "")
    message = f"^parameter group 0: {re.escape(name)} is .*, but must be .*nothing was updated$"
    for value in beyond(hyper):
        for optimizer in (a, b):
            good = put(optimizer, hyper, value)
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            optimizer.param_groups[0][hyper.key] = good
    assert_unchanged([t.detach() for p in mine for t in (p, *a.state[p].values()) if t is not None], before)
    a.step()
    b.step()
    assert_same_optimizers(a, b)


@pytest.mark.parametrize(("case", "hyper"), hypers())
def test_the_ends_of_every_range(kernels: Kernels, case: Case, hyper: Hyper) -> None:
    """They are steps like others, and so is what torch.optim refuses in its constructors only."""
    if kernels.slow and case.optimizer not in ("Adam", "NormAdaptive"):
        pytest.skip("takes too long where programs take milliseconds")
    # A function raises nothing there; it would be compiled anew for other sides of its conditions.
    against = "reference" if case.own and kernels.backend == "reference" else "cpu"
    values = [hyper.accepts.low, hyper.accepts.high]
    values += [-0.5, 0.0] if hyper.accepts in (NUMBER, FP32) else [1e39, 1e-50] if hyper.optional else []
    for value in values:
        if value not in hyper.accepts:
            continue
        mine, theirs, a, b = pair(kernels, case, [(5,), (40,)][: 1 if kernels.slow else 2], torch.float32, against)
        for step in range(1 if kernels.slow else 2):
            set_gradients(mine, step)
            set_gradients(theirs, step)
            for optimizer in (a, b):
                put(optimizer, hyper, value)
                optimizer.step()
        assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", FULL, ids=str)
def test_scalars_of_the_largest_numbers_are_finite(kernels: Kernels, case: Case) -> None:
    """lr * weight_decay, and lr over a bias correction of one unit in the last place of 1."""
    both = []
    for backend in (kernels.backend, case.as_it_is.get("backend", "cpu")):
        params = parameters([(5,)])
        optimizer = case.make(params, backend=backend)
        group = optimizer.param_groups[0]
        group["lr"] = LARGEST
        group["weight_decay"] = LARGEST if group.get("decoupled_weight_decay") or "beta" in group else 0.0
        for key, value in {"beta": BELOW_1.high, "eps": 1.0, "momentum": 0.0}.items():
            if key in group:
                group[key] = value
        if "betas" in group:
            group["betas"] = (BELOW_1.high, 0.999, *group["betas"][2:])
        params[0].grad = torch.full((5,), 1e-12)
        optimizer.step()
        assert params[0].detach().isfinite().all()
        both.append(optimizer)
    assert_same_optimizers(*both)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"lr": 0.0}, {"weight_decay": 0.1}, ALL], ids=str)
def test_an_average_norm_of_zero_takes_no_step(kernels: Kernels, options: dict[str, Any]) -> None:
    """NormAdaptive with eps=0: a tensor whose gradients were all zeros stays as it is, but for its decay. A tensor that
    had others is divided by its average alone, and with eps the same tensor by more."""
    if kernels.slow and options not in ({}, ALL):
        pytest.skip("takes too long where programs take milliseconds")
    case = Case("norm_adaptive", "NormAdaptive", {**options, "eps": 0}, in_torch=False)
    mine, theirs = [], []
    for params in (mine, theirs):
        dtypes = DTYPES[::2] if kernels.slow else DTYPES
        params += [p for dtype in dtypes for p in parameters([(3,), (1030,), (7,), ()], dtype)]
    a, b = case.make(mine, backend=kernels.backend), case.make(theirs, backend="cpu")
    before = [p.detach().clone() for p in mine]
    for step in range(3):
        for params in (mine, theirs):
            for i, p in enumerate(params):
                still = i % 4 < 2 or (i % 4 == 2 and step == 0)
                p.grad = torch.zeros_like(p) * (-1) ** i if still else gradient(p, step, i) + 0.01
        a.step()
        b.step()
        assert_same_optimizers(a, b)
        for i, (p, old) in enumerate(zip(mine, before, strict=True)):
            if i % 4 < 2 or (i % 4 == 2 and step == 0):
                assert a.state[p]["avg_grad_norm"].item() == 0
                if "weight_decay" not in options:
                    assert_same_bits(p.detach(), old)
            elif options.get("lr") != 0.0:
                assert not torch.equal(p.detach(), old)
            assert p.detach().isfinite().all()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_default_device_is_not_asked(kernels: Kernels, case: Case) -> None:
    """Everything that an optimizer does, with a default device where nothing has a value."""
    if kernels.slow and case.optimizer != "AdamW":
        pytest.skip("takes too long where programs take milliseconds")
    steps = 2 if kernels.slow else 3

    def run(default: str | None) -> list[torch.Tensor]:
        memory = torch.zeros(24)
        views = [memory.view(6, 4)[:, :2], memory.view(6, 4)[:, 2:], torch.zeros(8).as_strided((3, 2), (2, 3))]
        params = [torch.nn.Parameter(v.copy_(gradient(v, 9, i))) for i, v in enumerate(views)]
        params += parameters([(5,), (3, 2)])
        grads = [[gradient(p, step, i) for i, p in enumerate(params)] for step in range(steps)]
        lr = torch.tensor(0.01)
        found: list[torch.Tensor] = []
        try:
            torch.set_default_device(default)
            optimizer = case.make(params[:3], backend=kernels.backend, **ALL)
            optimizer.add_param_group({"params": params[3:], "lr": lr})
            assert optimizer.skipped_steps.item() == 0
            for step in range(steps):
                for p, g in zip(params, grads[step], strict=True):
                    p.grad = g
                found.append(fusedoptim.clip_grad_norm_(params, 2.0, backend=kernels.backend))
                fusedoptim.clip_grad_value_(params, 0.5, backend=kernels.backend)
                optimizer.step()
                saved = copy.deepcopy(optimizer.state_dict())
                for state in saved["state"].values():
                    if "step" in state:
                        state["step"] = state["step"].item()
                optimizer.load_state_dict(saved)
            with optimizer.ema_weights():
                found += [p.detach().clone() for p in params]
            assert optimizer.memory().total > 0 and optimizer.last_grad_norm is not None
            found += [optimizer.last_grad_norm, optimizer.skipped_steps]
            found += [fusedoptim.reference.sum_of_squares(p) for p in params]
            found.append(fusedoptim.reference.global_norm(params))
            for p in params:
                p.grad = None
            found.append(fusedoptim.clip_grad_norm_(params, 2.0, backend=kernels.backend))
            fusedoptim.step_in_backward(case.make(params, backend=kernels.backend)).remove()
        finally:
            torch.set_default_device(None)
        return found + [t for p in params for t in (p.detach(), *optimizer.state[p].values()) if t is not None]

    for x, y in zip(run("meta"), run(None), strict=True):
        assert_same_bits(x, y)
