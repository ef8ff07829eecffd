"""What stands for tensors and numbers in a trace: Python's and torch's ways to ask for more than operations are right,
or refused with a line of the function."""

from __future__ import annotations

import copy
import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same_optimizers, parameters, set_gradients
from test_rule_traces import elements, program, writes
from torch import Tensor

from fusedoptim import FusedOptimizer, Rule, State, norm
from fusedoptim.own_rules import compiler, programs, refusals
from fusedoptim.own_rules.nodes import in_order
from fusedoptim.own_rules.refusals import RuleError
from fusedoptim.rule_functions import double

M = "m"
#: By what is refused: what does it, and what is said.
REFUSED: dict[str, Any] = {
    "mask times number": (lambda p, g, s, t, h: (g > 0) * 0.1, r"mul\(\) of masks.*torch.where\(mask, a, b\)"),
    "mask times t": (lambda p, g, s, t, h: (g > 0) * t, r"mul\(\) of masks"),
    "masks added": (lambda p, g, s, t, h: ((g > 0) + (p > 0)) * g, r"add\(\) of masks"),
    "masks multiplied": (lambda p, g, s, t, h: (g > 0) * (p > 0) * g, r"mul\(\) of masks"),
    "masks subtracted": (lambda p, g, s, t, h: (g > 0) - (p > 0), r"sub\(\) of masks"),
    "mask subtracted": (lambda p, g, s, t, h: g - (p > 0), r"sub\(\) of a mask"),
    "lerp of a mask": (lambda p, g, s, t, h: torch.lerp(g, p > 0, 0.5), r"lerp\(\) of a mask"),
    "mask negated": (lambda p, g, s, t, h: -(g > 0), r"neg\(\) of masks"),
    "mask divided": (lambda p, g, s, t, h: 1 / (g > 0), r"number / x\(\) of masks"),
    "mask like": (lambda p, g, s, t, h: torch.full_like(g > 0, 0.5), r"full_like\(\) of masks"),
    "mask compared": (lambda p, g, s, t, h: torch.where((g > 0) < 0.5, p, g), r"comparison of a mask with a number"),
    "mask filled": (lambda p, g, s, t, h: torch.where((g > 0).masked_fill(p > 0, 0), p, g), r"mask & ~other"),
    "mask or number": (lambda p, g, s, t, h: torch.where(g > 0, p > 0, 0.0), r"where\(mask, mask, number\)"),
    "dtype of a mask": (lambda p, g, s, t, h: g.to((g > 0).dtype), r"the dtype of a mask"),
    "like a mask": (lambda p, g, s, t, h: g.type_as(g > 0), r"conversion to a mask"),
    "dtype told": (lambda p, g, s, t, h: torch.zeros_like(g, dtype=torch.float64), r"zeros_like\(dtype=torch.float64"),
    "dtype of full": (lambda p, g, s, t, h: torch.full_like(g, 0.1, dtype=torch.float32), r"leave dtype= out"),
    "device told": (lambda p, g, s, t, h: torch.ones_like(g, device="cpu"), r"ones_like\(device=...\)"),
    "out of others": (lambda p, g, s, t, h: torch.add(g, g, out=torch.ones(3)), r"out=... with another tensor|out="),
    "modulo": (lambda p, g, s, t, h: g % 2, r"mod\(\).*elements have"),
    "floor division": (lambda p, g, s, t, h: g // 2, r"floordiv\(\).*elements have"),
    "divmod": (lambda p, g, s, t, h: divmod(g, 2)[1], r"floordiv\(\)"),
    "number's divmod": (lambda p, g, s, t, h: g * divmod(t, 2)[1], r"% or // of numbers"),
    "shift": (lambda p, g, s, t, h: g << 1, r"shift\(\).*multiply by a power of 2"),
    "product": (lambda p, g, s, t, h: OUTSIDE @ g, r"matmul\(\)"),
    "rounded": (lambda p, g, s, t, h: round(g), r"round\(\)"),
    "rounded number": (lambda p, g, s, t, h: g * round(t, 1), r"rounding of a number"),
    "len": (lambda p, g, s, t, h: g * len(g), r"size\(\).*whatever the shape is"),
    "within": (lambda p, g, s, t, h: g if 1.0 in g else p, r"getitem\(\)"),
    "float of elements": (lambda p, g, s, t, h: g * float(g), r"item\(\)"),
    "written by index": (lambda p, g, s, t, h: g.__setitem__(slice(None), 1), r"getitem\(\)"),
    "square root": (lambda p, g, s, t, h: g * math.pow(t, 0.5), r"function of math.*\*\* 0.5"),
    "text": (lambda p, g, s, t, h: s[f"m{t}"], r"the text of a symbol"),
    "printed": (lambda p, g, s, t, h: print(g), r"the text of a symbol.*print"),
    "text of a condition": (lambda p, g, s, t, h: g * len(str(t > 1)), r"the text of a symbol"),
    "device": (lambda p, g, s, t, h: g * (g.device.index or 0), r"device\(\)"),
    "gradient": (lambda p, g, s, t, h: p.grad * 2, r"grad\(\).*as such"),
    "dtype as a key": (lambda p, g, s, t, h: g * {torch.float32: 1.0}[g.dtype], r"a dtype in a set or as a key"),
    "epsilon": (lambda p, g, s, t, h: g * torch.finfo(g.dtype).eps, r"symbol cannot be traced.*finfo"),
    "unbound": (lambda p, g, s, t, h: Tensor.__add__(g, 1), r"symbol cannot be traced"),
    "complex": (lambda p, g, s, t, h: g * max(t - 100, -5.0) ** 0.5, r"a complex number.*abs\(x\)|complex"),
    "complex number": (lambda p, g, s, t, h: g * (h["lr"] * (-5.0) ** 0.5), r"a complex number.*max\(x, 0.0\)"),
    "array": (lambda p, g, s, t, h: np.ones(3) * g, r"an operand of type numpy.ndarray"),
    "numpy": (lambda p, g, s, t, h: np.sqrt(g), r"symbol cannot be traced.*Elements"),
    "option": (lambda p, g, s, t, h: g * (h.get("max_grad_norm") or 1), r"the group's 'max_grad_norm'.*can read"),
    "keys": (lambda p, g, s, t, h: g * len(h), r"a loop over a group's keys"),
    "large integer": (lambda p, g, s, t, h: g * (t + (2**53 + 1)), r"an integer that no double is"),
    "larger integer": (lambda p, g, s, t, h: g * 10**400, r"an integer that no double is.*1e20"),
    "no operand": (lambda p, g, s, t, h: g.add(alpha=2), r"add\(\) with these arguments.*'other'"),
    "foreign in place": (lambda p, g, s, t, h: torch.add(OUTSIDE, g, out=p), r"an operand of type torch.Tensor"),
}
OUTSIDE = torch.ones(3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_right_is_refused(name: str) -> None:
    f, message = REFUSED[name]
    with pytest.raises(RuleError, match=message) as caught:
        program(writes(f))
    text = str(caught.value)
    assert re.search(r"\(test_rule_(symbols|traces).py, line \d+: ", text), text
    assert text.endswith("backend='reference', to run it eagerly")


def test_roots_of_math_are_pythons_own_again() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        with torch.no_grad():
            p.sub_(g, alpha=math.sqrt(t))

    before = math.sqrt
    program(function)
    assert math.sqrt is before


def test_members_of_a_tuple_are_compared() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g if t in (1, 2) else -g)

    assert [n.op for n in in_order([program(function).param])].count("eq") == 2


def test_a_copy_has_the_same_memory() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        copy.copy(p).sub_(g)
        copy.deepcopy(p).mul_(2.0)

    assert program(function).param.op == "sub"


def test_operations_of_numpys_numbers_are_those_of_pythons() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(np.float64(0.3) * g, alpha=np.float64(0.1) * t)

    assert "mul" in [n.op for n in elements(program(function))]


# ---- lines ----


def removes(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g)
    del s[M]


def makes(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g)
    s["new"] = g


def leaves_a_tensor(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g)
    s["n"] = s["n"] + h["lr"]


def leaves_a_mask(p: Any, g: Any, s: Any, t: Any, h: Any, more: float = 1.0) -> None:
    p.sub_(g)
    s[M] = OUTSIDE


@pytest.mark.parametrize("function", [removes, makes, leaves_a_tensor, functools.partial(leaves_a_mask, more=2.0)])
def test_what_is_found_at_the_end_is_told_of_the_functions_first_line(function: Any) -> None:
    with pytest.raises(RuleError) as caught:
        program(function, {"lr": torch.tensor(0.1)}, numbers=(State("n"),))
    name = getattr(function, "func", function).__name__
    assert re.search(rf"\(test_rule_symbols.py, line \d+: def {name}\(", str(caught.value)), str(caught.value)


def test_a_state_that_is_absent_has_to_be_asked_for() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        if t == 1:
            s["z"] = g.clone()
        else:
            s["z"].add_(g)
        p.sub_(s["z"])

    with pytest.raises(RuleError, match=r"takes 'z' for tensors in a step that may be .*`if s\[name\] is None`"):
        program(function, states=(State("z", starts_absent=True),))


def test_files_beside_the_tracers_and_torchs_folder_are_the_functions() -> None:
    for folder in refusals._FOLDERS:
        assert refusals._is_ours(f"{folder}x.py") and not refusals._is_ours(f"{folder[:-1]}_more/x.py")


def clipped(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g if h["clip"] is None else g.clamp(max=h["clip"]), alpha=h["lr"])


class Clipped(FusedOptimizer):
    rule = Rule("clipped", clipped)

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, "clip": None}, options)  # type: ignore[arg-type]


