"""What rules of users may rely on, compiled or not: numbers, states that groups need, declarations."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import assert_same_bits, assert_same_optimizers, parameters, set_gradients
from ranks import run
from sharded_models import mesh

from fusedoptim import FusedOptimizer, Rule, State, norm

Function = Callable[[torch.Tensor, torch.Tensor, dict[str, Any], float, Any], None]


def optimizer_class(function: Function, defaults: dict[str, Any] | None = None, **rule: Any) -> Any:
    class Mine(FusedOptimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            own = {"lr": 0.1, **(defaults or {})}
            super().__init__(params, own | {k: options.pop(k) for k in own if k in options}, options)

    Mine.rule = Rule(f"{function.__name__} of a user", function, **rule)
    return Mine


def stepped(cls: Any, groups: list[dict[str, Any]], backend: str | None, change: Any = None) -> FusedOptimizer:
    params = parameters([(7, 11), (65,)] * len(groups))
    made = [{"params": params[2 * k : 2 * k + 2], **group} for k, group in enumerate(groups)]
    optimizer: FusedOptimizer = cls(made, backend=backend)
    for step in range(5):
        if change is not None and step == 2:
            change(optimizer)
        set_gradients(params, step)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
    return optimizer


def is_equal(cls: Any, groups: list[dict[str, Any]], change: Any = None) -> None:
    compiled, function = (stepped(cls, groups, backend, change) for backend in (None, "reference"))
    assert [type(r).__name__ for r in compiled._runners or ()] == ["OwnCpuRunner"]
    assert_same_optimizers(compiled, function)


# ---- numbers ----


def test_numbers_are_those_of_c_in_the_function_too() -> None:
    def edges(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        s["count"] = s["count"] + h["lr"] / (t - 2)  # infinite in the second step, NaN or infinite from then on
        huge = 10 ** (t * 200)  # from the second step on
        root = (t - 3) ** 0.5 if t != 2 else -1 / h["zero"]  # NaN at first
        p.add_(g.sign(), alpha=min(5.0, 1 / huge)).add_(g, alpha=1 / (1 / (h["zero"] * t)))
        p.copy_(torch.where(g > 0.5, p * root, torch.where(g < -0.5, p * s["count"], p)))

    cls = optimizer_class(edges, {"zero": 0.0}, numbers=(State("count"),))
    is_equal(cls, [{}, {"zero": -0.0}])


# ---- states that some groups need ----


def momentum(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    if h["momentum"] != 0:
        s["buffer"].mul_(h["momentum"]).add_(g)
        s["size"] = s["size"] * 0.5 + h["momentum"]
        g = s["buffer"] * s["size"]
    p.add_(g, alpha=-h["lr"])


MOMENTUM = {
    "states": (State("buffer", needed=lambda group: group["momentum"] != 0),),
    "numbers": (State("size", needed=lambda group: group["momentum"] != 0),),
}


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0, 0.5)], ids=str)
def test_groups_may_need_other_states(momenta: tuple[float, ...]) -> None:
    def switch(optimizer: FusedOptimizer) -> None:
        groups = optimizer.param_groups
        groups[0]["momentum"], groups[1]["momentum"] = groups[1]["momentum"], groups[0]["momentum"]

    is_equal(optimizer_class(momentum, {"momentum": 0.0}, **MOMENTUM), [{"momentum": m} for m in momenta], switch)


def test_a_state_that_the_group_does_not_have_is_no_state_to_the_function() -> None:
    def forgets(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        s["buffer"].mul_(h["momentum"]).add_(g)
        p.add_(s["buffer"], alpha=-h["lr"])

    cls = optimizer_class(forgets, {"momentum": 0.0}, **MOMENTUM)
    with pytest.raises(TypeError, match=r"the state 'buffer'"):
        stepped(cls, [{}], None)
    with pytest.raises(KeyError, match="buffer"):
        stepped(cls, [{}], "reference")


# ---- constants ----


def test_constants_of_equal_value_and_another_type_have_programs_of_their_own() -> None:
    def typed(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        first = h["mode"][0]
        p.add_(g, alpha=-h["lr"] * (1.0 if first is True else 2.0 if isinstance(first, int) else 3.0 + first))
        p.copysign_(torch.ones_like(p) * first)  # -0.0 has a sign

    modes = [(True, "x"), (1, "x"), (0.0, "x"), (-0.0, "x")]
    is_equal(optimizer_class(typed, {"mode": modes[0]}), [{"mode": mode} for mode in modes])


def chosen(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.add_(g, alpha=-h["lr"] / len(h["letters"]))


def test_more_programs_than_a_plan_has_are_refused() -> None:
    cls = optimizer_class(chosen, {"letters": "a"})
    groups = [{"letters": "a" * (k + 1)} for k in range(65)]
    with pytest.raises(UserWarning, match="its groups need 65 programs, and 64 are the most"):
        stepped(cls, groups, None)
    with pytest.raises(RuntimeError, match="65 programs"):
        stepped(cls, groups, "cpu")


# ---- declarations ----


def test_lists_are_as_good_as_tuples() -> None:
    rule = Rule("listed", momentum, states=[State("m")], numbers=[State("n")])  # type: ignore[arg-type]
    assert rule == Rule("listed", momentum, states=(State("m"),), numbers=(State("n"),))
    assert hash(rule) == hash(Rule("listed", momentum, states=(State("m"),), numbers=(State("n"),)))


@pytest.mark.parametrize("wrong", [{"states": ("exp_avg",)}, {"numbers": ["exp_avg"]}], ids=str)
def test_a_state_is_no_text(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"rule 'mine' has the state 'exp_avg': write State\('exp_avg'\)"):
        Rule("mine", momentum, **wrong)


def test_a_rule_has_a_function() -> None:
    with pytest.raises(TypeError, match="the second argument is the function of the update"):
        Rule("mine", (State("m"),))  # type: ignore[arg-type]


def test_every_group_has_a_learning_rate() -> None:
    class Mine(FusedOptimizer):
        rule = Rule("mine", momentum)

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"momentum": 0.9}, {})

    with pytest.raises(ValueError, match=r"the defaults of rule 'mine' have no 'lr': give them one"):
        Mine(parameters([(3,)]))


def undeclared_state(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g)
    s["m"] = g.clone()


def undeclared_number(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g)
    s["n"] = h["lr"] * 2


def undeclared_sum(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    p.sub_(g, alpha=norm(g))


@pytest.mark.parametrize(
    "function, message",
    [
        (undeclared_state, "'m'"),
        (undeclared_number, "'n'"),
        (undeclared_sum, r"sums=1"),
    ],
    ids=["state", "number", "sum"],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_is_not_declared_is_refused_and_nothing_changes(
    function: Function, message: str, backend: str | None
) -> None:
    params = parameters([(5,)])
    before = params[0].detach().clone()
    optimizer = optimizer_class(function)(params, backend=backend)
    set_gradients(params, 0)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same_bits(params[0].detach(), before)
    assert not optimizer.state


# ---- norms behind norms: refused where they would be compiled ----


def behind(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
    ratio = 1 / (1 + norm(g)) if norm(p) > 0 else 1.0
    p.add_(g, alpha=-h["lr"] * ratio)


def on_ranks() -> list[torch.Tensor]:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.zeros(4, 2)
    whole[0] = 1  # the second rank's part has another norm, which would choose the other side
    param = torch.nn.Parameter(distribute_tensor(whole, mesh(2), [Shard(0)]))
    optimizer = optimizer_class(behind, sums=2)([param], backend="reference")
    for _ in range(2):
        param.grad = distribute_tensor(torch.ones(4, 2), mesh(2), [Shard(0)])
        optimizer.step()
    return [param.full_tensor().detach()]


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_the_function_has_norms_of_whole_tensors_behind_norms() -> None:
    expected = torch.zeros(4, 2)
    expected[0] = 1
    param = torch.nn.Parameter(expected)
    optimizer = optimizer_class(behind, sums=2)([param], backend="reference")
    for _ in range(2):
        param.grad = torch.ones(4, 2)
        optimizer.step()
    for (found,) in run(2, on_ranks):
        assert_same_bits(found, param.detach())


# ---- what a trace must not know, and must not keep ----


def test_whether_a_group_has_another_key_is_not_to_be_asked() -> None:
    """A scheduler adds initial_lr: a program that was made without would be used with it."""

    def base(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g, alpha=h.get("initial_lr", h["lr"]))

    def asks(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g, alpha=0.5 if "initial_lr" in h else 1.0)

    def known(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g, alpha=h.get("momentum", 0.5) if "momentum" in h else 1.0)

    for function in (base, asks):
        for scheduled in (False, True):
            optimizer = optimizer_class(function)(parameters([(3,)]))
            if scheduled:
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1)
            set_gradients(optimizer.param_groups[0]["params"], 0)
            with pytest.raises(TypeError, match=r"the group's 'initial_lr' cannot be traced.*can read 'lr'"):
                optimizer.step()
    is_equal(optimizer_class(known, {"momentum": 0.9}), [{}])


def test_a_refusal_keeps_no_parameter_alive() -> None:
    def refused(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g.exp())

    params = parameters([(3,)])
    optimizer = optimizer_class(refused)(params)
    set_gradients(params, 0)
    with pytest.raises(TypeError, match="exp"):
        optimizer.step()
    kept = weakref.ref(params[0])
    del optimizer, params
    gc.collect()
    assert kept() is None


def test_numbers_of_pythons_own_are_errors_in_the_function_alone() -> None:
    def root(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.add_(g, alpha=-h["lr"] * min(1.0, 1 / math.sqrt(t - 1)))

    def literal(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g, alpha=1.0 / max(h["lr"] - t, 0.0))

    params = parameters([(3,)])
    expected = params[0].detach() - 0.1 * torch.ones(3)
    optimizer = optimizer_class(root)(params)
    params[0].grad = torch.ones(3)
    optimizer.step()  # 1 / 0 is infinite
    assert_same_bits(params[0].detach(), expected)
    with pytest.raises(ZeroDivisionError):
        stepped(optimizer_class(root), [{}], "reference")
    with pytest.raises(TypeError, match=r"test_own_contract.py, line \d+: p.sub_.*division by zero. Ask .*if d > 0"):
        stepped(optimizer_class(literal), [{}], None)


def test_constants_are_what_they_are_in_the_function() -> None:
    pair = namedtuple("pair", "x y")

    def named(p: Any, g: Any, s: Any, t: Any, h: Any) -> None:
        p.sub_(g, alpha=h["lr"] * h["mode"].x)

    stepped(optimizer_class(named, {"mode": pair(2.0, "a")}), [{}], "reference")
    with pytest.raises(TypeError, match="the group's 'mode' is pair"):
        stepped(optimizer_class(named, {"mode": pair(2.0, "a")}), [{}], None)


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, *arguments: Any) -> None: ...


class Slotted:
    __slots__ = ()

    def __call__(self, *arguments: Any) -> None: ...


@pytest.mark.parametrize("function", [Unhashable(), Slotted()], ids=["no hash", "no weak reference"])
def test_functions_that_no_program_can_be_known_by_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"programs are known by their function, .* pass a plain one"):
        Rule("mine", function)


def test_a_text_is_not_several_names() -> None:
    with pytest.raises(TypeError, match=r"constants='mode'\): several of them are a tuple, \('mode',\)"):
        Rule("mine", momentum, constants="mode")  # type: ignore[arg-type]
    cls = optimizer_class(chosen, {"letters": None})
    with pytest.raises(ValueError, match=r"Invalid letters: 'abc' .*if its values are none, name it in Rule\(con"):
        cls([{"params": parameters([(3,)]), "letters": "abc"}])
    is_equal(optimizer_class(chosen, {"letters": None}, constants=["letters"]), [{"letters": "abc"}])
