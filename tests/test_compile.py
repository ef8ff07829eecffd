"""step() inside of torch.compile: one graph, no compilation when values change, the bits of the ordinary step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import EVERY, Case, assert_same_optimizers, gradient, parameters, set_gradients
from torch._dynamo.utils import counters

import fusedoptim

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own
SHAPES = [(5,), (40,), (3, 4), (1,), (17,)]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"].get("unique_graphs", 0))


def compiled(optimizer: torch.optim.Optimizer, backend: str = "eager") -> Callable[[], None]:
    return torch.compile(optimizer.step, fullgraph=True, backend=backend)


def pair(case: Case) -> tuple[list, list, Any, Any]:
    both = []
    for _ in range(2):
        params = parameters(SHAPES)
        both.append((params, case.make([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}])))
    (mine, a), (theirs, b) = both
    return mine, theirs, a, b


def change(optimizer: Any, step: int) -> None:
    """Every number that a schedule might change."""
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.1 / (step + 1 + i)
        group["weight_decay"] = 0.001 * step
        if "betas" in group:
            group["betas"] = (0.9 - 0.01 * step, 0.99, *group["betas"][2:])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_one_graph_whatever_changes(case: Case, backend: str) -> None:
    mine, theirs, a, b = pair(case)
    step = compiled(a, backend)
    for i in range(50):
        set_gradients(mine, i)
        set_gradients(theirs, i)
        change(a, i)
        change(b, i)
        if i == 20:
            a.load_state_dict(copy.deepcopy(a.state_dict()))
        step()
        b.step()
        a.zero_grad(set_to_none=True)
    assert graphs() == 1
    assert_same_optimizers(a, b)


def test_inductor() -> None:
    """The compiler that people use; it rewrites what is written to."""
    mine, theirs, a, b = pair(EVERY[1])
    step = compiled(a, "inductor")
    for i in range(5):
        set_gradients(mine, i)
        set_gradients(theirs, i)
        change(a, i)
        change(b, i)
        step()
        b.step()
    assert graphs() == 1
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", EVERY, ids=str)
def test_with_all_that_surrounds_a_step(case: Case, backend: str) -> None:
    """Gradients are written to as well; a limit that changes compiles nothing."""
    both = []
    for _ in range(2):
        params = parameters(SHAPES)
        both.append((params, case.make(params, ema_decay=0.9, zero_grad_in_step=True, skip_nonfinite=True)))
    (mine, a), (theirs, b) = both
    step = compiled(a, backend)
    for i in range(10):
        for params, optimizer in both:
            for k, p in enumerate(params):
                g = gradient(p, i, k)
                p.grad = g if p.grad is None else p.grad.add_(g)
            optimizer.param_groups[0].update(max_grad_norm=0.1 + 0.1 * i, clip_grad_value=0.05 + 0.01 * i)
        if i == 5:
            mine[1].grad[0] = theirs[1].grad[0] = float("nan")
        step()
        b.step()
        assert not any(p.grad.any() for p in mine)
    assert graphs() == 1
    assert a.skipped_steps == 1
    assert_same_optimizers(a, b)


def test_a_gradient_that_stays_none_compiles_once_more() -> None:
    mine, theirs, a, b = pair(EVERY[1])
    step = compiled(a)
    for i in range(12):
        set_gradients(mine, i)
        set_gradients(theirs, i)
        if i > 5:
            mine[1].grad = theirs[1].grad = None
        step()
        b.step()
    assert graphs() == 2
    assert_same_optimizers(a, b)
    for p in mine:
        p.grad = None
    step()  # nothing to do
    assert_same_optimizers(a, b)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_whole_training_step(case: Case) -> None:
    """Forward, backward, step and zero_grad: in one graph where the compiler can trace a backward pass, else in as many
    as at the first time."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch traces no backward pass")
    both = []
    for wrap in (torch.compile, lambda f, **_: f):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = case.make(model.parameters())

        def train(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        with torch._dynamo.config.patch(trace_autograd_ops=True):
            step, first = wrap(train, backend="aot_eager"), 0
            for i in range(8):
                change(optimizer, i)
                step(torch.linspace(-1, 1, 24).reshape(4, 6) * (i + 1))
                first = first or graphs()
        both.append(optimizer)
    assert graphs() == first > 0
    assert_same_optimizers(*both)


def test_schedulers_and_hooks() -> None:
    mine, theirs, a, b = pair(EVERY[1])
    calls = torch.zeros(())
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30) for o in (a, b)]
    a.register_step_post_hook(lambda *_: calls.add_(1))
    step = compiled(a)
    for i in range(10):
        set_gradients(mine, i)
        set_gradients(theirs, i)
        step()
        b.step()
        for schedule in schedules:
            schedule.step()
    assert graphs() == 1
    assert calls == 10
    assert_same_optimizers(a, b)


def test_copies_are_written_to_in_the_parameters_stead() -> None:
    """A compiler that cannot write in place hands over copies."""
    params = parameters(SHAPES)
    optimizer = fusedoptim.SGD(params, lr=0.5)
    numbers: list[int] = []
    set_gradients(params, 0)

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        numbers.extend(n.args[0] for n in graph.graph.nodes if "step_" in str(n.target))
        return graph

    torch.compile(optimizer.step, backend=note)()
    (number,) = numbers
    before = [p.detach().clone() for p in params]
    copies = [p.detach() + 1 for p in params]
    grads = [torch.ones_like(p) for p in params]
    for p in params:
        p.grad = None
    torch.ops.fusedoptim.step_(number, copies, grads)
    for p, q, old in zip(params, copies, before, strict=True):
        assert torch.equal(p.detach(), old) and p.grad is None
        assert torch.equal(q, old + 1 - 0.5)
    for operator in (torch.ops.fusedoptim.step_.default, torch.ops.fusedoptim.step_and_zero_.default):
        torch.library.opcheck(operator, (number, copies, [g.clone() for g in grads]))
    with pytest.raises(RuntimeError, match="parameters changed since"):
        optimizer.param_groups[0]["params"].pop()
        torch.ops.fusedoptim.step_(number, copies, grads)
    del optimizer
    gc.collect()
    torch.compiler.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone"):
        torch.ops.fusedoptim.step_(number, copies, grads)


def test_groups_added_later_and_copies_of_optimizers() -> None:
    mine, theirs, a, b = pair(EVERY[1])
    step = compiled(a)
    set_gradients(mine, 0)
    set_gradients(theirs, 0)
    step()
    b.step()
    for params, o in ((mine, a), (theirs, b)):
        more = parameters([(6,)], seed=7)
        params += more
        o.add_param_group({"params": more, "lr": 0.3})
    c = copy.deepcopy(a)
    others = [p for group in c.param_groups for p in group["params"]]
    for i in range(1, 4):
        for params in (mine, theirs, others):
            set_gradients(params, i)
        step()
        b.step()
        compiled(c)()
    assert_same_optimizers(a, b)
    assert_same_optimizers(c, b)
