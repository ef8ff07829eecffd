"""What a rule's function becomes when it is traced: which programs there are, and what is refused, with which words."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from cases import CASES, parameters

import fusedoptim
from fusedoptim import FusedOptimizer, Rule, State, mean_square, norm, to_fp32
from fusedoptim._values import numbers
from fusedoptim.own_rules.nodes import Node, in_order
from fusedoptim.own_rules.programs import guard, program_of, programs_of
from fusedoptim.own_rules.refusals import RuleError
from fusedoptim.own_rules.trace import Program, trace

OUTSIDE = torch.ones(3)


def group_of(optimizer: FusedOptimizer, **more: Any) -> dict[str, Any]:
    return numbers({**optimizer.param_groups[0], **more}, optimizer.rule)


def program(function: Any, group: dict[str, Any] | None = None, mode: Any = None, **rule: Any) -> Program:
    """Of a rule with one state, unless it says otherwise. mode: what its group has, where the defaults have a text."""
    cls: Any = type("Mine", (FusedOptimizer,), {"rule": Rule("mine", function, **{"states": (State("m"),), **rule})})
    optimizer = cls(
        parameters([(3,)]),
        {"lr": 0.1, "beta": 0.9, "flag": False, "pair": (0.1, 0.2), **(group or {})},
        {},
    )
    return trace(optimizer.rule, group_of(optimizer, **({} if mode is None else {"mode": mode})))


def elements(p: Program) -> list[Node]:
    return [n for n in in_order([p.param, *p.new_states.values()]) if n.kind.is_element]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rule_of_the_package_can_be_traced(case: Any) -> None:
    optimizer = getattr(fusedoptim, case.optimizer)(parameters([(3,)]), **{**case.options, "backend": "reference"})
    found = trace(optimizer.rule, group_of(optimizer))
    assert found.param.op != "param" and found.fits(group_of(optimizer))


# ---- programs ----


def test_conditions_on_the_groups_values_choose_a_program() -> None:
    optimizer = fusedoptim.SGD(parameters([(3,)]), lr=0.1)
    groups = [group_of(optimizer, momentum=m, nesterov=n) for m, n in ((0, 0), (0.9, 0), (0.8, 0), (0.9, 1), (0, 0))]
    found = [program_of(optimizer.rule, group) for group in groups]
    assert found[1] is found[2] and found[0] is found[4]
    assert len({*found}) == 3 == len(programs_of(optimizer.rule, groups))
    for own, group in zip(found, groups, strict=True):
        assert [p.fits(group) for p in {*found}].count(True) == 1 and own.fits(group)
    assert program_of(optimizer.rule, {**groups[0], "lr": 5.0}) is found[0]  # as a schedule has it
    assert program_of(optimizer.rule, {**groups[0], "lr": torch.tensor(0.1)}) is not found[0]
    assert ("not", 0.0) in guard(found[0])


def test_conditions_on_what_changes_are_choices_within_a_program() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        if t == 1:
            s["m"].copy_(g)
        else:
            s["m"].lerp_(g, 0.1)
        p.add_(s["m"], alpha=-h["lr"] if h["lr"] < 1 else -1.0)

    found = program(function)
    assert not found.guards
    assert [n.op for n in elements(found)].count("choose") == 1  # the two rates are one choice of numbers
    numbers_chosen = [n for n in in_order([found.param]) if n.op == "choose" and not n.kind.is_element]
    assert len(numbers_chosen) == 1


def test_a_state_that_is_absent_at_first() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        if s["m"] is None:
            s["m"] = g.clone()
        s["m"].mul_(0.5)
        p.sub_(s["m"])

    found = program(function, states=(State("m", starts_absent=True),))
    assert [n.op for n in in_order([found.param])].count("first") == 1


def test_both_sides_may_return_early_and_min_and_max_are_choices() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        if t < 3:
            return
        p.sub_(g, alpha=min(h["lr"], 1 / t, 0.5))

    found = program(function)
    assert (found.param.op == "choose" and found.param.args[2].op == "param") or found.param.args[1].op == "param"


def test_equal_operations_are_one() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        a, b = g * g + s["m"], g * g + s["m"]
        p.sub_(a - b)

    assert [n.op for n in elements(program(function))].count("mul") == 1


def test_numbers_are_doubles_and_square_roots_of_math() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        x = math.sqrt(1 - h["beta"] ** t) * abs(h["pair"][1]) / -t + True
        p.sub_(g, alpha=to_fp32(x))

    found = [n.op for n in in_order([program(function).param])]
    assert found.count("sqrt") == 1 and found.count("fp32") == 1 and math.sqrt(4.0) == 2.0


def test_constants_are_values_that_are_no_numbers() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g.sign() if h["mode"] == "sign" else g)

    sign, plain = (program(function, {"mode": mode, "none": None}) for mode in ("sign", "plain"))
    assert "sign" in [n.op for n in elements(sign)] and "sign" not in [n.op for n in elements(plain)]
    assert guard(sign) != guard(plain)


def test_sums_are_counted_in_the_order_of_calls() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        size = norm(p) if t > 1 else norm(g)
        share = mean_square(s["m"] * g > 0)
        p.sub_(g, alpha=size / share if share > 0 else 1.0)

    found = program(function, sums=2)
    assert [n.op for n in found.sums] == ["choose", "where"]


# ---- what is refused ----


def writes(f: Any) -> Any:
    """A function that writes what f returns."""

    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.copy_(f(p, g, s, t, h))

    return function


REFUSED = {
    "exp": (lambda p, g, s, t, h: g.exp(), r"exp\(\) cannot be traced"),
    "log": (lambda p, g, s, t, h: torch.log(g), r"log\(\) cannot be traced"),
    "math.exp": (lambda p, g, s, t, h: g * math.exp(h["lr"]), r"float\(\), or a function of math.*double\(lr\)"),
    "random": (lambda p, g, s, t, h: torch.randn_like(p), r"randn_like\(\).*rounding='stochastic'"),
    "item": (lambda p, g, s, t, h: g * g.item(), r"item\(\).*one by one"),
    "float": (lambda p, g, s, t, h: g * float(h["lr"]), r"float\(\)"),
    "int": (lambda p, g, s, t, h: g * int(t), r"int\(\).*leave int\(\) out"),
    "matmul": (lambda p, g, s, t, h: p @ g, r"matmul\(\).*product of matrices"),
    "mm": (lambda p, g, s, t, h: torch.mm(p, g), r"mm\(\).*product of matrices"),
    "sum": (lambda p, g, s, t, h: g / g.sum(), r"sum\(\).*norm\(x\) and mean_square\(x\)"),
    "mean": (lambda p, g, s, t, h: g / g.mean(), r"mean\(\).*mean_square"),
    "max": (lambda p, g, s, t, h: g / g.max(), r"max\(\).*torch.maximum"),
    "torch norm": (lambda p, g, s, t, h: g / g.norm(), r"norm\(\).*fusedoptim.norm\(x\)"),
    "element": (lambda p, g, s, t, h: g[0], r"getitem\(\).*cannot look at another"),
    "setitem": (lambda p, g, s, t, h: g.__setitem__(0, 1), r"getitem\(\)"),
    "shape": (lambda p, g, s, t, h: g * g.shape[0], r"shape\(\).*whatever the shape is"),
    "dim": (lambda p, g, s, t, h: g if p.dim() > 1 else -g, r"dim\(\).*groups?"),
    "view": (lambda p, g, s, t, h: g.view(-1), r"view\(\)"),
    "numel": (lambda p, g, s, t, h: g / p.numel(), r"numel\(\).*mean_square"),
    "bool": (lambda p, g, s, t, h: g if g > 0 else p, r"a condition on elements.*torch.where"),
    "iterate": (lambda p, g, s, t, h: sum(g), r"getitem\(\)"),
    "outside": (lambda p, g, s, t, h: g * OUTSIDE, r"an operand of type torch.Tensor"),
    "other way": (lambda p, g, s, t, h: OUTSIDE * g, r"an operand of type torch.Tensor"),
    "dtype": (lambda p, g, s, t, h: g.to(torch.float64), r"a conversion to torch.float64"),
    "power": (lambda p, g, s, t, h: g**1.5, r"x \*\* n of elements.*one of 1, 2, 3"),
    "power of": (lambda p, g, s, t, h: 2.0**g, r"number \*\* elements"),
    "modulo": (lambda p, g, s, t, h: g if t % 2 else p, r"% of numbers"),
    "and": (lambda p, g, s, t, h: g if (t > 1) & (t < 3) else p, r"arithmetic with a condition.*`and`"),
    "condition times": (lambda p, g, s, t, h: g * (h["lr"] * (t > 2)), r"arithmetic with a condition"),
    "conditions compared": (lambda p, g, s, t, h: g if (t > 4) == (t > 5) else p, r"arithmetic with a condition"),
    "set": (lambda p, g, s, t, h: g if t in {1, 2} else p, r"a number in a set.*t == 1 or t == 2"),
    "dict": (lambda p, g, s, t, h: g * {4: 0.5}.get(t, 1.0), r"a number in a set or as a key"),
    "attribute": (lambda p, g, s, t, h: setattr(p, "grad", g), r"x.grad = .*[xX].copy_"),
    "dtype compared": (lambda p, g, s, t, h: g if p.dtype == torch.float32 else p, r"a comparison of dtypes"),
    "whether there is": (lambda p, g, s, t, h: g if "m" in s else p, r"whether there is a state.*`is None`"),
    "numbers alone": (lambda p, g, s, t, h: torch.where(g > 0, 1.0, 0.0), r"where\(mask, number, number\)"),
    "mask": (lambda p, g, s, t, h: torch.where(g, p, g), r"elements in the place of a mask"),
    "maximum number": (lambda p, g, s, t, h: torch.maximum(g, t), r"maximum\(\)"),
    "clamp": (lambda p, g, s, t, h: g.clamp(min=p), r"limits that are tensors"),
    "relu": (lambda p, g, s, t, h: torch.relu(g), r"relu\(\).*clamp\(min=0\)"),
    "foreach": (lambda p, g, s, t, h: torch._foreach_add([p], [g])[0], r"_foreach_add\(\)"),
    "arguments": (lambda p, g, s, t, h: p.add(g, beta=1), r"add\(\) with these arguments"),
    "group": (lambda p, g, s, t, h: g * h["momentum"], r"the group's 'momentum'.*'beta', 'flag', 'pair', 'pair'|'lr'"),
    "params": (lambda p, g, s, t, h: g * len(h["params"]), r"the group's 'params'"),
    "state": (lambda p, g, s, t, h: g * s["v"], r"the state 'v'.*it has m"),
    "nested norm": (lambda p, g, s, t, h: g * norm(g / norm(p)), r"norm\(\) of what depends on another"),
    "norm behind a norm": (lambda p, g, s, t, h: g * (norm(g) if norm(p) > 0 else 1), r"depends on another"),
    "unknown": (lambda p, g, s, t, h: g.bernoulli(), r"bernoulli\(\).*the guide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_with_the_line_and_a_remedy(name: str) -> None:
    f, message = REFUSED[name]
    with pytest.raises(RuleError, match=message) as caught:
        program(writes(f), sums=2)
    text = str(caught.value)
    assert re.search(r"\(test_rule_traces.py, line \d+: ", text), text
    assert f'"{name}": (lambda' in text or "p.copy_" in text
    assert text.endswith("Or pass backend='reference', to run it eagerly")


def replaced(function: Any, **rule: Any) -> str:
    with pytest.raises(RuleError) as caught:
        program(function, **rule)
    return str(caught.value)


def test_results_that_are_none_are_refused() -> None:
    assert "changes no parameter" in replaced(lambda p, g, s, t, h: None)
    assert "returns something" in replaced(lambda p, g, s, t, h: p - g)
    assert program(lambda p, g, s, t, h: p.sub_(g)).param.op == "sub"  # which returns p itself

    def set_to(name: str, value: Any) -> Any:
        def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
            p.sub_(g)
            s[name] = value

        return function

    assert "leaves the state 'm' as None" in replaced(set_to("m", None))
    assert "leaves the state 'm' as 1.0" in replaced(set_to("m", 1.0))
    assert "makes the states ['new']" in replaced(set_to("new", 1.0))
    assert "leaves 'n' as str" in replaced(set_to("n", "1"), numbers=(State("n"),))


def test_sums_have_to_be_declared() -> None:
    text = replaced(lambda p, g, s, t, h: p.sub_(g, alpha=norm(g) * mean_square(p)))
    assert "2 times" in text and "Rule(sums=2)" in text


def test_too_many_ways_are_refused() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        for k in range(7):
            p.mul_(2.0 if t > k else 3.0)

    assert "more than 64 ways" in replaced(function)


def test_a_loop_until_a_number_is_small_is_refused() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        while t > 3:
            t = t - 3
        p.sub_(g)

    assert "no loop until one holds" in replaced(function)


@pytest.mark.parametrize("start", [lambda t, h: h["beta"], lambda t, h: t])
@pytest.mark.parametrize("grow", [lambda x: x + x, lambda x: 0.5 - (0.5 - x)])
def test_conditions_that_are_long_chains_take_no_time(start: Any, grow: Any) -> None:
    """As guards they would be as long as their nodes are when they are written out, or as high."""

    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        x = start(t, h)
        for _ in range(200):
            x = grow(x)
        p.sub_(g, alpha=1.0 if x > 3 else 2.0)

    found = program(function)
    assert len(guard(found)) < 1100 and "choose" in [n.op for n in in_order([found.param])]
    assert len(repr(found.param)) < 1000


def test_a_short_condition_on_the_groups_values_is_a_guard() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        x = h["beta"]
        for _ in range(8):
            x = x + x
        p.sub_(g, alpha=1.0 if x > 3 else 2.0)

    found = program(function)
    assert len(guard(found)) > 500 and "choose" not in [n.op for n in in_order([found.param])]


def test_choices_of_long_chains_of_elements() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        x = g
        for _ in range(1000):
            x = x * (0.9 if t > 2 else 0.8) + 0.1
        p.sub_(x)

    assert "choose" in [n.op for n in in_order([program(function).param])]


def test_long_chains_of_numbers_take_no_time() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        x = h["beta"] if t > 2 else h["pair"][0]
        for _ in range(40):
            x = x * (1.5 - 0.5 * x * x)
        p.sub_(g, alpha=x)

    assert len(in_order([program(function).param])) < 300


@pytest.mark.parametrize("view", [lambda p: p.detach(), lambda p: p.to(p.dtype), lambda p: +p, lambda p: p.data])
def test_what_is_written_to_a_view_is_written_to_the_tensor(view: Any) -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        view(p).sub_(g)

    def copies(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.clone().sub_(g)

    assert program(function).param.op == "sub"
    assert "changes no parameter" in replaced(copies)


def test_masks_may_be_written_in_place() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        mask = p > 0
        same = mask
        mask &= g > 0
        p.sub_(torch.where(same, g, 0.0))

    assert "and" in [n.op for n in elements(program(function))]


def test_data_that_is_replaced_is_that_of_no_view_from_before() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        before, half = p.data, p * 0.5
        p.detach().data = g  # of the view alone
        p.data = half
        before.mul_(3.0)
        half.sub_(g)
        p.add_(s["m"])

    found = elements(program(function))
    assert [n.op for n in found if n.op not in ("param", "grad", "state")] == ["spread", "mul", "sub", "add"]


def test_data_is_the_tensor() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.data = p * 0.5
        p.data.sub_(g)

    assert program(function).param.op == "sub"


def test_a_refusal_that_the_function_catches_is_one() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        try:
            p.sub_(g.exp())
        except Exception:
            p.sub_(g)

    assert "exp() cannot be traced" in replaced(function)
    assert program(lambda p, g, s, t, h: p.sub_(g)).param.op == "sub"


def test_an_error_of_the_function_is_its_own() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        program(lambda p, g, s, t, h: p.sub_(g, alpha=int("one")))


def test_a_state_that_is_never_written_stays() -> None:
    found = program(lambda p, g, s, t, h: p.sub_(s["m"]))
    assert found.new_states["m"].op == "state"


def test_rules_are_found_by_what_they_are() -> None:
    one, two = (Rule("same", lambda p, g, s, t, h: None) for _ in range(2))
    assert one != two and dataclasses.replace(one) == one and hash(dataclasses.replace(one)) == hash(one)
