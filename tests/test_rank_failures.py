"""A rank that cannot step: none hangs, all raise, and nothing is written on any."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import BY_NAME, Case
from ranks import run, run_apart
from sharded_models import MODELS, Sharded, built, is_dtensor, mesh, shard
from test_dtensors import shards_of
from torch import nn

import fusedoptim

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
Break = Callable[[torch.optim.Optimizer, Sharded], None]


def plain_gradient(o: torch.optim.Optimizer, s: Sharded) -> None:
    p = next(filter(is_dtensor, s.params))
    p.grad = torch.ones(p.shape)


def gradient_on_another_mesh(o: torch.optim.Optimizer, s: Sharded) -> None:
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate

    alone = DeviceMesh("cpu", [dist.get_rank()], _init_backend=False)
    p = next(filter(is_dtensor, s.params))
    p.grad = DTensor.from_local(torch.ones(p.shape), alone, [Replicate()], run_check=False)


def wrong_shape(o: torch.optim.Optimizer, s: Sharded) -> None:
    g = s.params[-1].grad
    g._local_tensor = torch.ones(shard(g).numel() + 3)


def wrong_dtype(o: torch.optim.Optimizer, s: Sharded) -> None:
    g = s.params[-1].grad
    g._local_tensor = shard(g).to(torch.int32)


def wrong_value(o: torch.optim.Optimizer, s: Sharded) -> None:
    o.param_groups[0]["lr"] = "0.1"


def wrong_state(o: torch.optim.Optimizer, s: Sharded) -> None:
    o.state[s.params[0]]["exp_avg"] = torch.zeros(1)


def sparse_gradient(o: torch.optim.Optimizer, s: Sharded) -> None:
    g = next(filter(is_dtensor, s.params)).grad
    g._local_tensor = shard(g).to_sparse()


#: The last three of the shard, where the DTensor says otherwise.
BREAKS = [
    plain_gradient, gradient_on_another_mesh, wrong_value, wrong_state, wrong_shape, wrong_dtype, sparse_gradient,
]  # fmt: skip


def attempt(case: Case, model: str, rank: int, breaks: list[Break], after: int, options: dict[str, Any]) -> list[Any]:
    """For each break: what the step raised, after so many good ones, and whether anything was written."""
    found = []
    for break_ in breaks:
        sharded = built(model)
        optimizer = case.make(sharded.params, **options)
        for step in range(after):
            sharded.backward(step)
            optimizer.step()
        sharded.backward(after)
        if dist.get_rank() == rank:
            break_(optimizer, sharded)
        found.append(outcome(sharded, optimizer, optimizer.step))
        sharded.backward(after)  # all of them are still there
    return found


def kind_of(error: Exception) -> str:
    return "ValueError" if isinstance(error, ValueError) else "RuntimeError"


def outcome(sharded: Sharded, optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> tuple[str, str]:
    before = shards_of(sharded, optimizer)
    try:
        step()
    except (ValueError, RuntimeError) as error:
        result = kind_of(error), str(error)
    else:
        return "nothing", "was raised"
    after = shards_of(sharded, optimizer)
    for old, new in zip(before, after, strict=True):
        for name in old:  # states may have been made, but then they are as new
            if not torch.equal(old[name], new[name]):
                return "something", f"was written: {name}"
    return result


WITH_NORM: dict[str, Any] = {"max_grad_norm": 1.0}


@pytest.mark.parametrize("after, options", [(0, {}), (0, WITH_NORM), (2, WITH_NORM)], ids=["first", "norm", "later"])
@pytest.mark.parametrize(
    "model, rank",
    [("fsdp2", 0), ("hsdp", 2), ("tensor_parallel_and_fsdp2", 1), ("two_meshes", 3), ("plain_beside", 1)],
)
def test_one_rank_refuses_a_step_and_all_raise(model: str, rank: int, after: int, options: dict[str, Any]) -> None:
    world = MODELS[model][0]
    breaks = BREAKS if after else [b for b in BREAKS if b is not wrong_state]
    results = run(world, attempt, BY_NAME["adamw"], model, rank, breaks, after, options, timeout=60)
    for i, break_ in enumerate(breaks):
        for other, found in enumerate(results):
            kind, text = found[i]
            if other == rank:
                assert kind == "ValueError" and "another" not in text, (break_.__name__, kind, text)
            elif model == "hsdp" and after and other // 2 != rank // 2:  # with the other replica no norm is shared
                assert (kind, text) == ("nothing", "was raised")
            else:
                assert kind == "RuntimeError" and "rank" in text, (break_.__name__, other, kind, text)


@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_that_have_to_be_placed_while_one_rank_refuses(rank: int) -> None:
    """Which all ranks do together, though they share no norm then."""
    results = run(2, attempt, BY_NAME["adamw"], "sequence_parallel", rank, [wrong_value], 2, {}, timeout=60)
    assert results[rank][0][0] == "ValueError"
    assert results[1 - rank][0] == ("nothing", "was raised")


def without_a_gradient(model: str, rank: int, after: int) -> tuple[bool, torch.Tensor | None]:
    sharded = built(model)
    optimizer = fusedoptim.AdamW(sharded.params, **WITH_NORM)
    for step in range(after):
        sharded.backward(step)
        optimizer.step()
    sharded.backward(after)
    if dist.get_rank() == rank:
        sharded.params[-1].grad = None
    kind, _ = outcome(sharded, optimizer, optimizer.step)
    return kind == "RuntimeError", optimizer.last_grad_norm


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("model", ["fsdp2", "tensor_parallel_and_fsdp2", "plain_beside"])
def test_a_gradient_that_one_rank_does_not_have(model: str, after: int) -> None:
    """Whatever becomes of the step, it becomes of it everywhere, and without waiting."""
    results = run(MODELS[model][0], without_a_gradient, model, 1, after, timeout=60)
    assert len({raised for raised, _ in results}) == 1
    if not results[0][0]:
        assert len({norm.item() for _, norm in results}) == 1


def attempt_norms(rank: int, model: str, break_: Break) -> list[tuple[str, str]]:
    """NormAdaptive's step, and what measures without a step."""
    case, found = BY_NAME["norm_adaptive"], []
    for name in ("step", "clip_grad_norm_", "grad_norm"):
        sharded = built(model)
        optimizer = case.make(sharded.params)
        for step in range(2):
            sharded.backward(step)
            optimizer.step()
        sharded.backward(2)
        if dist.get_rank() == rank:
            break_(optimizer, sharded)
        calls = {
            "step": optimizer.step,
            "clip_grad_norm_": lambda s=sharded: fusedoptim.clip_grad_norm_(s.params, 1.0),
            "grad_norm": lambda s=sharded: fusedoptim.grad_norm(s.params),
        }
        found.append(outcome(sharded, optimizer, calls[name]))
    return found


