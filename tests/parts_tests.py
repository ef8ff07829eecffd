"""A step in its parts: what measures, reduces and updates can be called one by one, on every backend. A test module
that imports this one's names defines the fixture ``kernels`` (see device_tests.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import ALL, BY_NAME, FULL, Case, assert_same_bits, assert_same_optimizers, parameters, set_gradients

import fusedoptim
from fusedoptim import _prepare, _versions
from fusedoptim._exchange import Exchange
from fusedoptim._runners import Runner
from fusedoptim._states import Changes

SHAPES = [(5,), (), (0,), (7, 11), (2000,)]


def make(kernels: Any, case: Case, dtype: torch.dtype, **options: Any) -> tuple[list, Any]:
    params = parameters(SHAPES, dtype)
    return params, case.make(params, backend=kernels.backend, **options)


def ready(optimizer: fusedoptim.FusedOptimizer) -> Runner:
    """With this step's gradients looked up."""
    assert optimizer._runners is not None
    (runner,) = optimizer._runners
    if not runner.refresh(optimizer.param_groups, optimizer.state):  # the reference's are good for one step
        (runner,) = _prepare.prepare(optimizer, Changes(optimizer.state), Exchange((), ()))
    return runner


@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, {}), (torch.float64, ALL), (torch.bfloat16, ALL)],
    ids=["fp32", "fp64, all options", "bf16, all options"],
)
@pytest.mark.parametrize("case", FULL, ids=str)
def test_the_parts_make_a_step(kernels: Any, case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    mine, a = make(kernels, case, dtype, **options)
    theirs, b = make(kernels, case, dtype, **options)
    for step in range(2 if kernels.slow else 4):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        for params in (mine, theirs):
            params[3].grad = None if step == 1 else params[3].grad
        b.step()
        if step == 0:  # which makes the states, and the runner
            a.step()
            continue
        scale = None
        runner = ready(a)
        if options:
            runner.measure(None, scale)
            runner.reduce()
        for k in range(a.rule.sums):
            runner.measure(k, scale)
        runner.update(scale, None)
    assert_same_optimizers(a, b)
    for p, q in zip(mine, theirs, strict=True):
        if p.grad is not None:
            assert_same_bits(p.grad, q.grad)
    if options:
        assert_same_bits(a.last_grad_norm, b.last_grad_norm)


def test_what_is_measured(kernels: Any) -> None:
    """Sums of squares by the one definition, unscaled or as the rule gets the gradient; 0 where there is none."""
    case = BY_NAME["norm_adaptive"]
    params, optimizer = make(kernels, case, torch.float32, clip_grad_value=0.25, max_grad_norm=math.inf)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    params[0].grad = None
    scale = torch.tensor(4.0)
    runner = ready(optimizer)
    runner.measure(None, scale)
    unscaled = [torch.zeros(()) if p.grad is None else p.grad / 4 for p in params]
    assert runner.sums.tolist() == [fusedoptim.reference.sum_of_squares(g).item() for g in unscaled]
    runner.measure(0, scale)
    assert runner.sums.tolist() == [fusedoptim.reference.sum_of_squares(g.clamp(-0.25, 0.25)).item() for g in unscaled]


def test_sums_may_change_between_the_parts(kernels: Any) -> None:
    """As where those of other processes are added to them."""
    params, optimizer = make(kernels, BY_NAME["norm_adaptive"], torch.float32, max_grad_norm=1e6, beta=0.0)
    set_gradients(params, 0)
    optimizer.step()
    norm = float(optimizer.last_grad_norm)
    averages = [optimizer.state[p]["avg_grad_norm"].item() for p in params]
    runner = ready(optimizer)
    runner.measure()
    runner.sums.mul_(4)
    runner.reduce()
    assert float(optimizer.last_grad_norm) == 2 * norm
    runner.measure(0)
    runner.sums.mul_(4)
    runner.update()
    assert [optimizer.state[p]["avg_grad_norm"].item() for p in params] == [2 * x for x in averages]


def test_a_norm_that_is_not_finite_skips_the_update(kernels: Any) -> None:
    params, optimizer = make(kernels, BY_NAME["adamw"], torch.float32, skip_nonfinite=True)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    runner = ready(optimizer)
    runner.measure()
    runner.sums[0] = math.inf
    runner.reduce()
    runner.update()
    assert optimizer.skipped_steps == 1
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)


def test_sums_of_tensors_without_a_gradient_here(kernels: Any) -> None:
    """What is added to them counts, as where another process has that gradient, and is gone at the next step."""
    params, optimizer = make(kernels, BY_NAME["adamw"], torch.float32, max_grad_norm=math.inf)
    set_gradients(params, 0)
    params[4].grad = None  # nor ever before, so that no state and no table knows it
    optimizer.step()
    norm = float(optimizer.last_grad_norm)
    for _ in range(2):
        runner = ready(optimizer)
        runner.measure()
        assert runner.sums[4] == 0
        runner.sums[4] = 3 * norm**2
        runner.reduce()
        assert float(optimizer.last_grad_norm) == pytest.approx(2 * norm)
        runner.update()


@pytest.mark.parametrize("counted", ["in the library", "by torch"])
def test_versions_of_what_an_update_writes(kernels: Any, counted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if counted == "by torch":
        monkeypatch.setattr(_versions, "find_counters", lambda: False)
    params, optimizer = make(kernels, BY_NAME["sgd_momentum"], torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    set_gradients(params, 1)
    params[0].grad = None
    written = [(p, optimizer.state[p]["momentum_buffer"]) for p in params]
    before = [[t._version for t in tensors] for tensors in written]
    runner = ready(optimizer)
    runner.measure()
    assert [[t._version for t in tensors] for tensors in written] == before
    runner.update()
    after = [[t._version for t in tensors] for tensors in written]
    assert after[0] == before[0]
    assert all(now > then for p, q in zip(after[1:], before[1:], strict=True) for now, then in zip(p, q, strict=True))


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A mesh of this process and one that is only simulated, which sends back what it gets."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", FULL, ids=str)
def test_sharded_steps(kernels: Any, case: Case, two_ranks: Any) -> None:
    """With shards and the norm of whole tensors, whose other halves are equal: the bits of a step of the shards alone
    that is given this norm."""
    from torch.distributed.tensor import DTensor, Shard

    options = {"max_grad_norm": 0.1, "ema_decay": 0.9}
    theirs = [p for p in parameters(SHAPES) if p.dim() > 0]
    b = case.make(theirs, backend=kernels.backend, **options)
    mine = [torch.nn.Parameter(DTensor.from_local(p.detach().clone(), two_ranks, [Shard(0)])) for p in theirs]
    a = case.make(mine, backend=kernels.backend, **options)
    for step in range(2 if kernels.slow else 4):
        set_gradients(theirs, step)
        theirs[1].grad = None if step == 1 else theirs[1].grad
        for p, q in zip(mine, theirs, strict=True):
            p.grad = None if q.grad is None else DTensor.from_local(q.grad.clone(), two_ranks, [Shard(0)])
        a.step()
        total = sum(fusedoptim.reference.sum_of_squares(q.grad) for q in theirs if q.grad is not None)
        assert float(a.last_grad_norm) == (2 * total).sqrt().float()
        if a.rule.sums:  # by the whole tensors' norms, too
            continue
        b.step(grad_norm=a.last_grad_norm)
        for p, q in zip(mine, theirs, strict=True):
            assert_same_bits(p.to_local().detach(), q.detach())
            for name, state in a.state[p].items():
                assert_same_bits(state.to_local() if isinstance(state, DTensor) else state, b.state[q][name])
