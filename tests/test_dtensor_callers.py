"""Steps over DTensors as other code makes them: compiled, watched, scaled, on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from cases import BY_NAME, FULL, Case, gradient
from torch import Tensor

import fusedoptim

pytest.importorskip("torch.distributed.tensor")
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

WORLD, STEPS = 2, 4
SHAPES = [(5, 3), (4,), (1,), (7, 2)]
WAYS = ["eager", "aot_eager", "watched", "profiled"]


def sharded(shapes: list[tuple[int, ...]], mesh: Any) -> list[Tensor]:
    """DTensors of every kind, and a plain one."""
    generator = torch.Generator().manual_seed(0)
    placements = [Shard(0), Replicate(), Shard(0), Shard(1)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [distribute_tensor(x, mesh, [how]) for x, how in zip(values, placements, strict=True)]
    return [torch.nn.Parameter(p) for p in (*params, torch.randn(6, generator=generator))]


def place_gradients(params: list[Tensor], step: int, partial: bool = False) -> None:
    """partial: those of replicated parameters are sums to come, as those of sequence-parallel norms."""
    for i, p in enumerate(params):
        g = gradient(p, step, i)
        if not isinstance(p, DTensor):
            p.grad = g
        elif partial and p.placements == (Replicate(),):
            p.grad = DTensor.from_local(g / WORLD, p.device_mesh, [Partial()])
        else:
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)


def shards(optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that a step writes."""
    local = [p.to_local() if isinstance(p, DTensor) else p for g in optimizer.param_groups for p in g["params"]]
    for values in optimizer.state.values():
        local += [v.to_local() if isinstance(v, DTensor) else v for v in values.values()]
    return [t.detach().clone() for t in local]


def step_of(optimizer: Any, way: str) -> Any:
    if way == "watched":
        from torch.utils.flop_counter import FlopCounterMode

        def watched() -> None:
            with FlopCounterMode(display=False):
                optimizer.step()

        return watched
    if way == "profiled":

        def profiled() -> None:
            with torch.profiler.profile():
                optimizer.step()

        return profiled
    return torch.compile(optimizer.step, fullgraph=True, backend=way)


def steps(case: Case, way: str, options: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor], int]]:
    """Shards after the steps made that way and after ordinary ones, and the number of graphs."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    mesh = init_device_mesh("cpu", (WORLD,))
    both = []
    for way_or_none in (way, None):
        params = sharded(SHAPES, mesh)
        optimizer = case.make(params, **options)
        step = optimizer.step if way_or_none is None else step_of(optimizer, way_or_none)
        for i in range(STEPS):
            place_gradients(params, i, partial=True)
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            step()
            if options.get("zero_grad_in_step"):
                grads = [p.grad.to_local() if isinstance(p, DTensor) else p.grad for p in params]
                assert not any(g.count_nonzero() for g in grads)
        both.append(shards(optimizer))
    return [*both, counters["stats"].get("unique_graphs", 0)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", [BY_NAME["adamw_amsgrad"], BY_NAME["norm_adaptive_all"]], ids=str)
def test_a_step_made_in_another_way(case: Case, way: str) -> None:
    for options in ({}, {"max_grad_norm": 0.1, "zero_grad_in_step": True, "ema_decay": 0.9}):
        for mine, theirs, graphs in ranks.run(WORLD, steps, case, way, options):
            assert len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
            assert graphs == (1 if way.endswith("eager") else 0)


def scaled(options: dict[str, Any]) -> list[Any]:
    """Shards and scales with a scaler, for sharded parameters and for whole ones."""
    mesh = init_device_mesh("cpu", (WORLD,))
    found = []
    for whole in (False, True):
        params = sharded(SHAPES, mesh)[:4]  # torch's scaler takes no plain tensor beside DTensors
        if whole:
            params = [torch.nn.Parameter(p.full_tensor() if isinstance(p, DTensor) else p.detach()) for p in params]
        optimizer = fusedoptim.AdamW(params, lr=0.1, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for i in range(STEPS):
            place_gradients(params, i)
            if i == 2:  # in the last row, which is on one rank
                g = gradient(params[0], i, 0)
                g[-1] = torch.inf
                params[0].grad = g if whole else distribute_tensor(g, mesh, [Shard(0)])
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        values = [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
        found.append(([v.detach() for v in values], scaler.get_scale()))
    return found


@pytest.mark.parametrize(
    "options", [{}, {"amp_in_step": True}, {"zero_grad_in_step": True, "max_grad_norm": 0.1}], ids=str
)
def test_a_grad_scaler(options: dict[str, Any]) -> None:
    for (mine, scale), (theirs, expected) in ranks.run(WORLD, scaled, options):
        assert scale == expected == 4.0
        assert all(map(torch.equal, mine, theirs))


def footprint() -> list[Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    params = sharded(SHAPES, mesh)
    optimizer = fusedoptim.AdamW(params, ema_decay=0.9)
    place_gradients(params, 0)
    before = optimizer.memory()
    optimizer.step()
    return [before.to_come, optimizer.memory().states, sum(p.to_local().numel() for p in params[:4]) + 6]


def test_memory_is_that_of_shards() -> None:
    for to_come, states, elements in ranks.run(WORLD, footprint):
        assert to_come["exp_avg"] == to_come["ema"] == states["exp_avg"] == states["ema"] == 4 * elements


def copied() -> list[Any]:
    """A deep copy and a pickle of an optimizer over DTensors step as it does."""
    import copy

    mesh = init_device_mesh("cpu", (WORLD,))
    params = sharded(SHAPES, mesh)
    optimizer = fusedoptim.AdamW(params, lr=0.1)
    place_gradients(params, 0)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    for one in (optimizer, other):
        place_gradients(one.param_groups[0]["params"], 1)
        one.step()
    return [shards(optimizer), shards(other)]


def test_deep_copies() -> None:
    for mine, theirs in ranks.run(WORLD, copied):
        assert all(map(torch.equal, mine, theirs))


def wrong() -> list[str]:
    mesh, other = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (1, WORLD))
    attempts: dict[str, Any] = {
        "plain gradient": lambda p: torch.zeros(p.shape),
        "another mesh": lambda p: distribute_tensor(torch.zeros(p.shape), other, [Replicate(), Shard(0)]),
    }
    texts = []
    for grad in attempts.values():
        params = sharded(SHAPES, mesh)
        place_gradients(params, 0)
        optimizer = fusedoptim.AdamW(params)
        optimizer.step()
        before = shards(optimizer)
        try:
            torch._C.TensorBase.grad.__set__(params[0], grad(params[0]))
            optimizer.step()
            texts.append("nothing was raised")
        except (ValueError, RuntimeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
        assert all(map(torch.equal, before, shards(optimizer)))
    try:
        fusedoptim.AdamW([torch.nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Partial()]))])
    except ValueError as error:
        texts.append(str(error))
    return texts


def test_what_cannot_be_stepped() -> None:
    for texts in ranks.run(WORLD, wrong):
        assert "its gradient is none on its device mesh" in texts[0]
        assert "its gradient is none on its device mesh" in texts[1]
        assert "Partial placements" in texts[2]


@pytest.mark.parametrize("case", FULL, ids=str)
def test_no_name_of_a_group_is_added(case: Case) -> None:
    """norm_group is of the optimizer as a whole, and in no checkpoint."""
    params = [torch.nn.Parameter(torch.zeros(2))]
    assert "norm_group" not in case.make(params).state_dict()["param_groups"][0]
