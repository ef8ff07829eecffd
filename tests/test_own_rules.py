"""Rules that a user declares: without kernels, their own function steps them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from cases import assert_same_bits, parameters, set_gradients

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


def test_its_function_steps_it_with_one_warning() -> None:
    mine, theirs = parameters([(7, 11), (300,)]), parameters([(7, 11), (300,)])
    momenta = [torch.zeros_like(p) for p in theirs]
    optimizer = Lion(mine, lr=0.01, weight_decay=0.1)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 0:
            with pytest.warns(UserWarning, match="no kernels are compiled for the rule 'lion of a user'"):
                optimizer.step()
        else:
            optimizer.step()
        with torch.no_grad():
            for p, m in zip(theirs, momenta, strict=True):
                assert p.grad is not None
                lion(p, p.grad, {"exp_avg": m}, step + 1, optimizer.param_groups[0])
    for p, q, m in zip(mine, theirs, momenta, strict=True):
        assert_same_bits(p.detach(), q.detach())
        assert_same_bits(optimizer.state[p]["exp_avg"], m)


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


def test_a_backend_without_kernels_for_it_is_refused_and_nothing_changes() -> None:
    params = parameters([(5,)])
    set_gradients(params, 0)
    before = params[0].detach().clone()
    optimizer = Lion(params, backend="cpu")
    with pytest.raises(RuntimeError, match=r"no kernels for the rule 'lion of a user'.*'reference'"):
        optimizer.step()
    assert_same_bits(params[0].detach(), before)
    assert not optimizer.state


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


def test_a_changed_function_of_a_compiled_rule_is_not_stepped_with_its_kernels() -> None:
    called = []

    def mine(*args: Any) -> None:
        called.append(args)
        reference.adam(*args)

    class Mine(AdamW):
        rule = dataclasses.replace(AdamW.rule, reference=mine)

    params, others = parameters([(5,)]), parameters([(5,)])
    set_gradients(params, 0)
    set_gradients(others, 0)
    with pytest.warns(UserWarning, match="no kernels are compiled for the rule 'adam'"):
        Mine(params).step()
    AdamW(others).step()
    assert len(called) == 1
    assert_same_bits(params[0].detach(), others[0].detach())


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
