"""Ranks that have nothing of what the others step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import gradient
from ranks import run
from torch import Tensor

import fusedoptim

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def without_parameters() -> list[Any]:
    """Norms, counts and what clipping says, of a rank with two parameters and one without any."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)] if dist.get_rank() == 0 else []
    optimizer = fusedoptim.AdamW(
        [{"params": params}], max_grad_norm=1.0, skip_nonfinite=True, norm_group=dist.group.WORLD
    )
    found: list[Any] = []
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = gradient(p, step, i)
        if step == 2 and params:
            params[0].grad[1] = math.inf
        optimizer.step()
        norm = fusedoptim.grad_norm(params, norm_group=dist.group.WORLD)
        found += [optimizer.last_grad_norm, norm, optimizer.skipped_steps]
    return found


def test_a_rank_without_parameters_knows_the_norm() -> None:
    first, second = run(2, without_parameters)
    assert all(map(torch.equal, first, second))
    assert [int(x) for x in first[2::3]] == [0, 0, 1, 1] and all(
        n.isfinite() == (k != 2) for k, n in enumerate(first[::3])
    )


def outside_of_a_mesh() -> tuple[list[Tensor], list[Tensor]]:
    """Shards after steps over a mesh of two of four ranks, and those of torch.optim."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    both = []
    for cls in (fusedoptim.SGD, torch.optim.SGD):
        p = torch.nn.Parameter(distribute_tensor(torch.linspace(-1, 1, 15).view(5, 3), mesh, [Shard(0)]))
        optimizer = cls([p], lr=0.1, momentum=0.9)
        for step in range(3):
            p.grad = distribute_tensor(gradient(torch.empty(5, 3), step, 0), mesh, [Shard(0)])
            optimizer.step()
        both.append([p.to_local().detach().clone(), optimizer.state[p]["momentum_buffer"].to_local().clone()])
    return both[0], both[1]


def test_ranks_outside_of_a_mesh() -> None:
    for mine, theirs in run(4, outside_of_a_mesh):
        assert all(map(torch.equal, mine, theirs))
