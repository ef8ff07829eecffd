"""Traced steps: made where the graph runs, and never where it was traced alone."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
from cases import ALL, FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from modes import SHAPES, Log, operators, pair, traced
from torch.fx.experimental.proxy_tensor import make_fx

import fusedoptim
from fusedoptim import _torch_compile

pytestmark = pytest.mark.filterwarnings("ignore:.*non-leaf Tensor")


TRACERS = {
    "real": {},
    "fake": {"tracing_mode": "fake", "_allow_non_fake_inputs": True},
    "symbolic": {"tracing_mode": "symbolic", "_allow_non_fake_inputs": True},
    "pre-dispatch": {"pre_dispatch": True},
}


@pytest.mark.parametrize("stepped_before", [False, True], ids=["the first", "a later"])
@pytest.mark.parametrize("tracer", list(TRACERS))
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_traced_step_is_made_where_the_graph_runs(case: Case, tracer: str, stepped_before: bool) -> None:
    """The parameters are the optimizer's own, which the traced function does not take."""
    mine, theirs, a, b = pair(case)
    for params in (mine, theirs):
        set_gradients(params, 0)
    if stepped_before:
        a.step()
        b.step()

    def step(x: torch.Tensor) -> torch.Tensor:
        a.step()
        return x * 2

    graph = make_fx(step, **TRACERS[tracer])(torch.ones(2))
    assert operators(graph) == ["fusedoptim.step_.default"]
    if tracer in ("real", "pre-dispatch"):  # computes while it traces, as for any operator
        b.step()
    assert_same_optimizers(a, b)
    for i in range(1, 4):
        a.param_groups[0]["lr"] = b.param_groups[0]["lr"] = 0.1 / i
        for params in (mine, theirs):
            for k, p in enumerate(params):
                p.grad.copy_(torch.full(p.shape, 0.1 * i + k))
        graph(torch.ones(2))
        b.step()
    assert_same_optimizers(a, b)


def test_a_step_traced_through_functionalize() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.SGD(params, lr=0.5)
    set_gradients(params, 0)
    graph = make_fx(torch.func.functionalize(lambda x: (optimizer.step(), x * 2)[1]))(torch.ones(1))
    assert operators(graph) == ["fusedoptim.step_.default"]
    before = params[0].detach().clone()
    graph(torch.ones(1))
    assert torch.equal(params[0].detach(), before - 0.5 * params[0].grad)


def test_a_traced_step_is_no_dead_code() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.SGD(params, lr=0.5)
    set_gradients(params, 0)
    graph = make_fx(lambda x: (optimizer.step(), x)[1])(torch.ones(1))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    before = params[0].detach().clone()
    graph(torch.ones(1))
    assert not torch.equal(params[0].detach(), before)


def test_a_traced_step_leaves_no_scaling_out() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params, amp_in_step=True)
    set_gradients(params, 0)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
    with pytest.raises(RuntimeError, match="GradScaler"):
        make_fx(lambda x: (optimizer.step(), x)[1])(torch.ones(1))
    assert not optimizer.state


@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch has none")
@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("tracer", ["real", "fake", "pre-dispatch"])  # symbols are no ids of parameters
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_traced_step_with_states_from_outside(case: Case, tracer: str, options: dict[str, Any]) -> None:
    """The optimizer's own stay as they are, whatever they are; numbers are those of the trace."""
    mine, theirs, a, b = pair(case, **options)
    for params, o in ((mine, a), (theirs, b)):
        set_gradients(params, 0)
        o.step()
        for p in params:
            p.grad = None

    def step(params: dict, grads: list, states: dict) -> tuple[dict, dict]:
        with torch.optim.swap_in_optimizer_params_and_state(a, params, states):
            for p, g in zip(params.values(), grads, strict=True):
                p.grad = g
            a.step()
            for p in params.values():
                p.grad = None
        return params, states

    def inputs(step: int) -> tuple[dict, list, dict]:
        set_gradients(theirs, step)
        grads = [p.grad.clone() for p in theirs]
        return {str(i): p.detach().clone() for i, p in enumerate(theirs)}, grads, copy.deepcopy(b.state_dict())

    graph = make_fx(step, **TRACERS[tracer])(*inputs(1))
    assert operators(graph) == ["fusedoptim.stateless_step_.default"]
    before = copy.deepcopy((a.state_dict(), [p.detach() for p in mine]))
    a.param_groups[0]["lr"] = 77.0
    for i in (1, 2):
        params, grads, states = inputs(i)
        b.step()
        out_params, out_states = graph(params, grads, states)
        for p, q, out in zip(theirs, params.values(), out_params.values(), strict=True):
            assert_same_bits(q, p.detach())
            assert_same_bits(out, p.detach())
        assert not options or not any(g.any() for g in grads)
        for k, values in b.state_dict()["state"].items():
            for name, value in values.items():
                assert_same_bits(states["state"][k][name], value, name)
                assert_same_bits(out_states["state"][k][name], value, name)
    a.param_groups[0]["lr"] = before[0]["param_groups"][0]["lr"]
    assert all(torch.equal(p.detach(), q) for p, q in zip(mine, before[1], strict=True))
    for k, values in a.state_dict()["state"].items():
        for name, value in values.items():
            assert_same_bits(value, before[0]["state"][k][name], name)