@pytest.mark.parametrize("break_", [plain_gradient, wrong_dtype], ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", ["fsdp2", "tensor_parallel_and_fsdp2"])
def test_one_rank_refuses_a_norm_and_all_raise(model: str, break_: Break) -> None:
    for rank, found in enumerate(run(MODELS[model][0], attempt_norms, 1, model, break_, timeout=60)):
        for kind, text in found:
            assert kind == ("ValueError" if rank == 1 else "RuntimeError") and text, (rank, kind, text)


def clip_where_nothing_is_sharded(rank: int) -> bool:
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    p, q = nn.Parameter(distribute_tensor(torch.ones(4), mesh(2), [Replicate()])), nn.Parameter(torch.ones(4))
    p.grad, q.grad = DTensor.from_local(torch.ones(4), mesh(2), [Partial()], run_check=False), torch.ones(4)
    if dist.get_rank() == rank:
        q.grad = q.grad.to_sparse()
    try:
        norm = fusedoptim.clip_grad_norm_([p, q], 1.0)
    except (ValueError, RuntimeError, NotImplementedError):  # torch's own
        return dist.get_rank() == rank
    return math.isclose(norm.item(), 20**0.5, rel_tol=1e-6) or dist.get_rank() == rank


def test_gradients_that_have_to_be_placed_while_one_rank_cannot_clip() -> None:
    assert all(run(2, clip_where_nothing_is_sharded, 1, timeout=60))


def attempt_stages(rank: int, after: int) -> tuple[str, str]:
    """Plain parameters, whose norm is added over a group."""
    params = [torch.nn.Parameter(torch.ones(5 + dist.get_rank())) for _ in range(2 + dist.get_rank())]
    optimizer = fusedoptim.AdamW(params, max_grad_norm=1.0, norm_group=dist.group.WORLD)
    for step in range(after + 1):
        for p in params:
            p.grad = torch.ones_like(p)
        if step < after:
            optimizer.step()
    if dist.get_rank() == rank:
        optimizer.param_groups[0]["lr"] = "0.1"
    before = [p.detach().clone() for p in params]
    try:
        optimizer.step()
    except (ValueError, RuntimeError) as error:
        written = not all(map(torch.equal, before, params))
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()  # which nobody refuses any more
        assert not any(map(torch.equal, before, params))
        return ("something", "was written") if written else (kind_of(error), str(error))
    return "nothing", "was raised"


@pytest.mark.parametrize("after", [0, 2])
def test_one_stage_refuses_a_step_and_all_raise(after: int) -> None:
    for rank, (kind, text) in enumerate(run(2, attempt_stages, 0, after, timeout=60)):
        assert kind == ("ValueError" if rank == 0 else "RuntimeError"), (rank, kind, text)


# ---- ranks that are gone ----


def step_without_one(after: int, options: dict[str, Any], late_by: float | None = None) -> tuple[str, str]:
    """``late_by``: seconds; the second rank kills itself without."""
    sharded = built("fsdp2")
    optimizer = fusedoptim.AdamW(sharded.params, **options)
    for step in range(after):
        sharded.backward(step)
        optimizer.step()
    sharded.backward(after)
    if dist.get_rank() == 1:
        if late_by is None:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(late_by or 0)
        return "slept", ""
    return outcome(sharded, optimizer, optimizer.step)


@pytest.mark.parametrize("after, options", [(0, {}), (0, WITH_NORM), (2, WITH_NORM)], ids=["first", "norm", "later"])
def test_a_rank_that_is_killed(after: int, options: dict[str, Any]) -> None:
    one, two = run_apart(2, step_without_one, after, options, timeout=60)
    assert two.exit_code == -signal.SIGKILL
    kind, text = one.result
    assert kind == "RuntimeError" and text, one.result  # gloo's own words


def test_a_rank_that_does_not_come() -> None:
    one, two = run_apart(2, step_without_one, 2, WITH_NORM, 4.0, timeout=60, group_timeout=3)
    kind, text = one.result
    assert kind == "RuntimeError" and "imed out" in text, one.result
    assert two.result == ("slept", "")
