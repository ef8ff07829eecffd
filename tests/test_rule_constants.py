"""What of a group is no number to a rule's function, and what is None."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any

import pytest
import torch
from cases import parameters
from test_rule_traces import OUTSIDE, elements, group_of, program, replaced

from fusedoptim import FusedOptimizer, Rule, State
from fusedoptim._rule import AT_LEAST_0, Hyper
from fusedoptim.own_rules.programs import guard, program_of
from fusedoptim.own_rules.refusals import RuleError
from fusedoptim.own_rules.trace import constants_of


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, object(), (1, [2]), OUTSIDE, len],
    ids=["list", "dict", "object", "list in a tuple", "tensor", "function"],
)
def test_constants_that_may_change_are_refused(value: Any) -> None:
    with pytest.raises(RuleError, match=r"the group's 'mode' is .*Keep all else outside of the group"):
        program(lambda p, g, s, t, h: p.sub_(g), {"mode": "x", "none": None}, mode=value)


def test_constants_are_told_apart_by_their_types() -> None:
    class Kind(Enum):
        A, B = 1, 2

    values = ["x", None, True, 1, 1.0, 0.0, -0.0, (1,), (True,), ("x", (None,)), torch.float32, Kind.A, Kind.B]
    rule = Rule("r", lambda *_: None, constants=("mode",))
    assert len({constants_of(rule, {"mode": value}) for value in values}) == len(values)
    assert constants_of(rule, {"mode": math.nan}) == constants_of(rule, {"mode": float("nan")})


def test_what_is_none_by_default_is_a_number_that_is_off() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g if h["clip"] is None else g.clamp(max=h["clip"]))

    defaults = {"lr": 0.1, "clip": None, "mode": None}
    cls: Any = type(
        "Mine", (FusedOptimizer,), {"rule": Rule("mine", function, states=[State("m")], constants=["mode"])}
    )
    optimizer = cls(parameters([(3,)]), defaults, {})
    assert optimizer.param_groups[0]["clip"] is None and optimizer.rule.constants == ("mode",)
    off, one, two = (program_of(optimizer.rule, group_of(optimizer, clip=clip)) for clip in (None, 0.5, 0.0))
    assert off is not one and one is two and guard(off) != guard(one)
    assert "where" in [n.op for n in elements(one)] and "where" not in [n.op for n in elements(off)]
    with pytest.raises(ValueError, match=r"above -1 and at most 1e\+18, or else declared with Rule\(hyper=...\)"):
        optimizer.add_param_group({"params": parameters([(2,)]), "clip": -1.0})


def test_none_and_minus_1_do_not_go_together() -> None:
    def function(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g if h["clip"] is None else g * h["clip"])

    assert "leave that out" in replaced(function, group={"clip": None}, hyper=(Hyper("clip", optional=True, off=None),))
    assert "does not say off=None" in replaced(
        function, group={"clip": None}, hyper=(Hyper("clip", optional=True, accepts=AT_LEAST_0),)
    )
    found = program(function, {"clip": None}, hyper=(Hyper("clip", optional=True, off=None, accepts=AT_LEAST_0),))
    assert found.param.op == "sub"
