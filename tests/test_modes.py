"""Steps while a TorchDispatchMode watches, traces or fakes what torch does: never lost, and never half made."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import ALL, FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fusedoptim
from fusedoptim import _torch_compile

SHAPES = [(5,), (3, 4), (1,)]
pytestmark = pytest.mark.filterwarnings("ignore:.*non-leaf Tensor")


class Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def pair(case: Case, **options: Any) -> tuple[list, list, Any, Any]:
    mine, theirs = parameters(SHAPES), parameters(SHAPES)
    return mine, theirs, case.make(mine, **options), case.make(theirs, **options)


def operators(graph: torch.fx.GraphModule) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if "fusedoptim" in str(n.target)]


# ---- modes that watch ----


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_mode_sees_the_step_and_nothing_changes(case: Case, backend: str, options: dict[str, Any]) -> None:
    mine, theirs, a, b = pair(case, backend=backend, **options)
    for step in range(4):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        if step == 3:
            mine[1].grad = theirs[1].grad = None
        with Log() as log, Log() if step == 2 else nullcontext() as inner:
            a.step()
        b.step()
        name = "fusedoptim.step_and_zero_.default" if options else "fusedoptim.step_.default"
        assert log.names == [name] and (step != 2 or inner.names == [name])
    assert_same_optimizers(a, b)


def test_a_mode_sees_steps_in_the_backward_pass() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with fusedoptim.step_in_backward(fusedoptim.SGD([p], lr=0.5)):
        for _ in range(2):
            with Log() as log:
                p.sum().backward()
            assert log.names.count("fusedoptim.step_.default") == 1
    assert torch.equal(p.detach(), torch.zeros(3))


def test_an_error_under_a_mode_is_the_ordinary_one() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params)
    set_gradients(params, 0)
    params[0].grad = torch.ones(5).to_sparse()
    with Log(), pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    assert not optimizer.state
    set_gradients(params, 0)
    optimizer.add_param_group({"params": parameters([(2,)], seed=3)})
    optimizer.param_groups[0]["params"].pop()
    with Log():
        optimizer.step()
    assert len(optimizer.state) == 2


def test_a_scaler_and_a_closure_under_a_mode() -> None:
    mine, theirs, a, b = pair(FULL[1], amp_in_step=True)
    for params, o, mode in ((mine, a, Log()), (theirs, b, nullcontext())):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            set_gradients(params, step)
            scaler.scale(torch.ones(()))
            if step == 1:
                params[0].grad[0] = math.inf
            with mode:
                scaler.step(o)
            scaler.update()
    assert_same_optimizers(a, b)

    def closure() -> float:
        set_gradients(mine, 9)
        return 2.0

    with Log() as log:
        assert a.step(closure) == 2.0
    assert "fusedoptim.step_.default" in log.names


def test_the_step_of_an_average_in_place_is_refused_under_a_mode() -> None:
    params = parameters(SHAPES)
    optimizer = fusedoptim.AdamW(params, ema_decay=0.9)
    set_gradients(params, 0)
    optimizer.step()
    with optimizer.ema_weights(), Log() as log, pytest.raises(RuntimeError, match="within ema_weights"):
        optimizer.step()
    assert not any("fusedoptim" in name for name in log.names)


# ---- tracing ----

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


# ---- steps that compiled code holds on to ----


def traced(optimizer: torch.optim.Optimizer) -> torch.fx.GraphModule:
    return make_fx(lambda x: (optimizer.step(), x)[1])(torch.ones(1))


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


# ---- fake tensors ----


def fakes(mode: FakeTensorMode, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    with mode:
        params = [torch.nn.Parameter(torch.ones(s, device=device, dtype=dtype)) for s in SHAPES]
        for p in params[:2]:
            p.grad = torch.ones_like(p)
    return params


@pytest.fixture(params=["within the mode", "outside of it"])
def within(request: pytest.FixtureRequest) -> Iterator[Callable[[FakeTensorMode], Any]]:
    yield (lambda mode: mode) if request.param == "within the mode" else (lambda mode: nullcontext())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, ALL, {"state_dtype": torch.bfloat16}], ids=["plain", "all options", "bf16"])
@pytest.mark.parametrize("case", FULL, ids=str)
def test_fake_parameters_get_states_and_nothing_else(
    case: Case, options: dict, dtype: torch.dtype, within: Any
) -> None:
    real = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(SHAPES)]
    for p in real[:2]:
        p.grad = torch.ones_like(p)
    expected = case.make(real, **options)
    expected.step()
    mode = FakeTensorMode()
    params = fakes(mode, dtype=dtype)
    with within(mode):
        optimizer = case.make(params, **options)
        for _ in range(2):
            optimizer.step()
            with Log():
                optimizer.step()
    assert params[0].grad is not None
    for p, q in zip(params, real, strict=True):
        states = optimizer.state.get(p, {})
        assert states.keys() == expected.state.get(q, {}).keys()
        for name, value in states.items():
            like = expected.state[q][name]
            assert isinstance(value, FakeTensor) and value.fake_mode is mode, name
            assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device), name
    norm = optimizer.last_grad_norm
    if options is ALL:
        assert isinstance(norm, FakeTensor) and norm.shape == () and norm.dtype == torch.float32
    else:
        assert norm is None
    with within(mode):
        optimizer.zero_grad()
        optimizer.state_dict()
        assert optimizer.skipped_steps.shape == ()


def test_fake_parameters_of_a_rule_without_states_get_no_entries() -> None:
    optimizer = fusedoptim.SGD(fakes(FakeTensorMode()))
    optimizer.step()
    assert not optimizer.state


def test_fake_parameters_on_a_gpu_have_their_steps_there() -> None:
    mode = FakeTensorMode()
    params = fakes(mode, "cuda")
    optimizer = fusedoptim.AdamW(params)
    optimizer.step()
    assert all(t.device.type == "cuda" for t in optimizer.state[params[0]].values())
    eager = fusedoptim.AdamW(params, backend="reference")
    eager.step()
    assert eager.state[params[0]]["step"].device.type == "cpu"


def test_fake_parameters_with_a_scaler_and_in_the_backward_pass() -> None:
    mode = FakeTensorMode()
    params = fakes(mode)
    optimizer = fusedoptim.AdamW(params)
    with mode:
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())
        optimizer.step()
    assert len(optimizer.state) == 2
    with mode:
        model = torch.nn.Linear(3, 2)
        released = fusedoptim.AdamW(model.parameters())
        with fusedoptim.step_in_backward(released):
            for _ in range(2):
                model(torch.ones(1, 3)).sum().backward()
    assert all(isinstance(v, FakeTensor) for p in model.parameters() for v in released.state[p].values())
    assert len(released.state) == 2 and all(p.grad is None for p in model.parameters())


def test_a_memory_tracker_counts_the_states() -> None:
    tools = pytest.importorskip("torch.distributed._tools.mem_tracker")

    def peak(make: Any) -> int:
        with FakeTensorMode():
            model = torch.nn.Linear(1000, 100)
            optimizer = make(model.parameters())
            tracker = tools.MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                for _ in range(2):
                    model(torch.ones(8, 1000)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
            (snapshot,) = tracker.get_tracker_snapshot("current").values()
            return int(snapshot[tools._MemRefType.OPT])

    assert peak(fusedoptim.AdamW) == peak(lambda p: torch.optim.AdamW(p, foreach=False)) > 2 * 4 * 100_100


def test_real_parameters_in_a_mode_for_fakes() -> None:
    """Whatever was made in it would spoil a later real step."""
    mine, theirs, a, b = pair(FULL[1], max_grad_norm=1.0)
    for params in (mine, theirs):
        set_gradients(params, 0)
    for stepped in range(2):
        with FakeTensorMode(), pytest.raises(RuntimeError, match="real parameters under a FakeTensorMode"):
            a.step()
        with FakeTensorMode(allow_non_fake_inputs=True):
            a.step()
        assert (len(a.state) == 3) == bool(stepped)
        a.step()
        b.step()
    assert_same_optimizers(a, b)
    assert a.last_grad_norm == b.last_grad_norm


def test_fake_parameters_without_gradients_are_left_alone() -> None:
    mode = FakeTensorMode()
    params = fakes(mode)
    for p in params:
        p.grad = None
    for within in (mode, nullcontext(), Log()):
        optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0)
        with within:
            optimizer.step()
        assert not optimizer.state
    real = parameters(SHAPES)
    set_gradients(real, 0)
    optimizer = fusedoptim.AdamW([*params, *real])
    for _ in range(2):
        optimizer.step()
    assert [len(optimizer.state[p]) for p in real] == [3, 3, 3] and len(optimizer.state) == 3


def test_fake_and_real_tensors_are_not_mixed() -> None:
    mode = FakeTensorMode()
    real = parameters(SHAPES)
    set_gradients(real, 0)
    optimizer = fusedoptim.AdamW([*fakes(mode), *real])
    with pytest.raises(ValueError, match="2 of the 5 parameters that have gradients are fake"):
        optimizer.step()
    assert not optimizer.state
    optimizer = fusedoptim.AdamW(real)
    with mode:
        real_state = torch.zeros(5)
    optimizer.state[real[0]] = {"step": torch.zeros(()), "exp_avg": real_state, "exp_avg_sq": torch.zeros(5)}
    before = real[0].detach().clone()
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 .* is a fake tensor"):
        optimizer.step()
    assert torch.equal(real[0].detach(), before)


# ---- functorch ----


def test_within_a_function_that_functorch_transforms() -> None:
    mine, theirs, a, b = pair(FULL[1])
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)

        def stepped(x: torch.Tensor) -> torch.Tensor:
            a.step()
            return x.sin().sum()

        transform = (torch.func.grad, torch.vmap, torch.func.functionalize)[step]
        transform(stepped)(torch.ones(3))
        b.step()
    assert_same_optimizers(a, b)