@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="this torch has none")
def test_a_learning_rate_that_is_a_tensor_is_an_input_of_a_traced_step() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedoptim.SGD([p], lr=torch.tensor(0.5), momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()

    def step(q: torch.Tensor, states: dict) -> torch.Tensor:
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, {"p": q}, states):
            q.grad = torch.ones(3)
            optimizer.step()
        return q

    states = copy.deepcopy(optimizer.state_dict())
    graph = make_fx(step)(torch.ones(3), copy.deepcopy(states))
    states["state"][0]["momentum_buffer"].zero_()
    states["param_groups"][0]["lr"].fill_(2.0)
    assert torch.equal(graph(torch.ones(3), states), torch.full((3,), -1.0))
    with torch.no_grad():
        graph.graph.eliminate_dead_code()
    assert operators(graph)


def test_a_symbol_is_no_learning_rate_of_a_step_with_states_from_outside() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedoptim.SGD([p], lr=0.5, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()

    def step(momentum: torch.Tensor, lr: int) -> torch.Tensor:
        optimizer.state[p]["momentum_buffer"] = momentum
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return momentum

    with pytest.raises(RuntimeError, match=r"'lr' of group 0 is .*, a symbol"):
        make_fx(step, **TRACERS["symbolic"])(torch.ones(3), 3)


def test_clipping_is_traced_as_torchs_own() -> None:
    grads = [torch.full((3,), 2.0), torch.full((2, 2), -3.0)]

    def clip(*given: torch.Tensor) -> torch.Tensor:
        params = [torch.zeros_like(g) for g in given]
        for p, g in zip(params, given, strict=True):
            p.grad = g
        fusedoptim.clip_grad_value_(params, 2.5)
        return fusedoptim.clip_grad_norm_(params, 1.0)

    for tracer in TRACERS.values():
        graph = make_fx(clip, **tracer)(*(g.clone() for g in grads))
        assert not operators(graph)
        mine = [g.clone() for g in grads]
        norm = graph(*mine)
        assert norm.item() == pytest.approx(math.sqrt(12 + 25))
        assert sum(g.square().sum().item() for g in mine) == pytest.approx(1.0, rel=1e-5)


def test_steps_that_compiled_code_holds_do_not_pile_up() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    before = len(_torch_compile._traced)
    for _ in range(5):
        graph = traced(optimizer)
        with Log():
            optimizer.step()
        torch.compiler.reset()
        torch.compile(optimizer.step, backend="eager")()
    assert len(_torch_compile._traced) == before + 1
    params[0].grad = None
    graph = traced(optimizer)
    assert len(_torch_compile._traced) == before + 2
    torch.compiler.reset()
    del optimizer
    gc.collect()
    assert len(_torch_compile._traced) == before
    with pytest.raises(RuntimeError, match="is gone"):
        graph(torch.ones(1))
    other = fusedoptim.AdamW(params)
    traced(other)
    with pytest.raises(RuntimeError, match="is gone"):  # and nobody else has its number
        graph(torch.ones(1))


def test_a_copied_optimizer_has_steps_of_its_own_in_compiled_code() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    graph = traced(optimizer)
    other = copy.deepcopy(optimizer)
    mine = [p for group in other.param_groups for p in group["params"]]
    set_gradients(mine, 0)
    before = params[0].detach().clone()
    traced(other)(torch.ones(1))
    assert torch.equal(params[0].detach(), before) and other.state[mine[0]]["step"] == 3
    graph(torch.ones(1))
    assert optimizer.state[params[0]]["step"] == 2