@pytest.mark.skipif(compiler.problem() is not None, reason="rules cannot be compiled here")
def test_a_number_may_be_none_for_some_steps() -> None:
    both = []
    for backend in ("cpu", "reference"):
        optimizer = Clipped(parameters([(5,), (3, 4)]), backend=backend)
        for k, clip in enumerate((None, 0.5, 0.25, None, -0.5, 1)):
            set_gradients(optimizer.param_groups[0]["params"], k)
            optimizer.param_groups[0]["clip"] = clip
            optimizer.step()
        optimizer.param_groups[0]["clip"] = -1.0
        with pytest.raises(ValueError, match=r"'clip' is -1.0, but must be above -1"):
            optimizer.step()
        both.append(optimizer)
    assert_same_optimizers(*both)
    (found,) = programs._known[clipped].values()
    assert len(found) == 2


# ---- a learning rate that is a tensor ----


def of_the_rate(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    """Numbers that are halfway between two of bf16, fp16 and fp32."""
    lr, c = h["lr"], h["c"]
    p.sub_(g, alpha=lr + 0.3).mul_(1.001 - lr).add_(g, alpha=lr - 0.7867490956842902).add_(c - lr).sub_(lr + c)
    p.add_(g, alpha=norm(g) + lr - t / 7).add_(g * (lr * 0.3)).sub_(lr / 7.0 + 0.1 / lr)
    if lr < 0.1:
        p.mul_(0.9)
    if lr == 0.3:
        p.mul_(0.8)
    if 0.2 >= lr:
        p.mul_(0.7)
    if lr != c:
        p.mul_(0.6)
    p.sub_(g, alpha=max(lr, 0.2) - 0.05 + min(0.7, lr) * 0.3)
    s["n"] = s["n"] + double(lr)


class OfTheRate(FusedOptimizer):
    rule = Rule("of the rate", of_the_rate, numbers=(State("n"),), sums=1)

    def __init__(self, params: Any, lr: Any, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "c": 0.1}, options)


@pytest.mark.skipif(compiler.problem() is not None, reason="rules cannot be compiled here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_numbers_beside_a_rate_that_is_a_tensor_have_its_dtype(dtype: torch.dtype) -> None:
    for lr in (torch.float32, torch.float64, torch.bfloat16, torch.float16, None):
        both = []
        for backend in ("cpu", "reference"):
            params = parameters([(5,), (3, 4)], dtype)
            rate: Any = 0.1 if lr is None else torch.tensor(0.1, dtype=lr)
            optimizer = OfTheRate(params, rate, backend=backend)
            for k, value in enumerate((0.1, 0.3, 0.2, 0.7, 1.1328125, 0.05)):
                set_gradients(params, k)
                if lr is None:
                    optimizer.param_groups[0]["lr"] = value
                else:
                    rate.fill_(value)
                optimizer.step()
            both.append(optimizer)
        assert_same_optimizers(*both)
