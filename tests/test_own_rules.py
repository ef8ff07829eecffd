"""Rules that a user declares: their functions are compiled, or step parameters themselves."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from cases import assert_same_bits, assert_same_optimizers, parameters, set_gradients

from fusedoptim import SGD, AdamW, FusedOptimizer, Rule, State, reference


def lion(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    """Lion (arXiv:2302.06675)."""
    beta1, beta2 = h["betas"]
    p.mul_(1 - h["lr"] * h["weight_decay"])
    p.add_(s["exp_avg"].lerp(g, 1 - beta1).sign(), alpha=-h["lr"])
    s["exp_avg"].lerp_(g, 1 - beta2)


class Lion(FusedOptimizer):
    rule = Rule("lion of a user", lion, states=(State("exp_avg"),))

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0, **o: Any):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, o)


def steps_of(
    cls: Any, shapes: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[torch.nn.Parameter], FusedOptimizer]:
    params = parameters(shapes, dtype)
    optimizer = cls(params, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_it_is_compiled_and_has_the_functions_bits(dtype: torch.dtype) -> None:
    shapes = [(7, 11), (300,), (0,), (), (33, 65)]
    compiled, function = (
        steps_of(Lion, shapes, 4, dtype, lr=0.01, weight_decay=0.1, backend=b)[1] for b in (None, "reference")
    )
    assert [type(r).__name__ for r in compiled._runners or ()] == ["OwnCpuRunner"]
    assert_same_optimizers(compiled, function)


def test_the_function_is_what_is_stepped() -> None:
    mine, theirs = parameters([(7, 11), (300,)]), parameters([(7, 11), (300,)])
    momenta = [torch.zeros_like(p) for p in theirs]
    optimizer = Lion(mine, lr=0.01, weight_decay=0.1)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(theirs, momenta, strict=True):
                assert p.grad is not None
                lion(p, p.grad, {"exp_avg": m}, step + 1, optimizer.param_groups[0])
    for p, q, m in zip(mine, theirs, momenta, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(optimizer.state[p]["exp_avg"], m)


def test_groups_with_other_values_dtypes_and_options_are_stepped_side_by_side() -> None:
    """Four programs, of which a schedule chooses others later."""

    def made(backend: str | None) -> tuple[list[torch.nn.Parameter], FusedOptimizer]:
        params = [*parameters([(7, 11), (300,), (1100,)]), *parameters([(40,), (3, 5)], torch.bfloat16)]
        groups = [
            {"params": params[:1]},
            {"params": params[1:2], "momentum": 0.5, "nesterov": True},
            {"params": params[2:4], "momentum": 0.9, "ema_decay": 0.9, "mode": "sign"},
            {"params": params[4:], "lr": 0.5, "max_grad_norm": 0.1, "state_dtype": torch.float32, "momentum": 0.5},
        ]
        return params, Momentum(groups, backend=backend, zero_grad_in_step=True)

    runs = []
    for backend in (None, "reference"):
        params, optimizer = made(backend)
        for step in range(6):
            set_gradients(params, step)
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.param_groups[1]["momentum"] = 0.5 if step < 3 else 0.0
            optimizer.param_groups[3]["mode"] = "plain" if step < 4 else "sign"
            optimizer.step()
        runs.append(optimizer)
    assert_same_optimizers(*runs)


def momentum(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
    if h["mode"] == "sign":
        g = g.sign()
    if h["momentum"] != 0:
        s["buffer"].mul_(h["momentum"]).add_(g)
        g = g.add(s["buffer"], alpha=h["momentum"]) if h["nesterov"] else s["buffer"]
    p.sub_(g * (h["lr"] if t > 2 else h["lr"] / 2))


class Momentum(FusedOptimizer):
    rule = Rule("momentum of a user", momentum, states=(State("buffer", needed=lambda group: group["momentum"] != 0),))

    def __init__(self, params: Any, lr: Any = 0.1, momentum: float = 0.0, **o: Any):
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": False, "mode": "plain"}, o)


def test_a_schedule_makes_nothing_anew() -> None:
    _, optimizer = steps_of(Momentum, [(300,)], 2, momentum=0.9)
    (runner,) = optimizer._runners or ()
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[0]["momentum"] = 0.9 - 0.1 * step
        optimizer.step()
        assert optimizer._runners == [runner]
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert optimizer._runners != [runner]


def test_pickles_and_copies_of_a_users_class() -> None:
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        params, optimizer = steps_of(Momentum, [(300,)], 2, momentum=0.9)
        model = torch.nn.ParameterList(params)
        others, other = duplicate((model, optimizer))
        assert other.rule == optimizer.rule
        for ps, o in ((params, optimizer), (list(others), other)):
            set_gradients(ps, 7)
            o.step()
        assert_same_optimizers(optimizer, other)


def test_more_than_there_is_room_for_is_stepped_by_the_function() -> None:
    names = [f"s{k}" for k in range(10)]

    def many(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
        for k, name in enumerate(names):
            s[name].lerp_(g, 1 / (k + 2))
            p.sub_(s[name], alpha=h["lr"])

    class Many(FusedOptimizer):
        rule = Rule("many", many, states=tuple(map(State, names)))

        def __init__(self, params: Any, **o: Any) -> None:
            super().__init__(params, {"lr": 0.1}, o)

    with pytest.warns(UserWarning, match="nothing is compiled for the rule 'many' .*10 states.*may have 3"):
        _, optimizer = steps_of(Many, [(5,)], 2)
    _, other = steps_of(Many, [(5,)], 2, backend="reference")
    assert_same_optimizers(optimizer, other)
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot be used for the rule 'many': .*10 states"):
        steps_of(Many, [(5,)], 1, backend="cpu")


def test_a_function_that_cannot_be_traced_is_refused_and_nothing_changes() -> None:
    class Exp(FusedOptimizer):
        rule = Rule("exp", lambda p, g, s, t, h: p.sub_(g.exp(), alpha=h["lr"]), states=(State("m"),))

        def __init__(self, params: Any, **o: Any) -> None:
            super().__init__(params, {"lr": 0.1}, o)

    params = parameters([(5,)])
    set_gradients(params, 0)
    before = params[0].detach().clone()
    optimizer = Exp(params)
    with pytest.raises(TypeError, match=r"exp\(\) cannot be traced \(test_own_rules.py"):
        optimizer.step()
    assert_same_bits(params[0].detach(), before)
    assert not optimizer.state
    Exp(params, backend="reference").step()
    assert not torch.equal(params[0].detach(), before)


@pytest.mark.parametrize("value", [lambda g: g.sum(), lambda g: None, lambda g: g[:1]], ids=["sum", "none", "part"])
def test_a_function_that_changes_a_states_shape_is_refused_and_nothing_changes(value: Any) -> None:
    def function(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
        p.sub_(g)
        s["m"] = value(g)

    class Mine(FusedOptimizer):
        rule = Rule("mine", function, states=(State("m"),))

        def __init__(self, params: Any, **o: Any) -> None:
            super().__init__(params, {"lr": 0.1}, o)

    for backend, error in ((None, TypeError), ("reference", ValueError)):
        params = parameters([(5,)])
        set_gradients(params, 0)
        before = params[0].detach().clone()
        with pytest.raises(error, match=r"cannot be traced|leaves the state 'm'"):
            Mine(params, backend=backend).step()
        assert_same_bits(params[0].detach(), before)


def test_other_bits_than_the_functions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedoptim.own_rules import cpp

    def wrong(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
        p.sub_(g.sign(), alpha=h["lr"])

    class Wrong(FusedOptimizer):
        rule = Rule("wrong", wrong)

        def __init__(self, params: Any, **o: Any) -> None:
            super().__init__(params, {"lr": 0.1}, o)

    monkeypatch.setattr(cpp, "_PRINTED", tuple(name for name in cpp._PRINTED if name != "sign"))
    monkeypatch.setitem(cpp._LANES, "sign", "printed::abs_<M>")
    with pytest.warns(UserWarning, match="what was compiled has other bits than the function"):
        _, optimizer = steps_of(Wrong, [(5,)], 2)
    _, other = steps_of(Wrong, [(5,)], 2, backend="reference")
    assert_same_optimizers(optimizer, other)


def test_options_groups_and_checkpoints_are_as_of_any_rule() -> None:
    params = parameters([(7, 11), (300,)], torch.bfloat16)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
    options = {"backend": "reference", "max_grad_norm": 1.0, "ema_decay": 0.9, "state_dtype": torch.float32}
    optimizer = Lion(groups, **options)
    set_gradients(params, 0)
    optimizer.step()
    assert optimizer.last_grad_norm is not None and optimizer.last_grad_norm > 0
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Lion([{"params": others[:1]}, {"params": others[1:]}], **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ps, o in ((params, optimizer), (others, other)):
        set_gradients(ps, 1)
        o.step()
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())


def test_the_kernels_that_come_with_the_package_are_not_for_it() -> None:
    for name in ("cuda", "triton"):
        with pytest.raises((RuntimeError, ValueError), match=f"backend='{name}' cannot"):
            steps_of(Lion, [(5,)], 1, backend=name)


def test_a_function_that_raises_leaves_everything_as_it_was() -> None:
    def fails_at_three(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
        p.add_(g / g.abs().max(), alpha=-h["lr"])  # not for empty tensors
        if p.numel() == 3:
            raise ZeroDivisionError("not for three")

    class Picky(FusedOptimizer):
        rule = Rule("picky", fails_at_three, states=(State("buffer"),))

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1}, {"backend": "reference"})

    params = parameters([(5,), (3,)])
    set_gradients(params, 0)
    before = [p.detach().clone() for p in params]
    optimizer = Picky(params)
    with pytest.raises(ZeroDivisionError, match="not for three"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)
    assert not optimizer.state
    params[1].grad = None
    optimizer.step()
    assert not torch.equal(params[0].detach(), before[0])


def test_a_changed_function_of_a_built_in_rule_is_a_rule_of_its_own() -> None:
    def mine(p: torch.Tensor, g: torch.Tensor, s: dict[str, Any], t: float, h: Any) -> None:
        reference.adam(p, g.clamp(-0.01, 0.01), s, t, h)

    class Mine(AdamW):
        rule = dataclasses.replace(AdamW.rule, reference=mine)

    _, changed = steps_of(Mine, [(50,)], 3)
    _, plain = steps_of(AdamW, [(50,)], 3, clip_grad_value=0.01)
    for p, q in zip(changed.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize(
    "name", ["step", "ema", "param", "master", "param_remainder", "param_remainder8", "param_master", "m_q8", "m_scale"]
)
def test_names_of_states_that_every_optimizer_may_have_are_refused(name: str) -> None:
    for own in ({"states": (State("exp_avg"), State(name))}, {"numbers": (State(name),)}):
        with pytest.raises(ValueError, match=f"rule 'mine' has a state '{name}'.* choose"):
            type("Mine", (FusedOptimizer,), {"rule": Rule("mine", lion, **own)})


def test_a_users_class_changes_no_other_optimizers_checkpoints() -> None:
    class Sign(FusedOptimizer):
        rule = Rule("sign", lambda p, g, s, t, h: None)  # its states, step alone, are many an optimizer's

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1}, {})

    target = SGD(parameters([(5,)]), momentum=0.9)
    content = target.state_dict()
    content["state"] = {0: {"momentum_buffer": torch.ones(5), "step": torch.tensor(3.0)}}
    target.load_state_dict(content)
    with pytest.raises(ValueError, match="it looks like one of Adam"):
        content["state"] = {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)}}
        target.load_state_dict(content)
